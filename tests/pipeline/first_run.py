"""Run by a test in a process of its own: a short run in a new store, and what MLflow has of it."""

import sys

from mlflow.tracking import MlflowClient

from configs.parallel import ClusterConfig, StoreConfig
from configs.reading import load_recipe
from pipeline.graph import Selection
from pipeline.places import tracking_uri
from pipeline.runner import Setting, realise
from pipeline.states import Examiner
from pipeline.tracking.listener import Tracking
from pipeline.tracking.runs import Told
from tests.pipeline.fakes import RECIPE, World

if __name__ == "__main__":
    world = World(StoreConfig(url=sys.argv[1], min_free_bytes=0))
    recipe, run, store, graph = load_recipe("smoke"), world.begin(), world.store, world.graph()
    store.prepare()
    told = Told(recipe, run, list(graph.nodes), "ingot run")
    # With the patience of every user: the recipe's own.
    tracking = Tracking(told, store_root=store.root, records=store.records, say=print)
    setting = Setting(store, Examiner(store, RECIPE), ClusterConfig(), [tracking])
    run = tracking.finish(realise(graph, Selection(), setting, run), None)
    client = MlflowClient(tracking_uri(recipe.tracking, store.root))
    if run.tracking_id is None:
        sys.exit("no record")
    experiment = client.get_run(run.tracking_id).info.experiment_id
    for one in client.search_runs([experiment]):
        print(one.info.status)

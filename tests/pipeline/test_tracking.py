"""What MLflow holds after a run with the embedded store, and what an outage does not do."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.entities import Run as MlflowRun
from mlflow.tracking import MlflowClient

from configs.parallel import ClusterConfig, StoreConfig, TrackingConfig
from configs.reading import load_recipe
from pipeline.embedded import schema_lock
from pipeline.graph import Selection, make_graph
from pipeline.lease import this_process
from pipeline.places import tracking_uri
from pipeline.plain import SMALL_BYTES, metric_name
from pipeline.records import Blocked, Run
from pipeline.runner import Setting, realise
from pipeline.states import Examiner
from pipeline.tracking import runs as runs_module
from pipeline.tracking.child import Child
from pipeline.tracking.listener import Tracking
from pipeline.tracking.runs import Told
from stages.artifacts import Corpus
from stages.contract import Workspace, stage
from tests.pipeline.fakes import RECIPE, FakeConfig, World, gather, made, outcomes

# MLflow's own use of SQLAlchemy and of protobuf is behind their deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture(autouse=True)
def _environment(mlflow_variables: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)


def tracked(
    world: World, config: TrackingConfig, *, chosen: Selection | None = None, **changes: object
) -> tuple[Run, Tracking]:
    """A run of the fake line that MLflow is told of."""
    recipe = load_recipe("smoke").model_copy(update={"tracking": config, "name": RECIPE})
    run, store = world.begin(), world.store
    store.prepare()
    graph = world.graph(**changes)
    told = Told(recipe, run, list(graph.nodes), f"ingot run {RECIPE}")
    tracking = Tracking(told, store_root=store.root, records=store.records, say=world.said.append)
    setting = Setting(store, Examiner(store, RECIPE), ClusterConfig(), [tracking])
    run = tracking.finish(realise(graph, chosen or Selection(), setting, run), None)
    store.records.save(run)
    return run, tracking


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


@pytest.fixture(scope="module")
def embedded(tmp_path_factory: pytest.TempPathFactory) -> tuple[World, Run, Run]:
    """Two runs of the line in one store: the first builds, the second reuses."""
    url = str(tmp_path_factory.mktemp("embedded") / "store")
    world = World(StoreConfig(url=url, min_free_bytes=0))
    config = TrackingConfig(timeout_seconds=30)
    first, _ = tracked(world, config)
    second, _ = tracked(world, config)
    assert world.said == []
    return world, first, second


@pytest.fixture(scope="module")
def client(embedded: tuple[World, Run, Run]) -> MlflowClient:
    return MlflowClient(tracking_uri(TrackingConfig(), embedded[0].store.root))


def child(client: MlflowClient, run: Run, node: str) -> MlflowRun:
    outcome = run.outcomes[node]
    assert not isinstance(outcome, Blocked) and outcome.tracking_id is not None
    return client.get_run(outcome.tracking_id)


def test_one_parent_holds_one_child_for_each_node(
    client: MlflowClient, embedded: tuple[World, Run, Run]
) -> None:
    _, first, second = embedded
    for run in (first, second):
        assert run.tracking_id is not None
        parent = client.get_run(run.tracking_id)
        assert parent.info.status == "FINISHED"
        assert parent.data.params["pretrain.steps"].isdigit()
        found = client.search_runs(
            [parent.info.experiment_id], f"tags.`mlflow.parentRunId` = '{run.tracking_id}'"
        )
        assert sorted(one.info.run_name for one in found) == sorted(run.outcomes)
        assert {one.info.status for one in found} == {"FINISHED"}


def leaves(value: object, path: str = "") -> Iterator[str]:
    """Dotted paths of all that is no table, or an empty one."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, f"{path}.{key}".removeprefix("."))
    else:
        yield path


def test_every_field_of_a_recipe_is_a_parameter_however_many_there_are(
    client: MlflowClient, embedded: tuple[World, Run, Run]
) -> None:
    params = client.get_run(str(embedded[1].tracking_id)).data.params
    wanted = {metric_name(path) for path in leaves(load_recipe("smoke").model_dump(mode="json"))}
    assert params.keys() == wanted
    # MLflow takes no more at a time.
    assert len(params) > 100


def test_each_step_is_there_once_under_a_name_without_slashes(
    client: MlflowClient, embedded: tuple[World, Run, Run]
) -> None:
    run = child(client, embedded[1], "train")
    history = client.get_metric_history(run.info.run_id, "curves/loss")
    assert [(one.step, one.value) for one in history] == [(k, 1 / k) for k in (1, 2, 3)]
    assert len(client.get_metric_history(run.info.run_id, "details/pass_at_1")) == 3
    assert run.data.params["steps"] == "3"


def test_what_a_build_says_of_its_making_is_a_tag(
    client: MlflowClient, embedded: tuple[World, Run, Run]
) -> None:
    assert child(client, embedded[1], "train").data.tags["ingot.fp8.products"] == "cpu: fake"


def test_the_machine_is_watched(client: MlflowClient, embedded: tuple[World, Run, Run]) -> None:
    metrics = child(client, embedded[1], "train").data.metrics
    assert "system/cpu_utilization_percentage" in metrics


def test_the_corpus_is_a_dataset_input(
    client: MlflowClient, embedded: tuple[World, Run, Run]
) -> None:
    inputs = child(client, embedded[1], "train").inputs
    assert inputs is not None
    (used,) = inputs.dataset_inputs
    content = made(embedded[1], "data").content
    assert (used.dataset.name, used.dataset.digest) == ("corpus", content[:36])


def test_plots_manifests_and_reports_are_artifacts_and_weights_are_not(
    client: MlflowClient, embedded: tuple[World, Run, Run]
) -> None:
    world, first, _ = embedded

    def files(node: str, folder: str | None = None) -> set[str]:
        listed = client.list_artifacts(child(client, first, node).info.run_id, folder)
        return {one.path for one in listed}

    assert files("train") == {"manifest.json", "metrics.jsonl", "plots"}
    assert files("train", "plots") >= {"plots/loss.png", "plots/expert_load.png"}
    told = {"report.json", "card.html", "plots.json", "plots"}
    assert files("judge") == {"manifest.json", *told}
    assert files("judge", "plots") == {"plots/before_after.png"}
    uploaded = world.store.root / "mlflow-artifacts"
    assert not list(uploaded.rglob("*.bin"))


def test_a_record_of_many_megabytes_stays_in_the_store(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    @stage(revision=1)
    def wordy(config: FakeConfig, work: Workspace) -> Corpus:
        for name, size in (("small.json", SMALL_BYTES - 1), ("large.json", SMALL_BYTES + 1)):
            work.path(name).write_bytes(b" " * size)
        return gather.run(config, work)

    graph = make_graph({"data": wordy(FakeConfig())}, world.store.hashes)
    monkeypatch.setattr(world, "graph", lambda: graph)
    config = TrackingConfig(timeout_seconds=30)
    run, _ = tracked(world, config)
    client = MlflowClient(tracking_uri(config, world.store.root))
    listed = client.list_artifacts(child(client, run, "data").info.run_id)
    assert {one.path for one in listed} & {"small.json", "large.json"} == {"small.json"}
    assert (world.files(run, "data") / "large.json").exists()


def test_checkpoints_are_external_models_that_point_to_the_store(
    client: MlflowClient, embedded: tuple[World, Run, Run]
) -> None:
    run = child(client, embedded[1], "train")
    (model,) = (
        one
        for one in client.search_logged_models([run.info.experiment_id])
        if one.source_run_id == run.info.run_id
    )
    address = made(embedded[1], "train").address
    assert (model.name, model.tags["ingot.artifact"]) == ("train", address)
    # Its loss is the last value of its run's curve.
    assert not model.metrics


def test_the_final_model_is_registered_with_an_alias_for_each_target(
    client: MlflowClient, embedded: tuple[World, Run, Run]
) -> None:
    for target in ("cuda", "ascend"):
        version = client.get_model_version_by_alias("ingot-fake", target)
        assert version.source is not None
        assert version.source.startswith("models:/m-")
        run = child(client, embedded[1], f"pack.{target}")
        assert version.run_id == run.info.run_id
    assert len(client.search_model_versions("name = 'ingot-fake'")) == 2


def test_a_reused_node_links_to_the_run_that_built_it(
    client: MlflowClient, embedded: tuple[World, Run, Run]
) -> None:
    _, first, second = embedded
    assert set(outcomes(second).values()) == {"reused"}
    tags = child(client, second, "train").data.tags
    built = made(first, "train").tracking_id
    assert built is not None
    assert tags["ingot.built_by"] == built
    assert built in tags["mlflow.note.content"]


def test_a_foreign_run_id_in_the_environment_is_ignored(
    embedded: tuple[World, Run, Run], tmp_path: Path
) -> None:
    world = World(StoreConfig(url=str(tmp_path / "s"), min_free_bytes=0))
    config = TrackingConfig(uri=tracking_uri(TrackingConfig(), embedded[0].store.root))
    run, _ = tracked(world, config, judge={"fails": True})
    assert "MLFLOW_RUN_ID" not in os.environ
    client = MlflowClient(config.uri)
    assert run.tracking_id is not None
    assert client.get_run(run.tracking_id).info.status == "FAILED"
    failed = child(client, run, "judge")
    assert failed.info.status == "FAILED"
    assert failed.data.tags["ingot.error"] == "judge was told to fail"


def test_what_a_killed_driver_left_running_is_marked_as_killed_by_the_next_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TrackingConfig(timeout_seconds=30)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    processes = {"killed": {**this_process(), "pid": gone.pid}, "alive": this_process()}
    left: dict[str, list[str]] = {}
    for name, process in processes.items():
        monkeypatch.setattr(runs_module, "this_process", lambda process=process: process)
        left[name] = _abandoned(world, config)
    monkeypatch.undo()
    run, _ = tracked(world, config)
    client = MlflowClient(tracking_uri(config, world.store.root))
    status = {one: client.get_run(one).info.status for ids in left.values() for one in ids}
    assert [status[one] for one in left["killed"]] == ["KILLED", "KILLED"]
    assert [status[one] for one in left["alive"]] == ["RUNNING", "RUNNING"]
    assert client.get_run(str(run.tracking_id)).info.status == "FINISHED"


def _abandoned(world: World, config: TrackingConfig) -> list[str]:
    """The parent and one child of a run that nobody finishes."""
    recipe = load_recipe("smoke").model_copy(update={"tracking": config, "name": RECIPE})
    run, root, records = world.begin(), world.store.root, world.store.records
    world.store.prepare()
    graph = world.graph()
    told = Told(recipe, run, list(graph.nodes), "ingot run")
    tracking = Tracking(told, store_root=root, records=records, say=world.said.append)
    one = tracking.begin(graph["data"], {})
    tracking._worker.unwatch(one)
    tracking._worker.stop(patience_seconds=30, limit_seconds=30)
    return [str(tracking._runs.parent), str(one.run_id)]


def test_a_short_outage_loses_neither_the_end_of_a_run_nor_a_registration(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, failures = TrackingConfig(timeout_seconds=30), ["create_model_version"]
    real = {name: getattr(MlflowClient, name) for name in ("set_terminated", *failures)}

    def once(name: str) -> object:
        def call(*args: object, **kwargs: object) -> object:
            if name not in failed:
                failed.append(name)
                raise ConnectionError(f"{name} was not answered")
            return real[name](*args, **kwargs)

        return call

    failed: list[str] = []
    for name in real:
        monkeypatch.setattr(MlflowClient, name, once(name))
    run, _ = tracked(world, config)
    assert sorted(failed) == sorted(real)
    assert len(world.said) == 1
    client = MlflowClient(tracking_uri(config, world.store.root))
    assert client.get_run(str(run.tracking_id)).info.status == "FINISHED"
    assert {child(client, run, node).info.status for node in run.outcomes} == {"FINISHED"}
    for target in ("cuda", "ascend"):
        assert client.get_model_version_by_alias("ingot-fake", target)
    assert len(client.search_model_versions("name = 'ingot-fake'")) == 2
    models = client.search_logged_models([client.get_run(str(run.tracking_id)).info.experiment_id])
    assert sorted(one.name for one in models) == ["pack-ascend", "pack-cuda", "train"]


def refusing() -> Iterator[str]:
    yield "http://127.0.0.1:9"


def silent() -> Iterator[str]:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(50)
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@pytest.mark.parametrize("server", [refusing, silent])
def test_a_server_that_is_down_warns_once_and_neither_fails_nor_stalls_the_run(
    store_config: StoreConfig, server: Callable[[], Iterator[str]]
) -> None:
    world = World(store_config)
    for uri in server():
        started = time.monotonic()
        run, _ = tracked(world, TrackingConfig(uri=uri, timeout_seconds=1))
        assert time.monotonic() - started < 10
    assert run.succeeded
    assert run.tracking_id is None
    (warning,) = world.said
    assert uri in warning
    assert "metrics.jsonl" in warning
    assert (world.files(run, "train").parent / "metrics.jsonl").exists()


def test_a_step_logged_twice_is_sent_once() -> None:
    class Still:
        def submit(self, job: object) -> None:
            """Nothing runs."""

    still: Any = Still()
    one = Child("train", still, lambda begun: pytest.fail("not opened"))
    one.log({"loss": 1.0, "flag": True, "text": "x"}, step=1)
    one.log({"loss": 2.0}, step=1)
    assert [(m.key, m.value, m.step) for m in one._pending] == [("curves/loss", 1.0, 1)]


def test_no_metric_name_is_the_folder_of_another() -> None:
    assert metric_name("fp8/weight_bytes") == "fp8.weight_bytes"
    assert metric_name("pass@1") == "pass_at_1"
    assert metric_name("größe %") == "größe _"


def test_the_schema_is_made_by_one_process_at_a_time(tmp_path: Path) -> None:
    uri, order = f"sqlite:///{tmp_path}/m.db", list[str]()
    with schema_lock(uri):
        thread = threading.Thread(target=lambda: _enter(uri, order))
        thread.start()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def _enter(uri: str, order: list[str]) -> None:
    with schema_lock(uri):
        order.append("second")

"""Runs as MLflow shows them: one parent a run, one child a node. The only page that knows MLflow.

Every call is made by one background thread in the order in which things happened. A server that
does not answer is reported once; its calls are then left out for a while and tried again, and what
a child has not yet sent goes with the next attempt. Nothing here can fail or hold up a run.
"""

import importlib
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import mlflow
from mlflow.entities import Dataset, DatasetInput, InputTag, LoggedModelOutput, Metric, Param
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS

from configs.parallel import TrackingConfig
from configs.recipe import Recipe
from pipeline.background import Background
from pipeline.embedded import (
    UI_PORT,
    artifact_location,
    move_in,
    schema_lock,
    set_environment,
)
from pipeline.graph import Node
from pipeline.lease import has_ended, this_process
from pipeline.places import SQLITE, tracking_uri
from pipeline.plain import (
    DIGEST_CHARS,
    KEY_CHARS,
    VALUE_CHARS,
    flatten,
    metric_name,
    seed_metrics,
    seed_table,
    small_files,
)
from pipeline.records import Blocked, Built, Failed, Records, Reused, Run
from pipeline.store import Committed
from stages.steps import METRICS, read_metrics, scalars

PROCESS_TAG = "ingot.process"
"""The driver of a run, by which a later one sees that it is gone."""
SEED_TABLE = "seeds.json"
_METRICS_A_BATCH, _PARAMS_A_BATCH = 1000, 100


class Tracking:
    """A listener that mirrors a run to MLflow."""

    def __init__(
        self,
        recipe: Recipe,
        run: Run,
        *,
        store_root: Path,
        records: Records,
        say: Callable[[str], None],
    ) -> None:
        """Record `run` of `recipe`; returns at once, whether or not the server is there."""
        self.config: TrackingConfig = recipe.tracking
        self.uri = tracking_uri(recipe.tracking, store_root)
        self._recipe, self._run, self._root = recipe, run, store_root
        self._records, self._say = records, say
        self._server = _Server(self.config, self.uri, store_root)
        self._worker = Background(self._warning, say)
        self._parent: str | None = None
        self._children: dict[str, Child] = {}
        self._models: dict[str, str] = {}
        self._versions: dict[str, str] = {}
        set_environment(self.config)
        self._worker.submit(self._parent_id)
        self._worker.submit(self._end_orphans)

    def begin(self, node: Node, inputs: Mapping[str, Committed]) -> "Child":
        """Open the child run of a node that is being built."""
        child = Child(self._worker, lambda: self._create_child(node, inputs, {}))
        self._children[node.name] = child
        child.open()
        return child

    def end(
        self, node: Node, outcome: Built | Reused | Failed | Blocked, made: Committed | None
    ) -> None:
        """Close a node's child run and show what was made; a reused node links to its builder."""
        match outcome:
            case Built():
                child = self._children[node.name]
                child.close("FINISHED")
                assert made is not None
                for show in (self._upload, self._show_figures, self._show_model, self._register):
                    self._worker.submit(partial(show, node, child, made), owed=True)
            case Reused():
                if node.name in self._children:
                    # Begun here, and then taken from a builder that was quicker.
                    self._children[node.name].fail("another builder was quicker", "KILLED")
                child = Child(self._worker, lambda: self._create_reused(node, outcome))
                self._children[node.name] = child
                child.open()
                child.close("FINISHED")
            case Failed() if node.name in self._children:
                status = "KILLED" if outcome.error == "interrupted" else "FAILED"
                self._children[node.name].fail(outcome.error, status)
            case Failed() | Blocked():
                pass

    def note(self, message: str) -> None:
        """Notes are for the user; MLflow keeps figures."""

    def finish(self, run: Run) -> Run:
        """Send what is left, as long as that gets on; returns `run` with its MLflow ids."""
        status = "FINISHED" if run.succeeded else "KILLED" if run.interrupted else "FAILED"
        if run.across_seeds:
            self._worker.submit(lambda: self._show_seeds(run), owed=True)
        self._worker.submit(lambda: self._finish_parent(run, status), owed=True)
        timeout = self.config.timeout_seconds
        self._worker.stop(patience_seconds=2 * timeout, limit_seconds=12 * timeout)
        nodes = {n: c.run_id for n, c in self._children.items() if c.run_id is not None}
        return run.with_tracking(self._parent, nodes)

    def link(self, run_id: str) -> str:
        """The page that shows a run; the embedded store has one once `ingot ui` serves it."""
        base = self.uri if self.uri.startswith("http") else f"http://127.0.0.1:{UI_PORT}"
        return f"{base.rstrip('/')}/#/experiments/{self._server.experiment_id}/runs/{run_id}"

    def _warning(self, why: str) -> str:
        return (
            f"warning: tracking.uri = {self.uri} does not record this run ({why}); the run goes "
            f"on, and the steps of training stay in {METRICS} beside each checkpoint"
        )

    # What follows runs on the background thread.

    def _parent_id(self) -> str:
        if self._parent is None:
            client = self._server.client()
            tags = {
                "ingot.run": self._run.id,
                "ingot.recipe": self._recipe.name,
                PROCESS_TAG: json.dumps(this_process()),
            }
            opened = client.create_run(
                self._server.experiment_id,
                run_name=f"{self._recipe.name} {self._run.id}",
                tags=tags,
            )
            self._parent = opened.info.run_id
            described = self._recipe.model_dump(mode="json")
            if seeds := self._run.invocation.seeds:
                described["seed"] = list(seeds)
            _log_params(client, self._parent, described)
            client.log_text(
                self._parent, json.dumps(described, indent=1, ensure_ascii=False), "recipe.json"
            )
        return self._parent

    def _end_orphans(self) -> None:
        """Mark as killed what a driver that died on this host left running in our own store."""
        if not self.uri.startswith(SQLITE):
            return
        client = self._server.client()
        experiment = [self._server.experiment_id]
        for run in client.search_runs(experiment, "attributes.status = 'RUNNING'"):
            process = run.data.tags.get(PROCESS_TAG)
            if process is not None and has_ended(json.loads(process)):
                client.set_terminated(run.info.run_id, "KILLED")

    def _create_child(
        self, node: Node, inputs: Mapping[str, Committed], tags: Mapping[str, str]
    ) -> tuple[MlflowClient, str]:
        parent, client = self._parent_id(), self._server.client()
        stage = node.planned.stage
        if node.seed is not None:
            tags = {"ingot.seed": str(node.seed), **tags}
        run = client.create_run(
            self._server.experiment_id,
            run_name=node.name,
            tags={
                "mlflow.parentRunId": parent,
                "ingot.node": node.name,
                "ingot.stage": f"{stage.name} revision {stage.revision}",
                "ingot.fingerprint": node.fingerprint,
                PROCESS_TAG: json.dumps(this_process()),
                **tags,
            },
        )
        run_id = run.info.run_id
        _log_params(client, run_id, node.planned.config.model_dump(mode="json"))
        if data := [one for one in inputs.values() if one.artifact.is_dataset]:
            client.log_inputs(run_id, [_dataset(one, stage.name) for one in data])
        return client, run_id

    def _create_reused(self, node: Node, outcome: Reused) -> tuple[MlflowClient, str]:
        tags = {"ingot.reused": "true", "ingot.artifact": outcome.address}
        if outcome.built_by is not None:
            tags["ingot.built_by_run"] = outcome.built_by
            built = self._built_in(node.name, outcome)
            if built is not None:
                tags["ingot.built_by"] = built
                tags["mlflow.note.content"] = f"Reused: built in [{built}]({self.link(built)})."
        return self._create_child(node, {}, tags)

    def _built_in(self, node: str, outcome: Reused) -> str | None:
        """The MLflow run of the build that is reused, if that run's record knows it."""
        path = self._records.folder / f"{outcome.built_by}.json"
        if not path.exists():
            return None
        for name, one in self._records.load(str(outcome.built_by)).outcomes.items():
            if isinstance(one, Built) and (name == node or one.address == outcome.address):
                return one.tracking_id
        return None

    # What shows an artifact bears being done again: each page stops at its first failure.

    def _upload(self, node: Node, child: "Child", made: Committed) -> None:
        """The small files of an artifact, and plots."""
        client, run_id, artifact = self._server.client(), child.id(), made.artifact
        for path in small_files(made):
            client.log_artifact(run_id, str(path))
        with tempfile.TemporaryDirectory() as folder:
            # With it comes the plotting library, which a run that builds nothing has no use for.
            report = importlib.import_module("pipeline.report")
            report.plot_steps(read_metrics(artifact.beside(METRICS)), Path(folder))
            report.plot_artifact(artifact.path(), Path(folder))
            client.log_artifacts(run_id, folder, "plots")

    def _show_figures(self, node: Node, child: "Child", made: Committed) -> None:
        """What was measured, at its own run and, unless it is one seed's, at the parent."""
        if measured := made.artifact.measured():
            for run_id in (child.id(), *([self._parent_id()] if node.seed is None else [])):
                _log_figures(self._server.client(), run_id, measured)

    def _show_model(self, node: Node, child: "Child", made: Committed) -> None:
        """A logged model that points to the store; no weight is uploaded."""
        if not made.artifact.is_model:
            return
        client, model_id = self._server.client(), self._model_id(node, child, made)
        for name, value in made.artifact.key_figures().items():
            # Not the step log's own name, in whose curve it would be one more point.
            key = metric_name(f"final_{name}")
            client.log_metric(child.id(), key, value, model_id=model_id)
        client.log_outputs(child.id(), [LoggedModelOutput(model_id, step=0)])

    def _model_id(self, node: Node, child: "Child", made: Committed) -> str:
        if node.name not in self._models:
            facts = flatten(made.artifact.facts())
            model = mlflow.create_external_model(
                name=node.name.replace(".", "-"),
                source_run_id=child.id(),
                params={key: value[:KEY_CHARS] for key, value in islice(facts.items(), 100)},
                tags={"ingot.artifact": made.address, "ingot.content": made.manifest.content},
                model_type=made.artifact.kind,
                experiment_id=self._server.experiment_id,
            )
            self._models[node.name] = str(model.model_id)
        return self._models[node.name]

    def _register(self, node: Node, child: "Child", made: Committed) -> None:
        """A new version of the registered model, to which the artifact's alias then points."""
        alias = made.artifact.alias()
        if alias is None:
            return
        client, name = self._server.client(), self.config.registered_model
        if node.name not in self._versions:
            try:
                client.create_registered_model(name)
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            model_id = self._model_id(node, child, made)
            version = client.create_model_version(
                name,
                f"models:/{model_id}",
                run_id=child.id(),
                tags={"ingot.artifact": made.address, "ingot.target": alias},
                await_creation_for=0,
                model_id=model_id,
            )
            self._versions[node.name] = version.version
        client.set_registered_model_alias(name, alias, self._versions[node.name])

    def _show_seeds(self, run: Run) -> None:
        """Mean and spread of each figure as metrics of the parent, and a table of all values."""
        client, parent = self._server.client(), self._parent_id()
        _log_figures(client, parent, seed_metrics(run.across_seeds))
        table = seed_table(run.across_seeds, run.invocation.seeds)
        client.log_dict(parent, table, SEED_TABLE)
        # Tells MLflow's pages that the file is a table. Its own call for tables appends to one that
        # is there, so that what is done again would be there twice.
        shown = json.dumps([{"path": SEED_TABLE, "type": "table"}])
        client.set_tag(parent, MLFLOW_LOGGED_ARTIFACTS, shown)

    def _finish_parent(self, run: Run, status: str) -> None:
        client, parent = self._server.client(), self._parent_id()
        for name, outcome in run.outcomes.items():
            client.set_tag(parent, f"ingot.outcome.{name}", outcome.outcome)
        client.set_terminated(parent, status)


class Child:
    """The tracker of one node: a child run, filled in the background."""

    def __init__(self, worker: Background, create: Callable[[], tuple[MlflowClient, str]]) -> None:
        """A child that `create` opens when the server can be reached."""
        self._worker, self._create = worker, create
        self._client: MlflowClient | None = None
        self.run_id: str | None = None
        self._pending: list[Metric] = []
        self._seen: set[int] = set()
        self._monitors: list[_Monitor] | None = None
        self._samples = 0

    def open(self) -> None:
        """Have the run created, and its machine watched from now on."""
        self._worker.submit(self.send)
        self._worker.watch(self)

    def start(self, *, steps: int, unit: str) -> None:
        """The number of steps is the terminal's business."""

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Record the scalars of one step; a step that was logged before is not logged again."""
        if step in self._seen:
            return
        self._seen.add(step)
        moment = _now_ms()
        self._pending += [
            Metric(metric_name(name), value, moment, step)
            for name, value in scalars(metrics).items()
        ]

    def note(self, message: str) -> None:
        """Notes are for the user."""

    def tag(self, name: str, value: str) -> None:
        """Mark the run."""
        key = metric_name(f"ingot.{name}")
        self._worker.submit(lambda: self._open().set_tag(self.id(), key, value[:5000]), owed=True)

    def close(self, status: str) -> None:
        """Send what is left and end the run."""
        self._worker.unwatch(self)
        self._worker.submit(self.sample)
        self._worker.submit(lambda: self._end(status), owed=True)

    def fail(self, error: str, status: str) -> None:
        """Keep the reason, then end the run."""
        self._worker.submit(
            lambda: self._open().set_tag(self.id(), "ingot.error", error[:5000]), owed=True
        )
        self.close(status)

    # What follows runs on the background thread.

    def id(self) -> str:
        """The run's id, which is created if it must be."""
        self._open()
        assert self.run_id is not None
        return self.run_id

    def _open(self) -> MlflowClient:
        if self._client is None:
            self._client, self.run_id = self._create()
        return self._client

    def sample(self) -> None:
        """Look at the machine."""
        if self._monitors is None:
            self._monitors = list(_monitors())
        moment = _now_ms()
        for monitor in self._monitors:
            monitor.collect_metrics()
            for name, value in monitor.aggregate_metrics().items():
                self._pending.append(Metric(f"system/{name}", value, moment, self._samples))
            monitor.clear_metrics()
        self._samples += 1

    def send(self) -> None:
        """Send what has come; what cannot be sent stays for the next time."""
        client, run_id = self._open(), self.id()
        while batch := self._pending[:_METRICS_A_BATCH]:
            client.log_batch(run_id, metrics=batch)
            del self._pending[: len(batch)]

    def _end(self, status: str) -> None:
        self.send()
        self._open().set_terminated(self.id(), status)


class _Server:
    """The MLflow store and our experiment in it, opened on first use."""

    def __init__(self, config: TrackingConfig, uri: str, store_root: Path) -> None:
        self._config, self._uri, self._root = config, uri, store_root
        self._client: MlflowClient | None = None
        self.experiment_id = "0"

    def client(self) -> MlflowClient:
        """The client, once its experiment is there."""
        if self._client is None:
            mlflow.set_tracking_uri(self._uri)
            with schema_lock(self._uri):
                move_in(self._uri, self._root)
                client = MlflowClient(tracking_uri=self._uri)
                self.experiment_id = self._experiment(client)
            self._client = client
        return self._client

    def _experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self._config.experiment)
        if found is not None:
            return str(found.experiment_id)
        embedded = self._uri.startswith(SQLITE)
        location = artifact_location(self._root) if embedded else None
        return str(client.create_experiment(self._config.experiment, artifact_location=location))


def make_schema(uri: str, store_root: Path) -> None:
    """Create or migrate an SQLite store, so that a server may start on it."""
    with schema_lock(uri):
        move_in(uri, store_root)
        MlflowClient(tracking_uri=uri).search_experiments(max_results=1)


class _Monitor(Protocol):
    """What MLflow's monitors do, with the types that they leave out."""

    def collect_metrics(self) -> None:
        """Read the counters."""

    def aggregate_metrics(self) -> dict[str, float]:
        """What was read, by name."""

    def clear_metrics(self) -> None:
        """Forget it."""


def _monitors() -> Iterator[_Monitor]:
    """What can be measured here: machines differ in the counters that they let one read."""
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        try:
            monitor: _Monitor = kind()
            monitor.collect_metrics()
        except Exception:
            continue
        yield monitor


def _log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    params = [
        Param(metric_name(key)[:KEY_CHARS], value[:VALUE_CHARS])
        for key, value in flatten(config).items()
    ]
    for start in range(0, len(params), _PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_BATCH])


def _log_figures(client: MlflowClient, run_id: str, figures: Mapping[str, float]) -> None:
    moment = _now_ms()
    metrics = [Metric(metric_name(name), value, moment, 0) for name, value in figures.items()]
    client.log_batch(run_id, metrics=metrics)


def _dataset(made: Committed, context: str) -> DatasetInput:
    source = json.dumps({"artifact": made.address})
    dataset = Dataset(
        name=made.manifest.kind,
        digest=made.manifest.content[:DIGEST_CHARS],
        source_type="local",
        source=source,
        profile=json.dumps(made.artifact.facts()),
    )
    return DatasetInput(dataset, [InputTag("mlflow.data.context", context)])


def _now_ms() -> int:
    return int(time.time() * 1000)

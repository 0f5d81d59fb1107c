"""The parent run of MLflow that shows an `ingot run`, and a child run for each of its nodes."""

import getpass
import json
import re
import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import (
    MLFLOW_GIT_COMMIT,
    MLFLOW_PARENT_RUN_ID,
    MLFLOW_RUN_NOTE,
    MLFLOW_SOURCE_NAME,
    MLFLOW_SOURCE_TYPE,
    MLFLOW_USER,
)

from configs.errors import StoreError
from configs.masking import masked_tree
from configs.recipe import Recipe
from pipeline import described
from pipeline.graph import Node
from pipeline.landing import ORDER, OUTCOME, RECIPE, REUSED, order, run_page
from pipeline.lease import has_ended, this_process
from pipeline.plain import DIGEST_CHARS, KEY_CHARS, VALUE_CHARS, clean, flatten, metric_name
from pipeline.records import Built, Records, Reused, Run
from pipeline.store import Committed
from pipeline.tracking.child import METRICS_A_BATCH, now_ms
from pipeline.tracking.server import Server

PROCESS_TAG = "ingot.process"
"""The driver of a run, by which a later one sees that it is gone."""
PAGE_FILE = "report.html"
_PARAMS_A_BATCH = 100


@dataclass(frozen=True, slots=True)
class Told:
    """What a run was asked for, as MLflow is told of it."""

    recipe: Recipe
    run: Run
    line: Sequence[str]
    """Names of the nodes, in the order of the line."""
    command: str
    """What repeats the run."""
    changed: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Settings that differ from the recipe's own, by dotted path: its value and the run's."""


class Runs:
    """The runs of MLflow that show one `ingot run`. Every call is made on the background thread."""

    def __init__(self, server: Server, told: Told, records: Records) -> None:
        """Nothing is created yet."""
        self._server, self._told, self._records = server, told, records
        self.parent: str | None = None

    def parent_id(self) -> str:
        """The parent's id, which is created if it must be. Its settings: `describe_parent`."""
        if self.parent is None:
            client, run, recipe = self._server.client(), self._told.run, self._told.recipe
            tags = {
                "ingot.run": run.id,
                MLFLOW_SOURCE_NAME: _without_folders(self._told.command),
                MLFLOW_RUN_NOTE: described.beginning(run, self._told.command, self._told.changed),
            }
            opened = client.create_run(
                self._server.experiment_id,
                run_name=f"{recipe.name} {run.id}",
                start_time=round(run.started * 1000),
                tags=_cleaned({**self._tags(0, "running"), **tags}),
            )
            self.parent = opened.info.run_id
        return self.parent

    def describe_parent(self) -> None:
        """The settings of the whole recipe, as parameters and as a file."""
        parent, client = self.parent_id(), self._server.client()
        settings = masked_tree(self._told.recipe.model_dump(mode="json"))
        if seeds := self._told.run.invocation.seeds:
            settings["seed"] = list(seeds)
        log_params(client, parent, settings)
        client.log_text(parent, json.dumps(settings, indent=1, ensure_ascii=False), "recipe.json")

    def end_orphans(self) -> None:
        """Mark as killed what a driver that died on this host left running."""
        client, experiment = self._server.client(), [self._server.experiment_id]
        for run in client.search_runs(experiment, "attributes.status = 'RUNNING'"):
            process = run.data.tags.get(PROCESS_TAG)
            if process is not None and has_ended(json.loads(process)):
                client.set_tag(run.info.run_id, OUTCOME, "killed")
                client.set_terminated(run.info.run_id, "KILLED")

    def create_child(
        self,
        node: Node,
        tags: Mapping[str, str],
        begun: int,
    ) -> tuple[MlflowClient, str]:
        """A child run of the node, without what `describe_child` adds.

        `begun` is when the node was, in milliseconds since the epoch.
        """
        parent, client = self.parent_id(), self._server.client()
        stage = node.planned.stage
        if node.seed is not None:
            tags = {"ingot.seed": str(node.seed), **tags}
        place = 1 + list(self._told.line).index(node.name)
        run = client.create_run(
            self._server.experiment_id,
            run_name=node.name,
            start_time=begun,
            tags=_cleaned(
                {
                    **self._tags(place, "building"),
                    MLFLOW_PARENT_RUN_ID: parent,
                    MLFLOW_SOURCE_NAME: stage.name,
                    "ingot.node": node.name,
                    "ingot.stage": f"{stage.name} revision {stage.revision}",
                    "ingot.fingerprint": node.fingerprint,
                    **tags,
                }
            ),
        )
        return client, str(run.info.run_id)

    def describe_child(self, run_id: str, node: Node, inputs: Mapping[str, Committed]) -> None:
        """The settings of a node, and the data that it is made of."""
        client = self._server.client()
        log_params(client, run_id, masked_tree(node.planned.config.model_dump(mode="json")))
        if data := [one for one in inputs.values() if one.artifact.is_dataset]:
            name = node.planned.stage.name
            client.log_inputs(run_id, [_dataset(one, name) for one in data])

    def create_reused(self, node: Node, outcome: Reused, begun: int) -> tuple[MlflowClient, str]:
        """A child run that says where the node was built."""
        built = self.built_in(node.name, outcome)
        page = None if built is None else self.page(built)
        tags = {
            OUTCOME: REUSED,
            "ingot.artifact": outcome.address,
            MLFLOW_RUN_NOTE: described.reused(outcome.address, page),
        }
        if outcome.built_by is not None:
            tags["ingot.built_by_run"] = outcome.built_by
        if built is not None:
            tags["ingot.built_by"] = built
        return self.create_child(node, tags, begun)

    def built_in(self, node: str, outcome: Reused) -> str | None:
        """The MLflow run of the build that is reused, if that run's record knows it."""
        try:
            record = self._records.load(str(outcome.built_by))
        except StoreError:
            # Gone, or damaged, which whoever reads all records tells.
            return None
        for name, one in record.outcomes.items():
            if isinstance(one, Built) and (name == node or one.address == outcome.address):
                return one.tracking_id
        return None

    def page(self, run_id: str) -> str:
        """The page of a run, as MLflow's own pages link it."""
        return run_page(self._server.experiment_id, run_id)

    def finish(self, run: Run, nodes: Mapping[str, str], status: str) -> None:
        """Say in the parent what became of every node, and end it."""
        client, parent = self._server.client(), self.parent_id()
        built = {
            name: self.page(page)
            for name, one in run.outcomes.items()
            if isinstance(one, Reused) and (page := self.built_in(name, one)) is not None
        }
        pages = {name: self.page(one) for name, one in nodes.items()}
        text = described.conclusion(run, self._told.command, self._told.changed, pages, built)
        client.set_tag(parent, MLFLOW_RUN_NOTE, clean(text))
        client.set_tag(parent, OUTCOME, described.outcome_word(run))
        client.set_terminated(parent, status)

    def show_page(self, page: Path) -> None:
        """The page of the whole run as a file of the parent."""
        with tempfile.TemporaryDirectory() as folder:
            named = shutil.copyfile(page, Path(folder, PAGE_FILE))
            self._server.client().log_artifact(self.parent_id(), str(named))

    def _tags(self, place: int, outcome: str) -> dict[str, str]:
        tags = {
            RECIPE: self._told.recipe.name,
            ORDER: order(self._told.run.started, place),
            OUTCOME: outcome,
            PROCESS_TAG: json.dumps(this_process()),
            MLFLOW_SOURCE_TYPE: "LOCAL",
        }
        with suppress(OSError, KeyError):
            tags[MLFLOW_USER] = getpass.getuser()
        if git := self._told.run.provenance.get("git"):
            tags[MLFLOW_GIT_COMMIT] = git["commit"]
            tags["ingot.uncommitted_changes"] = str(git["dirty"]).lower()
        return tags


def _without_folders(command: str) -> str:
    """A command as MLflow's pages show it: of what they take for a path only the last part."""
    return " ".join(re.sub(r"^(@?).*/", r"\1", word) for word in shlex.split(command))


def _cleaned(tags: Mapping[str, str]) -> dict[str, str]:
    return {key: clean(value) for key, value in tags.items()}


def log_params(client: MlflowClient, run_id: str, config: Mapping[str, Any]) -> None:
    """Record all settings, however many there are."""
    params = [
        Param(metric_name(key)[:KEY_CHARS], clean(value)[:VALUE_CHARS])
        for key, value in flatten(config).items()
    ]
    for start in range(0, len(params), _PARAMS_A_BATCH):
        client.log_batch(run_id, params=params[start : start + _PARAMS_A_BATCH])


def log_figures(client: MlflowClient, run_id: str, metrics: Mapping[str, float]) -> None:
    """Record what has one value, by the metric's name."""
    moment = now_ms()
    found = [Metric(key, value, moment, 0) for key, value in metrics.items()]
    for start in range(0, len(found), METRICS_A_BATCH):
        client.log_batch(run_id, metrics=found[start : start + METRICS_A_BATCH])


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

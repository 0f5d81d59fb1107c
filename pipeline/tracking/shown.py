"""What MLflow shows of an artifact: its figures, small files, plots and tables."""

import importlib
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS, MLFLOW_RUN_NOTE

from cluster.output import TRACE
from pipeline import described
from pipeline.plain import (
    figure_metrics,
    line_metrics,
    samples_table,
    small_files,
)
from pipeline.steplog import StepLog, fp8_table, log_to_send, read_log
from pipeline.store import Committed
from pipeline.tracking.runs import log_figures
from stages.manifest import LOGS
from stages.steps import METRICS

_TRACE_BYTES = 50_000_000
"""A trace from here on stays where it was written: sending it would hold up what follows."""

# Each bears being done again: it stops at its first failure.


def show(client: MlflowClient, run_id: str, made: Committed) -> None:
    """The figures of an artifact, its small files, tables and plots, and its step log.

    ArtifactError if what it wants shown of itself is nothing that can be.
    """
    for path in small_files(made):
        client.log_artifact(run_id, str(path))
    for trace in sorted(made.artifact.beside(LOGS).glob(f"*{TRACE}")):
        if trace.stat().st_size < _TRACE_BYTES:
            client.log_artifact(run_id, str(trace), "profile")
    log = read_log(made.artifact.beside(METRICS))
    _show_figures(client, run_id, made, log)
    _show_log(client, run_id, made, log)


def _show_log(client: MlflowClient, run_id: str, made: Committed, log: StepLog) -> None:
    tables = {"answers": samples_table(made.artifact.path(), log), "fp8": fp8_table(log)}
    for name, table in tables.items():
        if table is not None:
            log_table(client, run_id, f"tables/{name}.json", table)
    with tempfile.TemporaryDirectory() as folder:
        if sent := log_to_send(made.artifact.beside(METRICS), log, Path(folder)):
            path, told = sent
            client.log_artifact(run_id, str(path))
            client.set_tag(run_id, "ingot.step_log", told)
        # With it comes the plotting library, which a run that builds nothing has no use for.
        report = importlib.import_module("pipeline.report")
        report.plot_log(log, Path(folder, "plots"))
        report.plot_artifact(made.artifact.path(), Path(folder, "plots"))
        client.log_artifacts(run_id, str(Path(folder, "plots")), "plots")


def _show_figures(client: MlflowClient, run_id: str, made: Committed, log: StepLog) -> None:
    """What was measured; not what is the last value of a curve that is there."""
    figures = made.artifact.measured() or made.artifact.key_figures()
    shown = {name: value for name, value in figures.items() if name not in log.curves}
    there = {name.partition("/")[2] for name in client.get_run(run_id).data.metrics}
    metrics = figure_metrics(shown)
    new = {name: one for name, one in metrics.items() if name.partition("/")[2] not in there}
    if new:
        log_figures(client, run_id, new)


def show_in_parent(client: MlflowClient, parent: str, node: str, made: Committed) -> list[str]:
    """The node's figures in the run of the whole line; the names of its key ones."""
    key = made.artifact.key_figures()
    if figures := made.artifact.figures() | key:
        log_figures(client, parent, line_metrics(node, figures))
    return list(line_metrics(node, key))


def describe(
    client: MlflowClient, run_id: str, node: str, made: Committed, parent: str, resumed: str | None
) -> None:
    """The words of a node that was built; `resumed` is the build that it went on from."""
    size = sum(entry.bytes for entry in made.manifest.files.values())
    text = described.built(node, made.address, size, made.artifact.key_figures(), parent, resumed)
    client.set_tag(run_id, MLFLOW_RUN_NOTE, text)


def log_table(client: MlflowClient, run_id: str, name: str, table: Mapping[str, Any]) -> None:
    """A file that MLflow's pages show as a table: `columns`, and `data` by row.

    MLflow's own call for tables appends to one that is there, so that what is done again would be
    there twice.
    """
    client.log_dict(run_id, dict(table), name)
    tagged = client.get_run(run_id).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]")
    entry = {"path": name, "type": "table"}
    shown = [one for one in json.loads(tagged) if one != entry]
    client.set_tag(run_id, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*shown, entry]))

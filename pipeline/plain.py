"""What a run and its artifacts are, in the flat names and short values that MLflow takes."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.records import AcrossSeeds
from pipeline.steplog import LOG_BYTES, StepLog
from pipeline.store import Committed
from stages.manifest import MANIFEST
from stages.samples import as_table, read_samples
from stages.steps import METRICS

VALUE_CHARS, KEY_CHARS, DIGEST_CHARS = 6000, 250, 36
SMALL_BYTES = 5_000_000
"""Files of an artifact above this are referred to, never uploaded."""


def metric_name(name: str) -> str:
    """A name that MLflow takes, without slashes: a name may not be the folder of another."""
    return re.sub(r"[^\w.\- :]", "_", name.replace("@", "_at_").replace("/", "."))


def flatten(value: object, path: str = "") -> dict[str, str]:
    """Leaves of nested tables as text, by dotted path."""
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= flatten(inner, f"{path}.{key}" if path else str(key))
        return found
    return {path: value if isinstance(value, str) else json.dumps(value)} if path else {}


def seed_metrics(found: Sequence[AcrossSeeds]) -> dict[str, float]:
    """Mean, spread and number of seeds of each figure, as `evaluate.after_pass_at_1.mean`."""
    metrics: dict[str, float] = {}
    for one in found:
        name = f"{one.node}.{one.figure}"
        metrics[f"{name}.mean"] = one.mean
        if one.spread is not None:
            metrics[f"{name}.spread"] = one.spread
        metrics[f"{name}.seeds"] = len(one.values)
    return metrics


def seed_table(found: Sequence[AcrossSeeds], seeds: Sequence[int]) -> dict[str, list[Any]]:
    """One row a figure, one column a seed, in the form of MLflow's tables; gaps are null."""
    columns = ["node", "figure", "mean", "spread", *(f"seed {seed}" for seed in seeds)]
    rows = [
        [one.node, one.figure, one.mean, one.spread, *(one.values.get(seed) for seed in seeds)]
        for one in found
    ]
    return {"columns": columns, "data": rows}


def samples_table(folder: Path, log: StepLog) -> dict[str, list[Any]] | None:
    """Some of a model's answers, one a row, in the form of MLflow's tables; none without any.

    They are those that an artifact's `folder` has, or else those of its step log.
    """
    return as_table(read_samples(folder) or log.samples)


def small_files(made: Committed) -> Sequence[Path]:
    """The manifest, the step log, and the records and reports on the artifact's ground floor.

    In place of a large step log, see `log_to_send` in `pipeline/steplog.py`.
    """
    log = made.artifact.beside(METRICS)
    paths = [made.path / MANIFEST]
    paths += [log] if log.is_file() and log.stat().st_size <= LOG_BYTES else []
    paths += [
        made.artifact.path(name)
        for name, entry in made.manifest.files.items()
        if name.endswith((".json", ".md")) and "/" not in name and entry.bytes < SMALL_BYTES
    ]
    return [path for path in paths if path.is_file()]

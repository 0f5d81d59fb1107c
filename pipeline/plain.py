"""What a run and its artifacts are, in the flat names and short values that MLflow takes."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.records import AcrossSeeds
from pipeline.steplog import StepLog
from pipeline.store import Committed
from stages.manifest import MANIFEST
from stages.samples import as_table, read_samples
from stages.steps import KEY_CURVES, scalars

VALUE_CHARS, KEY_CHARS, DIGEST_CHARS = 6000, 250, 36
SMALL_BYTES = 5_000_000
"""Files of an artifact above this are referred to, never uploaded."""
CURVES, DETAILS, FIGURES, BOUNDS, SEEDS = "curves", "details", "figures", "intervals", "seeds"
"""What stands before the one slash of a metric's name. MLflow shows a section for each, in the
order of the alphabet: so the curves that tell most come first, the machine's (`system`) last."""
_MOST_PARTS = 8
_IS_BOUND = ("_low", "_high")


def metric_name(name: str) -> str:
    """A name that MLflow takes, without slashes: one is for the section."""
    return re.sub(r"[^\w.\- :]", "_", name.replace("@", "_at_").replace("/", "."))


def clean(text: str) -> str:
    """Text that every database takes: PostgreSQL takes no NUL."""
    return text.replace("\0", "\\0")


def step_metrics(record: Mapping[str, object]) -> dict[str, float]:
    """What MLflow is told of one step, by the metric's name.

    What is measured of each of many parts (`fp8_flushed/ROLE`) would be as many charts: it stands
    in the step log, and is shown as a table and a plot.
    """
    numbers = {name: value for name, value in scalars(record).items() if name != "step"}
    parts = Counter(name.partition("/")[0] for name in numbers if "/" in name)
    return {
        f"{CURVES if _base(name) in KEY_CURVES else DETAILS}/{metric_name(name)}": value
        for name, value in numbers.items()
        if parts[_base(name)] <= _MOST_PARTS
    }


def _base(name: str) -> str:
    return name.partition("/")[0]


def figure_metrics(figures: Mapping[str, float]) -> dict[str, float]:
    """Figures of a node's own run, by the metric's name."""
    return {
        f"{BOUNDS if name.endswith(_IS_BOUND) else FIGURES}/{metric_name(name)}": value
        for name, value in figures.items()
    }


def line_metrics(node: str, figures: Mapping[str, float]) -> dict[str, float]:
    """Figures as the run of the whole line has them: `evaluate/after_pass_at_1`."""
    return {f"{metric_name(node)}/{metric_name(name)}": v for name, v in figures.items()}


def flatten(value: object, path: str = "") -> dict[str, str]:
    """Leaves of nested tables as text, by dotted path."""
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= flatten(inner, f"{path}.{key}" if path else str(key))
        return found
    return {path: value if isinstance(value, str) else json.dumps(value)} if path else {}


def seed_metrics(found: Sequence[AcrossSeeds]) -> dict[str, float]:
    """Mean, spread and number of seeds of each figure: `seeds/evaluate.after_pass_at_1.mean`."""
    metrics: dict[str, float] = {}
    for one in found:
        name = f"{SEEDS}/{metric_name(f'{one.node}.{one.figure}')}"
        metrics[f"{name}.mean"] = one.mean
        if one.spread is not None:
            metrics[f"{name}.spread"] = one.spread
        metrics[f"{name}.count"] = len(one.values)
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
    """The manifest, and the records and reports on the artifact's ground floor."""
    paths = [made.path / MANIFEST]
    paths += [
        made.artifact.path(name)
        for name, entry in made.manifest.files.items()
        if name.endswith((".json", ".md", ".html"))
        and "/" not in name
        and entry.bytes < SMALL_BYTES
    ]
    return [path for path in paths if path.is_file()]

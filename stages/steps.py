"""The step log as it is read: one JSON line a step (see `stages/telemetry.py`, which writes it)."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic_core import from_json

METRICS = "metrics.jsonl"
KEY_CURVES = (
    *("loss", "held_out_loss", "reward", "held_out_pass_at_1", "held_out_greedy_accuracy"),
    "tokens_per_second",
)
"""What tells most of how a training goes, where it is measured: shown before all else."""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a step log; a line cut short by a crash is left out."""
    return list(each_step(path))


def each_step(path: Path) -> Iterator[dict[str, Any]]:
    """The same lines one by one: a long log is never in memory as a whole."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        for line in file:
            if line.endswith(b"\n"):
                yield from_json(line)


def scalars(record: Mapping[str, object]) -> dict[str, float]:
    """The entries of a step's record that are plain numbers."""
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def computed(records: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What workers said, the last time they began, of what they compute on and with."""
    told = {name: tag for record in records for name, tag in record.get("tags", {}).items()}
    names = {"device": "device", "compute": "compute", "products": "fp8.products"}
    # After a colon follows why, in words that may change.
    return {name: told[tag].partition(":")[0] for name, tag in names.items() if tag in told}

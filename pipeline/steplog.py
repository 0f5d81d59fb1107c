"""A step log read once, as what pictures, tables and pages need of it: bounded, however long it is.

Each step's line carries every expert's load and, where FP8 is watched, figures of each part of the
model: 20,000 steps are a hundred megabytes. What is kept here are the curves of plain numbers, and
of the rest as much as can be shown.
"""

import json
import math
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from statistics import median
from typing import Any, Generic, TypeVar

from stages.samples import ENTRY, MAX_SAMPLES, Sample, read_entry
from stages.steps import METRICS, each_step, scalars
from stages.telemetry import is_held_out

EXPERT_LOAD = "expert_load"
"""The record entry with each layer's shares of tokens by expert: [layers][experts]."""
FP8 = "fp8_"
"""Begins the names of what FP8 did; `fp8_flushed/PART` is that of one part of the model."""
COLUMNS = 400
"""As many points, or columns of a heat map, as a picture can show side by side."""
LOG_BYTES = 5_000_000
"""A step log above this is thinned before it is sent anywhere."""
THINNED = "metrics-thinned.jsonl"
_MEASURED_BYTES = LOG_BYTES // 5

T = TypeVar("T")


class Evenly(Generic[T]):
    """Every n-th of a stream whose length is not known, with both ends; n doubles as it grows."""

    def __init__(self, limit: int, size: Callable[[T], int] = lambda item: 1) -> None:
        """Keep items of a `size` of at most `limit` together, but for the last."""
        self._limit, self._size = limit, size
        self._every, self._seen, self._held = 1, 0, 0
        self._kept: list[T] = []
        self._last: list[T] = []

    def add(self, item: T) -> None:
        """One more, the last so far."""
        if self._seen % self._every == 0:
            self._kept.append(item)
            self._held += self._size(item)
            while self._held > self._limit and len(self._kept) > 1:
                self._kept, self._every = self._kept[::2], 2 * self._every
                self._held = sum(map(self._size, self._kept))
        self._seen += 1
        self._last = [item]

    def items(self) -> list[T]:
        """Those that are kept, in their order."""
        ends_with_last = (self._seen - 1) % self._every == 0
        return self._kept + ([] if ends_with_last else self._last)

    @property
    def is_whole(self) -> bool:
        """Whether nothing was left out."""
        return self._every == 1


@dataclass(slots=True)
class Points:
    """The finite values of one figure, by step."""

    steps: "array[float]" = field(default_factory=lambda: array("d"))
    values: "array[float]" = field(default_factory=lambda: array("d"))
    is_of_part: bool = False
    """Whether it says what FP8 did to one part of the model."""

    def thinned(self, columns: int = COLUMNS) -> tuple[list[float], list[float]]:
        """At most two points a column, its lowest and its highest, and both ends of the whole.

        So a spike of one step is seen, however long the training was.
        """
        count = len(self.values)
        if count <= 2 * columns:
            return list(self.steps), list(self.values)
        chosen = {0, count - 1}
        for column in range(columns):
            inside = range(column * count // columns, (column + 1) * count // columns)
            chosen |= {min(inside, key=self.values.__getitem__)}
            chosen |= {max(inside, key=self.values.__getitem__)}
        places = sorted(chosen)
        return [self.steps[i] for i in places], [self.values[i] for i in places]


@dataclass(frozen=True, slots=True)
class StepLog:
    """What a step log comes to."""

    curves: Mapping[str, Points]
    """By the name of the figure, in the order in which they come."""
    loads: Sequence[tuple[int, Sequence[Sequence[float]]]]
    """Steps and their expert load, at most about `COLUMNS`, evenly chosen."""
    lines: Sequence[Mapping[str, float]]
    """The log with plain numbers alone, at most `LOG_BYTES` as JSON, evenly chosen."""
    samples: Sequence[Sample]
    """Answers that were drawn during the training, at most about `MAX_SAMPLES`, evenly chosen."""
    steps: int
    """Lines of the whole log."""


def read_log(path: Path) -> StepLog:
    """The step log in the file `path`; an empty one if there is none."""
    return collect(each_step(path))


def collect(records: Iterable[Mapping[str, Any]]) -> StepLog:
    """What these records of a step log come to; they are gone through once."""
    curves: dict[str, Points] = {}
    loads: Evenly[tuple[int, Sequence[Sequence[float]]]] = Evenly(COLUMNS)
    # What was measured on held-out data is rare, and would seldom be among every n-th.
    measured: Evenly[dict[str, float]] = Evenly(_MEASURED_BYTES, _line_bytes)
    others: Evenly[dict[str, float]] = Evenly(LOG_BYTES - _MEASURED_BYTES, _line_bytes)
    samples: Evenly[Sample] = Evenly(MAX_SAMPLES)
    count = 0
    for record in records:
        count += 1
        plain: dict[str, float] = {}
        for name, value in scalars(record).items():
            if name not in curves:
                curves[name] = Points(is_of_part=name.startswith(FP8) and "/" in name)
            if math.isfinite(value):
                curves[name].steps.append(record["step"])
                curves[name].values.append(value)
            if not curves[name].is_of_part:
                plain[name] = value
        plain["step"] = record["step"]
        if record.get(EXPERT_LOAD):
            loads.add((record["step"], record[EXPERT_LOAD]))
        # A number of that name is a figure, and shown as others are.
        if isinstance(entry := record.get(ENTRY), list):
            for sample in read_entry(record["step"], entry):
                samples.add(sample)
        (measured if any(map(is_held_out, plain)) else others).add(plain)
    chosen = sorted([*measured.items(), *others.items()], key=itemgetter("step"))
    shown = {name: points for name, points in curves.items() if name != "step" and points.values}
    return StepLog(shown, loads.items(), chosen, samples.items(), count)


def log_to_send(path: Path, log: StepLog, into: Path) -> tuple[Path, str] | None:
    """The file that shows the step log `path`, read as `log`, and in one sentence what it holds.

    Up to `LOG_BYTES` the log itself; a longer one is written thinned into the folder `into`, under
    a name that says so. None without a log.
    """
    if not path.is_file():
        return None
    if path.stat().st_size <= LOG_BYTES:
        return path, f"{METRICS} is the whole step log."
    sent = into / THINNED
    into.mkdir(parents=True, exist_ok=True)
    with sent.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in log.lines)
    return sent, (
        f"{THINNED} holds {len(log.lines):,} of the step log's {log.steps:,} lines, evenly chosen "
        "with both ends, and of each its plain numbers alone, without those of single parts of the "
        f"model; the whole log of {path.stat().st_size:,} bytes lies in {path}"
    )


def fp8_table(log: StepLog) -> dict[str, list[Any]] | None:
    """What FP8 did to each part of the model, in the form of MLflow's tables; none if unwatched.

    Shares of values clipped and flushed to zero, log2 of the smallest and largest scale.
    """
    rows = []
    for name, points in sorted(log.curves.items(), key=lambda item: _part_first(item[0])):
        if points.is_of_part:
            figure, _, part = name.removeprefix(FP8).partition("/")
            values = points.values
            ends = [values[0], median(values), values[-1], min(values), max(values)]
            rows.append([part, figure, *ends])
    columns = ["part", "figure", "first", "median", "last", "lowest", "highest"]
    return {"columns": columns, "data": rows} if rows else None


def grouped(names: Iterable[str]) -> list[list[str]]:
    """Names that differ only after a slash, together."""
    ordered = sorted(names, key=_before_slash)
    return [list(group) for _, group in groupby(ordered, key=_before_slash)]


def _before_slash(name: str) -> str:
    return name.partition("/")[0]


def _part_first(name: str) -> tuple[str, str]:
    figure, _, part = name.partition("/")
    return part, figure


def _line_bytes(line: Mapping[str, float]) -> int:
    """No fewer than the line has as JSON: a number has 24 digits and signs at most."""
    return 30 * len(line) + sum(map(len, line))

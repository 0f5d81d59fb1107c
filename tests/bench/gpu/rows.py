"""What the benchmark on a GPU finds: rows of one table, each a figure or why there is none."""

import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.bench.gpu.setting import Setting

FAILED = "failed: "
"""Begins the reason of what could not be done; one must not lose the others."""
SKIPPED = "not measured: "
"""Begins the reason of what this machine or the time that was left does not allow."""
ROOT = Path(__file__).resolve().parents[3]
FLOORS = tuple(f"{ROOT / floor}/" for floor in ("configs", "model", "cluster", "stages"))

Figure = float | str
"""A number, or why there is none."""


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    by: str
    figure: Figure
    unit: str = ""
    most: float | None = None
    """A figure above it is a fault of what was measured."""
    ratio: Figure = ""
    """To what `of` names."""
    of: str = ""
    more: Mapping[str, Figure] = field(default_factory=dict)
    """Other figures, by name."""
    note: str = ""

    @property
    def is_fault(self) -> bool:
        """Whether something that is there could not be done, or was done wrongly."""
        if isinstance(self.figure, str):
            return self.figure.startswith(FAILED)
        return self.most is not None and not self.figure <= self.most


HEAD = ("part", "what", "by", "figure", "unit", "ratio", "to", "also")
RULE = "|---|---|---|--:|---|--:|---|---|"


def line(part: str, row: Row) -> str:
    """A row in Markdown."""
    figure = cell(row.figure)
    if row.is_fault and row.most is not None and not isinstance(row.figure, str):
        figure += f", above {cell(row.most)}"
    also = [f"{name} {cell(one)}" for name, one in row.more.items()]
    also += [row.note] if row.note else []
    # What a ratio is to means nothing without the ratio.
    to = "" if row.ratio == "" else row.of
    return cells(part, row.what, row.by, figure, row.unit, cell(row.ratio), to, "; ".join(also))


def cells(*texts: str) -> str:
    """One line of the table; bars within a cell would end it."""
    return "| " + " | ".join(text.replace("|", "/").replace("\n", " ") for text in texts) + " |"


def cell(figure: Figure) -> str:
    """A number to three or four digits, or why there is none."""
    if isinstance(figure, str):
        return figure
    size = abs(figure)
    if figure == round(figure) and size < 1e6:
        return f"{figure:,.0f}"
    if size >= 1000:
        return f"{figure:,.0f}"
    return f"{figure:.4g}" if size >= 1 else f"{figure:.3g}"


def as_json(row: Row) -> dict[str, Any]:
    """A row for records, with whether it is a fault."""
    return asdict(row) | {"more": dict(row.more), "fault": row.is_fault}


def from_json(told: Mapping[str, Any]) -> Row:
    """The row that `as_json` made this of."""
    return Row(**{name: one for name, one in told.items() if name != "fault"})


def share(part: Figure, whole: Figure) -> Figure:
    """part / whole, or the reason of the one that is none."""
    if isinstance(part, str):
        return part
    return whole if isinstance(whole, str) else part / whole


def ratio(part: Figure, whole: Figure) -> Figure:
    """part / whole for a cell beside the figure, where a reason stands already: then nothing."""
    found = share(part, whole)
    return "" if isinstance(found, str) else found


def why(error: BaseException) -> str:
    """An exception's first line and the innermost line of the project, short enough for a cell."""
    text = str(error).strip() or type(error).__name__
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(FLOORS)]
    place = ""
    if frames:
        place = f" at {Path(frames[-1].filename).relative_to(ROOT)}:{frames[-1].lineno}"
    return f"{FAILED}{text.splitlines()[0][:160]}{place}"


def attempted(
    setting: Setting,
    what: str,
    by: str,
    measure: Callable[..., Iterable[Row]],
    *arguments: Any,
) -> Iterator[Row]:
    """The rows that `measure(setting, *arguments)` gives.

    Where it breaks off or has no time, one with the reason.
    """
    if setting.left() <= 0:
        yield Row(what, by, f"{SKIPPED}no time left")
        return
    try:
        yield from measure(setting, *arguments)
    except Exception as error:
        yield Row(what, by, why(error))
    finally:
        setting.tidy()

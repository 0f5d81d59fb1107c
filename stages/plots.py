"""Plots as data: what an artifact wants drawn of itself stands in its file `plots.json`.

Whoever shows artifacts draws them; a stage needs no plotting library.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from configs.base import Frozen
from configs.errors import ArtifactError
from configs.explain import first_fault

PLOTS = "plots.json"


class Curve(Frozen):
    """One line of values; with `low` and `high`, of the same length, a band around it."""

    label: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    is_wide: bool = False
    """Drawn wide and pale, for a curve that another may hide."""


class Lines(Frozen):
    """A panel of curves over one axis."""

    type: Literal["lines"] = "lines"
    title: str
    x_label: str
    y_label: str = ""
    curves: tuple[Curve, ...]
    levels: dict[str, float] = Field(default_factory=dict)
    """Dashed lines across, by what they mean; levels of opposite values share one entry's name."""
    shaded: tuple[float, float] | None = None
    """From where to where on the x axis the title speaks of."""
    reach: float | None = Field(default=None, gt=0)
    """How far the y axis goes to either side of 0; none lets the curves decide."""


class Bar(Frozen):
    """One value, with its interval if it has one."""

    value: float
    low: float | None = None
    high: float | None = None


class Bars(Frozen):
    """A panel of bars side by side, by what they are."""

    type: Literal["bars"] = "bars"
    title: str
    bars: dict[str, Bar] = Field(min_length=1)


Panel = Annotated[Lines | Bars, Field(discriminator="type")]


class Plot(Frozen):
    """One picture: panels beside one another, or one above the other."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]+$")
    """Names its file."""
    panels: tuple[Panel, ...] = Field(min_length=1)
    is_stacked: bool = False


_PLOTS = TypeAdapter(tuple[Plot, ...])


def write_plots(folder: Path, *plots: Plot) -> None:
    """Write `plots.json` into the artifact to be."""
    (folder / PLOTS).write_bytes(_PLOTS.dump_json(plots, indent=1) + b"\n")


def read_plots(folder: Path) -> tuple[Plot, ...]:
    """The plots of an artifact's folder; none without the file. ArtifactError if it is no such."""
    path = folder / PLOTS
    try:
        return _PLOTS.validate_json(path.read_bytes())
    except FileNotFoundError:
        return ()
    except ValidationError as error:
        raise ArtifactError(
            f"{path}: not plots that can be drawn ({first_fault(error)}); mend the stage that "
            "wrote it"
        ) from None

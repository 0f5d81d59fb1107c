"""Plots of a build's step log, and those that an artifact describes, as PNG files.

The plotting library's global state is never touched, so that a background thread may draw.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from stages.plots import Bars, Lines, Plot, read_plots
from stages.steps import scalars

EXPERT_LOAD = "expert_load"
"""The record entry that the heat map shows: shares of tokens, [layers][experts]."""
_TOGETHER = ("loss", "mtp_loss")
"""Curves that share one plot, as do those of one name for many roles: `fp8_flushed/ROLE`."""


def plot_steps(records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """One plot for each scalar of a step log, and the expert load of each layer as a heat map."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(n for record in records for n in scalars(record) if n != "step")
    paths = [_plot_curves(records, group, folder) for group in _groups(list(names))]
    loads = [(r["step"], r[EXPERT_LOAD]) for r in records if r.get(EXPERT_LOAD)]
    return [*paths, *_plot_load(loads, folder)] if loads else paths


def plot_artifact(folder: Path, into: Path) -> list[Path]:
    """The plots that an artifact's `plots.json` describes, if it has any."""
    into.mkdir(parents=True, exist_ok=True)
    return [_draw(plot, into) for plot in read_plots(folder)]


def _draw(plot: Plot, into: Path) -> Path:
    count = len(plot.panels)
    size = (8, 3.25 * count) if plot.is_stacked else (3.2 * count, 3.6)
    if not plot.is_stacked and isinstance(plot.panels[0], Lines):
        size = (7 * count, 4)
    figure = Figure(figsize=size, layout="constrained")
    for axes, panel in zip(_grid(figure, count, stacked=plot.is_stacked), plot.panels, strict=True):
        axes.set_title(panel.title)
        match panel:
            case Lines():
                _draw_lines(axes, panel)
            case Bars():
                _draw_bars(axes, panel)
    return _save(figure, into / f"{plot.name}.png")


def _draw_lines(axes: Axes, panel: Lines) -> None:
    for number, curve in enumerate(panel.curves):
        # The wide one pale, another on it thin and dark: where they agree, both are seen.
        colour = "#e8a33d" if curve.is_wide else f"C{number % 10}"
        if curve.low and curve.high:
            axes.fill_between(curve.x, curve.low, curve.high, color=colour, alpha=0.3, lw=0)
        width = 5.0 if curve.is_wide else 1.5
        axes.plot(curve.x, curve.y, color=colour, lw=width, label=curve.label)
    for label, value in panel.levels.items():
        axes.axhline(value, color="black", ls="--", lw=1, label=label)
    if panel.shaded is not None:
        axes.axvspan(*panel.shaded, color="grey", alpha=0.15, lw=0)
    if panel.reach is not None:
        axes.axhline(0, color="black", lw=0.5)
        axes.set_ylim(-panel.reach, panel.reach)
    axes.grid(alpha=0.3)
    axes.margins(x=0)
    axes.set_xlabel(panel.x_label)
    axes.set_ylabel(panel.y_label)
    axes.legend(fontsize="small", loc="best", ncols=1 + len(panel.curves) // 4)


def _draw_bars(axes: Axes, panel: Bars) -> None:
    shown = list(panel.bars.values())
    errors = None
    if all(bar.low is not None and bar.high is not None for bar in shown):
        low = [max(0.0, bar.value - (bar.low or 0.0)) for bar in shown]
        high = [max(0.0, (bar.high or 0.0) - bar.value) for bar in shown]
        errors = [low, high]
    colours = ["#9aa5b1", *["#2f6f9f"] * (len(shown) - 1)]
    values = [bar.value for bar in shown]
    bars = axes.bar(list(panel.bars), values, yerr=errors, capsize=4, color=colours)
    axes.bar_label(bars, fmt="%.3g", padding=2)
    axes.margins(y=0.15)
    axes.tick_params(axis="x", rotation=30 if len(shown) > 2 else 0)


def _groups(names: list[str]) -> Iterator[list[str]]:
    if together := [name for name in _TOGETHER if name in names]:
        yield together
    by_first: dict[str, list[str]] = {}
    for name in names:
        if name not in _TOGETHER:
            by_first.setdefault(name.partition("/")[0], []).append(name)
    yield from by_first.values()


def _plot_curves(records: Sequence[Mapping[str, Any]], names: list[str], folder: Path) -> Path:
    shared, _, role = names[0].partition("/")
    figure = Figure(figsize=(10, 4.5) if role else (7, 4), layout="constrained")
    axes = figure.add_subplot()
    for number, name in enumerate(names):
        points = [(r["step"], scalars(r)[name]) for r in records if name in scalars(r)]
        kept = [(step, value) for step, value in points if math.isfinite(value)]
        marker = "o" if len(kept) < 20 else ""
        axes.plot(
            [p[0] for p in kept],
            [p[1] for p in kept],
            label=(name.partition("/")[2] or name).replace("_", " "),
            marker=marker,
            # Ten colours come again from the eleventh curve on.
            linestyle=("-", "--", ":", "-.")[number // 10 % 4],
        )
    axes.set_xlabel("step")
    axes.set_title(", ".join([shared] if role else names).replace("_", " "))
    axes.grid(alpha=0.3)
    if len(names) > 1:
        axes.legend(
            **(
                {"fontsize": "x-small", "loc": "upper left", "bbox_to_anchor": (1, 1)}
                if role
                else {}
            )
        )
    return _save(figure, folder / f"{shared}.png")


def _plot_load(loads: Sequence[tuple[int, Sequence[Sequence[float]]]], folder: Path) -> list[Path]:
    """Steps to the right, experts upwards, one row of the figure for each layer."""
    layers = len(loads[-1][1])
    figure = Figure(figsize=(8, 1.2 + 1.8 * layers), layout="constrained")
    steps = [step for step, _ in loads]
    peak = max(max(layer) for _, load in loads for layer in load)
    for number, axes in enumerate(_grid(figure, layers, stacked=True)):
        image = axes.imshow(
            [list(column) for column in zip(*(load[number] for _, load in loads), strict=True)],
            aspect="auto",
            origin="lower",
            vmin=0,
            vmax=peak,
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(loads[-1][1][number]) - 0.5),
        )
        axes.set_ylabel(f"layer {number}\nexpert")
        if number == layers - 1:
            axes.set_xlabel("step")
            figure.colorbar(image, ax=figure.axes[:layers], label="share of tokens")
    return [_save(figure, folder / f"{EXPERT_LOAD}.png")]


def _grid(figure: Figure, count: int, *, stacked: bool = False) -> list[Axes]:
    rows, columns = (count, 1) if stacked else (1, count)
    return [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return path

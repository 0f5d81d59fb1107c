"""Plots of a build's step log, and those that an artifact describes, as PNG files.

The plotting library's global state is never touched, so that a background thread may draw.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from pipeline.figures import spoken
from pipeline.steplog import (
    COLUMNS,
    EXPERT_LOAD,
    FP8,
    Evenly,
    Points,
    StepLog,
    collect,
    grouped,
)
from stages.plots import Bars, Lines, Plot, read_plots
from stages.telemetry import BEST_STEP, HELD_OUT, is_held_out

HELD_OUT_LOSS = f"{HELD_OUT}loss"
_LOSSES = ("loss", "next_token_loss", "mtp_loss")
_RATE = "learning_rate"
_OPTIM = (_RATE, "grad_norm")
_BOUNDS = ("_low", "_high")
_PANELS, _CURVES = 20, 8
"""Of the grid of figures that no other plot shows, and of one panel in it."""
_LAYERS = 12
"""Whose expert load is shown, at most: a picture of all layers of a large model is none."""


def plot_steps(records: Iterable[Mapping[str, Any]], folder: Path) -> list[Path]:
    """The plots of a step log's records, as `plot_log` draws them."""
    return plot_log(collect(records), folder)


def plot_log(log: StepLog, folder: Path) -> list[Path]:
    """The few pictures that tell how a training went; none of what its log does not say.

    `loss`, `reward`, `optim`, `fp8`, `expert_load`, and `other` for all further figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    plots = (_plot_loss, _plot_reward, _plot_optim, _plot_fp8, _plot_load, _plot_other)
    return [path for plot in plots for path in plot(log, folder)]


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


def _plot_loss(log: StepLog, folder: Path) -> Iterator[Path]:
    """What is minimised, and as points what was measured on held-out text, of each source."""
    curves = [name for name in _LOSSES if name in log.curves]
    held_out = [name for name in log.curves if _is_held_out_loss(name)]
    if not curves and not held_out:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for name in curves:
        _draw_points(axes, log.curves[name], label=spoken(name))
    for number, name in enumerate(held_out):
        points = log.curves[name]
        style = "o--" if name == HELD_OUT_LOSS else "sDv^P*X"[number % 7] + ":"
        axes.plot(
            *points.thinned(), style, ms=5, lw=1, label=spoken(name).replace("/", ", "), zorder=3
        )
    for step, label in _phases(log):
        axes.axvline(step, color="grey", ls=":", lw=1)
        axes.annotate(
            label, (step, 1), xycoords=("data", "axes fraction"), rotation=90, fontsize="x-small",
            color="grey", ha="right", va="top", xytext=(-2, -3), textcoords="offset points",
        )  # fmt: skip
    _finish(axes, "loss", legend=True)
    yield _save(figure, folder / "loss.png")


def _phases(log: StepLog) -> Iterator[tuple[float, str]]:
    """Where the learning rate stops rising and where it begins to fall, if it does."""
    rates = log.curves.get(_RATE)
    if rates is None:
        return
    peak = max(rates.values) * (1 - 1e-9)
    high = [s for s, rate in zip(rates.steps, rates.values, strict=True) if rate >= peak]
    if high[0] > rates.steps[0]:
        yield high[0], "warm-up ends"
    if high[-1] < rates.steps[-1]:
        yield high[-1], "decay begins"


def _plot_reward(log: StepLog, folder: Path) -> Iterator[Path]:
    """The reward of each step, and what held-out problems came to with their intervals."""
    measured = [name for name in log.curves if _has_interval(name, log)]
    if "reward" not in log.curves and not measured:
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot()
    if "reward" in log.curves:
        _draw_points(axes, log.curves["reward"], label="reward, of training problems")
    for number, name in enumerate(measured, 1):
        value, low, high = (log.curves[f"{name}{end}"] for end in ("", *_BOUNDS))
        below = [max(0.0, v - b) for v, b in zip(value.values, low.values, strict=True)]
        above = [max(0.0, b - v) for v, b in zip(value.values, high.values, strict=True)]
        axes.errorbar(
            value.steps, value.values, [below, above], fmt="o-" if number == 1 else "s--", ms=4,
            lw=1, capsize=3, color=f"C{number}", label=spoken(name),
        )  # fmt: skip
    _finish(axes, "reward", legend=True)
    yield _save(figure, folder / "reward.png")


def _has_interval(name: str, log: StepLog) -> bool:
    """Whether a figure of held-out data has bounds wherever it was measured."""
    length = len(log.curves[name].steps)
    return is_held_out(name) and all(
        f"{name}{end}" in log.curves and len(log.curves[f"{name}{end}"].steps) == length
        for end in _BOUNDS
    )


def _plot_optim(log: StepLog, folder: Path) -> Iterator[Path]:
    """Learning rate and gradient norm, side by side."""
    names = [name for name in _OPTIM if name in log.curves]
    if not names:
        return
    figure = Figure(figsize=(4 * len(names), 2.8), layout="constrained")
    for axes, name in zip(_grid(figure, len(names)), names, strict=True):
        _draw_points(axes, log.curves[name])
        _finish(axes, spoken(name))
    yield _save(figure, folder / "optim.png")


def _plot_fp8(log: StepLog, folder: Path) -> Iterator[Path]:
    """Shares of values that FP8 flushed to zero and clipped: parts downwards, steps to the right.

    The colours are the same in every picture, and white is none at all.
    """
    named = {f"{FP8}{kind}/": kind for kind in ("flushed", "clipped")}
    shown = {
        kind: {n.removeprefix(start): p for n, p in log.curves.items() if n.startswith(start)}
        for start, kind in named.items()
    }
    parts = sorted({part for curves in shown.values() for part in curves})
    if not parts:
        return
    figure = Figure(figsize=(11, 1.6 + 0.2 * len(parts)), layout="constrained")
    colours = ScalarMappable(LogNorm(1e-6, 1), "viridis_r")
    both = _grid(figure, 2)
    for axes, (kind, curves) in zip(both, shown.items(), strict=True):
        _draw_shares(axes, [curves.get(part) for part in parts], colours)
        none = "" if any(max(points.values) > 0 for points in curves.values()) else ": none"
        axes.set_title(f"{kind} by FP8{none}", fontsize="medium")
    both[0].set_yticks(
        [number + 0.5 for number in range(len(parts))], map(spoken, parts), fontsize="x-small"
    )
    figure.colorbar(colours, ax=both, label="share of values", extend="min").minorticks_off()
    yield _save(figure, folder / "fp8.png")


def _draw_shares(axes: Axes, rows: Sequence[Points | None], colours: ScalarMappable) -> None:
    """One row of cells for each curve, downwards; what is 0 or was not watched is white."""
    chosen: Evenly[float] = Evenly(COLUMNS)
    for step in sorted({step for points in rows if points for step in points.steps}):
        chosen.add(step)
    steps = chosen.items()
    found = [dict(zip(p.steps, p.values, strict=True)) if p else {} for p in rows]
    if steps:
        # Edges, so that one step alone has a width too.
        edges = [steps[0] - 0.5, *((a + b) / 2 for a, b in pairwise(steps)), steps[-1] + 0.5]
        shares = [[values.get(step) or math.nan for step in steps] for values in found]
        image = axes.pcolorfast(edges, list(range(len(rows) + 1)), shares, cmap=colours.cmap)
        image.set_norm(colours.norm)
    axes.set_ylim(len(rows), 0)
    axes.set_yticks([])
    axes.set_xlabel("step")


def _plot_other(log: StepLog, folder: Path) -> Iterator[Path]:
    """All figures that no other plot shows, each group of them small, in one grid."""
    intervals = [name for name in log.curves if _has_interval(name, log)]
    shown = {*_LOSSES, *_OPTIM, "reward", BEST_STEP, *intervals}
    shown |= {f"{name}{end}" for name in intervals for end in _BOUNDS}
    left = [
        name
        for name, points in log.curves.items()
        if name not in shown and not points.is_of_part and not _is_held_out_loss(name)
    ]
    if not (groups := grouped(left)):
        return
    panels = groups[:_PANELS]
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.4 * rows), layout="constrained")
    if missing := len(groups) - len(panels):
        figure.suptitle(f"{missing} more figures stand in the step log", fontsize="small")
    for number, group in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, number)
        for name in group[:_CURVES]:
            _draw_points(axes, log.curves[name], label=name.partition("/")[2])
        count = f", {_CURVES} of {len(group)}" if len(group) > _CURVES else ""
        _finish(axes, spoken(group[0].partition("/")[0]) + count, legend="/" in group[0])
        axes.tick_params(labelsize="x-small")
    yield _save(figure, folder / "other.png")


def _draw_points(axes: Axes, points: Points, label: str = "") -> None:
    marker = "o" if len(points.values) < 20 else ""
    axes.plot(*points.thinned(), lw=1, marker=marker, ms=3, label=label)


def _finish(axes: Axes, title: str, *, legend: bool = False) -> None:
    # As text: a plugin's figure may look like a formula.
    axes.set_title(title, fontsize="medium", parse_math=False)
    axes.set_xlabel("step")
    axes.grid(alpha=0.3)
    if legend:
        for text in axes.legend(fontsize="x-small").get_texts():
            text.set_parse_math(False)


def _is_held_out_loss(name: str) -> bool:
    return name.partition("/")[0] == HELD_OUT_LOSS


def _plot_load(log: StepLog, folder: Path) -> Iterator[Path]:
    """Steps to the right, experts upwards, one row of the figure for each layer."""
    if not log.loads:
        return
    layers = min(_LAYERS, len(log.loads[-1][1]))
    figure = Figure(figsize=(8, 1.2 + 1.8 * layers), layout="constrained")
    steps = [step for step, _ in log.loads]
    peak = max(max(layer) for _, load in log.loads for layer in load)
    for number, axes in enumerate(_grid(figure, layers, stacked=True)):
        image = axes.imshow(
            [list(column) for column in zip(*(load[number] for _, load in log.loads), strict=True)],
            aspect="auto",
            origin="lower",
            interpolation="nearest",
            vmin=0,
            vmax=peak,
            extent=(steps[0] - 0.5, steps[-1] + 0.5, -0.5, len(log.loads[-1][1][number]) - 0.5),
        )
        axes.set_ylabel(f"layer {number}\nexpert")
        if number == layers - 1:
            axes.set_xlabel("step")
            figure.colorbar(image, ax=figure.axes[:layers], label="share of tokens")
    yield _save(figure, folder / f"{EXPERT_LOAD}.png")


def _grid(figure: Figure, count: int, *, stacked: bool = False) -> list[Axes]:
    rows, columns = (count, 1) if stacked else (1, count)
    return [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return path

"""Plots of a build's step log and of a report, as PNG files.

The plotting library's global state is never touched, so that a background thread may draw.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline.figures import scalars

EXPERT_LOAD = "expert_load"
"""The record entry that the heat map shows: shares of tokens, [layers][experts]."""
_TOGETHER = ("loss", "mtp_loss")
"""Curves that share one plot, as do those of one name for many roles: `fp8_flushed/ROLE`."""
_SIDES = ("before", "after")


def plot_steps(records: Sequence[Mapping[str, Any]], folder: Path) -> list[Path]:
    """One plot for each scalar of a step log, and the expert load of each layer as a heat map."""
    folder.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(n for record in records for n in scalars(record) if n != "step")
    paths = [_plot_curves(records, group, folder) for group in _groups(list(names))]
    loads = [(r["step"], r[EXPERT_LOAD]) for r in records if r.get(EXPERT_LOAD)]
    return [*paths, *_plot_load(loads, folder)] if loads else paths


def plot_report(report: Path, folder: Path) -> list[Path]:
    """What a report compares: losses of two precisions, or the model before and after."""
    folder.mkdir(parents=True, exist_ok=True)
    record = json.loads(report.read_text())
    if "seeds" in record:
        return [_plot_parity(record, folder)]
    return _plot_before_after(record["headline"], folder)


def _plot_before_after(headline: Mapping[str, float], folder: Path) -> list[Path]:
    """Bars of every key figure that there is of both sides."""
    shared = [
        name.removeprefix("before_")
        for name in headline
        if name.startswith("before_")
        and f"after_{name.removeprefix('before_')}" in headline
        and not name.endswith(("_low", "_high"))
    ]
    if not shared:
        return []
    figure = Figure(figsize=(3.2 * len(shared), 3.6), layout="constrained")
    for axes, name in zip(_grid(figure, len(shared)), shared, strict=True):
        _draw_pair(axes, headline, name)
    return [_save(figure, folder / "before_after.png")]


def _plot_parity(record: Mapping[str, Any], folder: Path) -> Path:
    """Rolling losses of both precisions above, their rolling gap beside the limit below."""
    figure = Figure(figsize=(8, 6.5), layout="constrained")
    losses, gaps = _grid(figure, 2, stacked=True)
    seeds, steps = record["seeds"], range(1, record["steps"] + 1)
    # The one wide and pale, the other thin and dark: losses in parity hide behind each other.
    looks = {"high": ("#e8a33d", 5.0), "fp8": ("#2f6f9f", 1.5)}
    for precision, (colour, width) in looks.items():
        columns = list(
            zip(*(one["rolling_losses"][precision] for one in seeds.values()), strict=True)
        )
        low, high = list(map(min, columns)), list(map(max, columns))
        losses.fill_between(steps, low, high, color=colour, alpha=0.3, lw=0)
        losses.plot(steps, list(map(fmean, columns)), color=colour, lw=width, label=precision)
    for number, (seed, one) in enumerate(seeds.items()):
        gaps.plot(
            steps, _percent(one["rolling_gap"]), color=f"C{number % 10}", label=f"seed {seed}"
        )
    limit = 100 * record["headline"]["limit"]
    for side in (-limit, limit):
        gaps.axhline(side, color="black", ls="--", lw=1, label="limit" if side > 0 else None)
    gaps.axhline(0, color="black", lw=0.5)
    first = record["steps"] - record["tail_steps"] + 1
    for axes in (losses, gaps):
        axes.axvspan(first - 0.5, record["steps"] + 0.5, color="grey", alpha=0.15, lw=0)
        axes.grid(alpha=0.3)
        axes.set_xlim(0.5, record["steps"] + 0.5)
    losses.legend(fontsize="small", loc="upper right", ncols=2)
    gaps.legend(fontsize="small", loc="lower left", ncols=6)
    gaps.set_ylim(-_reach(record, limit), _reach(record, limit))
    window, mean = record["window_steps"], 100 * record["headline"]["relative_gap"]
    losses.set_title(f"loss, mean of {window} steps and range over seeds")
    losses.set_ylabel("nats a token")
    gaps.set_title(f"relative gap of fp8 to high; {mean:+.3f} % over the grey steps, all seeds")
    gaps.set_ylabel("percent")
    gaps.set_xlabel("step")
    return _save(figure, folder / "loss_parity.png")


def _reach(record: Mapping[str, Any], limit: float) -> float:
    """How many percent the gap's axis shows: the limit, and all that the tail's gaps reach."""
    tails = [one["rolling_gap"][-record["tail_steps"] :] for one in record["seeds"].values()]
    return 1.15 * max(2 * limit, *(abs(gap) for tail in tails for gap in _percent(tail)))


def _percent(shares: Sequence[float]) -> list[float]:
    return [100 * share for share in shares]


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


def _draw_pair(axes: Axes, headline: Mapping[str, float], name: str) -> None:
    values = [headline[f"{side}_{name}"] for side in _SIDES]
    errors = None
    if all(f"{side}_{name}_low" in headline for side in _SIDES):
        low = [v - headline[f"{s}_{name}_low"] for v, s in zip(values, _SIDES, strict=True)]
        high = [headline[f"{s}_{name}_high"] - v for v, s in zip(values, _SIDES, strict=True)]
        errors = [[max(0.0, one) for one in low], [max(0.0, one) for one in high]]
    bars = axes.bar(_SIDES, values, yerr=errors, capsize=4, color=["#9aa5b1", "#2f6f9f"])
    axes.bar_label(bars, fmt="%.3g", padding=2)
    axes.margins(y=0.15)
    axes.set_title(name.replace("_", " "))


def _grid(figure: Figure, count: int, *, stacked: bool = False) -> list[Axes]:
    rows, columns = (count, 1) if stacked else (1, count)
    return [figure.add_subplot(rows, columns, number + 1) for number in range(count)]


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=110)
    return path

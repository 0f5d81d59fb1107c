"""What was found, in words, as key figures, as JSON for machines and as Markdown for people."""

import json
from statistics import fmean

from stages.loss_parity.gaps import Findings, rolling_mean
from stages.plots import Curve, Lines, Plot

KEY = ("relative_gap", "relative_gap_spread", "largest_gap")
"""The most telling figures, of those that there are."""


def headline(found: Findings) -> dict[str, float]:
    """Key figures by flat metric name; gaps are shares of the loss, `within_limit` is 0 or 1."""
    figures = {"relative_gap": found.mean}
    if found.spread is not None and found.interval is not None:
        figures["relative_gap_spread"] = found.spread
        figures["relative_gap_low"], figures["relative_gap_high"] = found.interval
    figures["largest_gap"] = found.largest
    figures["limit"] = found.asked.limit
    figures["within_limit"] = float(found.within)
    for seed, gap in zip(found.tails, found.gaps, strict=True):
        figures[f"relative_gap_of_seed_{seed}"] = gap
    return figures


def shortfall(found: Findings) -> str | None:
    """Why the losses are not those of parity; none if they are."""
    if found.within:
        return None
    beyond = [
        f"seed {seed} {_signed(tail.gap)}"
        for seed, tail in found.tails.items()
        if abs(tail.gap) >= found.asked.limit
    ]
    return (
        f"over the last {found.tail_steps} of {found.steps} steps the loss in FP8 differs from "
        f"that in high precision: {', '.join(beyond)} (mean over seeds {_signed(found.mean)}); "
        f"parity.limit = {found.asked.limit} asks each seed for less than "
        f"{_percent(found.asked.limit)}; report.md has the numbers, and the plot in MLflow shows "
        "where they part"
    )


def render_json(found: Findings) -> str:
    """Every number, with both losses and the rolling gap at each step."""
    record = {
        "headline": headline(found),
        "shortfall": shortfall(found),
        "steps": found.steps,
        "tail_steps": found.tail_steps,
        "window_steps": found.window_steps,
        "seeds": {
            str(seed): {
                "fp8": tail.fp8,
                "high": tail.high,
                "gap": tail.gap,
                "losses": {"fp8": list(pair.fp8), "high": list(pair.high)},
                "rolling_losses": {
                    "fp8": rolling_mean(pair.fp8, found.window_steps),
                    "high": rolling_mean(pair.high, found.window_steps),
                },
                "rolling_gap": list(found.rolling[seed]),
            }
            for (seed, tail), pair in zip(found.tails.items(), found.pairs.values(), strict=True)
        },
    }
    return json.dumps(record, indent=1) + "\n"


def render_markdown(found: Findings) -> str:
    """One row a seed, then the gap over seeds, the limit and the verdict."""
    rows = [
        f"| {seed} | {tail.fp8:.5f} | {tail.high:.5f} | {_signed(tail.gap)} |"
        for seed, tail in found.tails.items()
    ]
    lines = [
        "# Loss parity",
        "",
        f"Next-token loss in nats on the training batches, averaged over the last "
        f"{found.tail_steps} of {found.steps} steps. Both trainings of a seed begin with the same "
        "values and read the same rows.",
        "",
        "| seed | FP8 | high precision | gap |",
        "|---:|---:|---:|---:|",
        *rows,
        "",
        f"- mean gap: {_over_seeds(found)}",
        f"- largest gap of a seed: {_percent(found.largest)}",
        f"- limit: {_percent(found.asked.limit)}",
        "",
        f"**{verdict(found)}**",
        "",
    ]
    return "\n".join(lines)


def verdict(found: Findings) -> str:
    """What the numbers say, in a sentence or two."""
    limit = found.asked.limit
    if not found.within:
        beyond = sum(abs(gap) >= limit for gap in found.gaps)
        return f"No parity: the gap of {beyond} of {len(found.gaps)} seeds is not below the limit."
    said = "Parity: each seed's gap, and so their mean, is below the limit."
    if found.interval is None:
        return f"{said} One seed does not say how much another would differ."
    if max(map(abs, found.interval)) >= limit:
        return f"{said} The interval reaches beyond it: more seeds would make this surer."
    return f"{said} So is the whole 95 % interval of the mean."


def plot(found: Findings) -> Plot:
    """Rolling losses of both precisions above, their rolling gap beside the limit below."""
    steps = tuple(float(step) for step in range(1, found.steps + 1))
    first = found.steps - found.tail_steps + 1
    shaded = (first - 0.5, found.steps + 0.5)
    losses = [
        Curve(
            label=precision,
            x=steps,
            y=tuple(map(fmean, columns)),
            low=tuple(map(min, columns)),
            high=tuple(map(max, columns)),
            is_wide=precision == "high",
        )
        for precision, columns in _rolling(found).items()
    ]
    gaps = [
        Curve(label=f"seed {seed}", x=steps, y=tuple(100 * gap for gap in gaps))
        for seed, gaps in found.rolling.items()
    ]
    limit = 100 * found.asked.limit
    tails = [abs(value) for curve in gaps for value in curve.y[first - 1 :]]
    return Plot(
        name="loss_parity",
        is_stacked=True,
        panels=(
            Lines(
                title=f"loss, mean of {found.window_steps} steps and range over seeds",
                x_label="step",
                y_label="nats a token",
                curves=tuple(losses),
                shaded=shaded,
            ),
            Lines(
                title=f"relative gap of fp8 to high; {100 * found.mean:+.3f} % over the grey "
                "steps, all seeds",
                x_label="step",
                y_label="percent",
                curves=tuple(gaps),
                levels={"limit": limit, "- limit": -limit},
                shaded=shaded,
                reach=1.15 * max(2 * limit, *tails),
            ),
        ),
    )


def _rolling(found: Findings) -> dict[str, list[tuple[float, ...]]]:
    """By precision, the wide curve first: at each step the rolling loss of every seed."""
    window = found.window_steps
    return {
        precision: list(
            zip(
                *(
                    rolling_mean(pair.high if precision == "high" else pair.fp8, window)
                    for pair in found.pairs.values()
                ),
                strict=True,
            )
        )
        for precision in ("high", "fp8")
    }


def _over_seeds(found: Findings) -> str:
    if found.spread is None or found.interval is None:
        return f"{_signed(found.mean)}, of one seed"
    low, high = found.interval
    return (
        f"{_signed(found.mean)} ± {_percent(found.spread)} (standard deviation over "
        f"{len(found.gaps)} seeds), 95 % interval of the mean [{_signed(low)}, {_signed(high)}]"
    )


def _signed(gap: float) -> str:
    return f"{100 * gap:+.3f} %"


def _percent(share: float) -> str:
    return f"{100 * share:.3f} %"

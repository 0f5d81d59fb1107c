"""The few numbers by which people know an artifact."""

from collections.abc import Mapping
from statistics import median

from stages.artifacts import Artifact, Bundle, Checkpoint, Corpus, Report
from stages.telemetry import METRICS, read_metrics

RATE = "tokens_per_second"
"""Tells of the machine and of what ran beside it, not of what was made."""
_STEP_FIGURES = ("reward", "loss", RATE)
_HEADLINES = (
    *("before_pass_at_1", "after_pass_at_1", "after_bits_per_byte"),
    *("relative_gap", "relative_gap_spread", "largest_gap"),
)
_BOUNDS = ("_low", "_high")
_SHARES = frozenset({"relative_gap", "relative_gap_spread", "largest_gap"})
"""So small and so alike that people compare them in percent."""


def key_figures(artifact: Artifact) -> dict[str, float]:
    """Names and values, the most telling first."""
    match artifact:
        case Corpus():
            tokens = artifact.train_rows * artifact.sequence_tokens
            return {"train_tokens": tokens, "train_problems": artifact.train_problems}
        case Checkpoint():
            steps = [scalars(record) for record in read_metrics(artifact.beside(METRICS))]
            chosen = {k: steps[-1][k] for k in _STEP_FIGURES if steps and k in steps[-1]}
            if RATE in chosen:
                # One step may have counted, or waited, or begun with cold caches.
                chosen[RATE] = median(step[RATE] for step in steps if RATE in step)
            if chosen or artifact.final_loss is None:
                return chosen or {"parameters": artifact.model.parameters()}
            return {"loss": artifact.final_loss}
        case Report():
            chosen = {k: artifact.headline[k] for k in _HEADLINES if k in artifact.headline}
            return chosen or dict(list(artifact.headline.items())[:3])
        case Bundle():
            return {
                f"{variant}_top1_agreement": parity.top1_agreement
                for variant, parity in artifact.parity.items()
            }
        case _:
            return {}


def compared_figures(artifact: Artifact) -> dict[str, float]:
    """What is compared over seeds: key figures, and all that a report measured.

    Bounds of a report's intervals are left out: they speak of one seed's choice of problems.
    """
    if not isinstance(artifact, Report):
        return key_figures(artifact)
    return {k: v for k, v in artifact.headline.items() if not k.endswith(_BOUNDS)}


def scalars(record: Mapping[str, object]) -> dict[str, float]:
    """The entries of a step's record that are plain numbers."""
    return {
        name: float(value)
        for name, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def show_figures(figures: Mapping[str, float]) -> str:
    """Figures in one line: `loss 1.234, tokens per second 3,900`, `relative gap 0.083 %`."""
    return ", ".join(f"{spoken(name)} {show_figure(name, v)}" for name, v in figures.items())


def spoken(name: str) -> str:
    """A figure's name as people read it."""
    return name.replace("_", " ")


def show_figure(name: str, value: float) -> str:
    """A value in the unit in which people compare the figure of this name."""
    return f"{100 * value:.3f} %" if name in _SHARES else show_number(value)


def show_number(value: float) -> str:
    """Four significant digits; large numbers whole, with separators."""
    return f"{value:,.0f}" if abs(value) >= 1000 or value == int(value) else f"{value:.4g}"

"""How far apart the losses of two precisions are: per seed, over seeds, and along the way.

A gap is relative and signed: mean loss in FP8 / mean loss in high precision - 1, so that a
positive one says that FP8 learned less. Both trainings of a seed see the same batches from the same
initial values, so what batches have in common falls out of it.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from configs.parity import ParityConfig

_WINDOW_SHARE = 0.05
"""Part of the steps over which the rolling curves average; one step's loss is mostly its batch."""


@dataclass(frozen=True, slots=True)
class Pair:
    """The losses of one seed's two trainings, step by step from the first, equally many."""

    fp8: Sequence[float]
    high: Sequence[float]


@dataclass(frozen=True, slots=True)
class Tail:
    """Mean losses of one seed's two trainings over their last steps."""

    fp8: float
    high: float

    @property
    def gap(self) -> float:
        """Of these means."""
        return self.fp8 / self.high - 1


@dataclass(frozen=True, slots=True)
class Findings:
    """Everything that a report says."""

    asked: ParityConfig
    pairs: Mapping[int, Pair]
    """By seed, in rising order, as are the other maps."""
    tails: Mapping[int, Tail]
    tail_steps: int
    rolling: Mapping[int, Sequence[float]]
    """The gap at each step, of means over the last `window_steps` steps up to it."""
    window_steps: int

    @property
    def steps(self) -> int:
        """Of every training."""
        return len(next(iter(self.pairs.values())).fp8)

    @property
    def gaps(self) -> list[float]:
        """One a seed."""
        return [tail.gap for tail in self.tails.values()]

    @property
    def mean(self) -> float:
        """Over seeds."""
        return statistics.fmean(self.gaps)

    @property
    def largest(self) -> float:
        """The gap of the seed that is farthest from none, without its sign."""
        return max(map(abs, self.gaps))

    @property
    def spread(self) -> float | None:
        """Sample standard deviation over seeds; none of a single one."""
        return statistics.stdev(self.gaps) if len(self.gaps) > 1 else None

    @property
    def interval(self) -> tuple[float, float] | None:
        """95 % Student-t interval of the mean; none of a single seed.

        Seeds are independent, and few: mean +- t spread / sqrt(seeds), with seeds - 1 degrees of
        freedom.
        """
        if self.spread is None:
            return None
        margin = student_t(0.95, len(self.gaps) - 1) * self.spread / math.sqrt(len(self.gaps))
        return self.mean - margin, self.mean + margin

    @property
    def within(self) -> bool:
        """Whether every seed's gap, and so their mean too, is below the limit, of either sign.

        A mean alone would let a seed that learned less hide behind one that learned more.
        """
        return self.largest < self.asked.limit


def compare(pairs: Mapping[int, Pair], asked: ParityConfig) -> Findings:
    """Compare the trainings of each seed; the order in which seeds are given does not matter."""
    ordered = dict(sorted(pairs.items()))
    steps = {len(losses) for pair in ordered.values() for losses in (pair.fp8, pair.high)}
    assert len(steps) == 1, "trainings of one comparison have equally many steps"
    (count,) = steps
    tail_steps = max(1, round(asked.tail_share * count))
    window = max(1, round(_WINDOW_SHARE * count))
    return Findings(
        asked=asked,
        pairs=ordered,
        tails={
            seed: Tail(
                fp8=statistics.fmean(pair.fp8[-tail_steps:]),
                high=statistics.fmean(pair.high[-tail_steps:]),
            )
            for seed, pair in ordered.items()
        },
        tail_steps=tail_steps,
        rolling={seed: _rolling_gap(pair, window) for seed, pair in ordered.items()},
        window_steps=window,
    )


def rolling_mean(values: Sequence[float], window: int) -> list[float]:
    """At each place the mean of the last `window` values up to it; of fewer near the start."""
    return [
        statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)
    ]


def _rolling_gap(pair: Pair, window: int) -> list[float]:
    both = zip(rolling_mean(pair.fp8, window), rolling_mean(pair.high, window), strict=True)
    return [fp8 / high - 1 for fp8, high in both]


def student_t(share: float, freedom: int) -> float:
    """The t with P(|T| <= t) = `share` for Student's T of `freedom` degrees of freedom."""
    low, high = 0.0, 1.0
    while _student_share(high, freedom) < share:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (low, middle) if _student_share(middle, freedom) >= share else (middle, high)
    return high


def _student_share(t: float, freedom: int) -> float:
    """P(|T| <= t), exact (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    total, term = 0.0, math.cos(angle) ** odd
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(angle) ** 2 * (power + 1) / (power + 2)
    total *= math.sin(angle)
    return 2 / math.pi * (angle + total) if odd else total

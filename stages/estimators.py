"""pass@k without bias, and how sure a mean over problems is."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

_NORMAL_95 = statistics.NormalDist().inv_cdf(0.975)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


def pass_at_k(*, num_samples: int, num_correct: int, k: int) -> float:
    """Probability that k answers drawn from these samples without replacement hold a correct one.

    1 - C(n - c, k) / C(n, k) is unbiased for the chance that k fresh answers hold one (Chen et al.,
    arXiv 2107.03374, eq. 1); 1 - (1 - c/n)^k would be too low. Exact: integers of any size.
    """
    assert 0 <= num_correct <= num_samples
    assert 1 <= k <= num_samples
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def mean_over_problems(values: Sequence[float]) -> Estimate:
    """Mean of one value in [0, 1] per problem, with a 95 % interval over problems.

    The samples of one problem share its difficulty and are not independent; problems are drawn
    independently. So the interval treats a problem as one observation, however many samples it
    has: mean +- 1.96 sd / sqrt(problems), cut to [0, 1], by the central limit theorem. Where all
    values are equal the deviation says nothing, and Wilson's interval takes its place: all-wrong
    on ten problems does not mean never right.
    """
    count, mean = len(values), statistics.fmean(values)
    if min(values) == max(values):
        return wilson(values[0], count)
    margin = _NORMAL_95 * statistics.stdev(values) / math.sqrt(count)
    return Estimate(mean=mean, low=max(0.0, mean - margin), high=min(1.0, mean + margin))


def paired_gain(before: Sequence[float], after: Sequence[float]) -> Estimate:
    """Mean of after - before over the same problems, with a 95 % interval over problems.

    Values lie in [0, 1]. Problems are easy or hard for both sides alike, so the differences vary
    less than the sides do, and an interval of differences says more than two intervals side by
    side. Where all differences are equal their deviation says nothing: of the problems not asked,
    up to 1 - 0.05^(1 / problems) may behave otherwise, each by 1 at most.
    """
    differences = [two - one for one, two in zip(before, after, strict=True)]
    count, mean = len(differences), statistics.fmean(differences)
    if min(differences) == max(differences):
        margin = 1 - 0.05 ** (1 / count)
    else:
        margin = _NORMAL_95 * statistics.stdev(differences) / math.sqrt(count)
    return Estimate(mean=mean, low=max(-1.0, mean - margin), high=min(1.0, mean + margin))


def wilson(share: float, count: int) -> Estimate:
    """Wilson's 95 % score interval of a share among `count` independent trials.

    Its ends are the p at which |share - p| = 1.96 sqrt(p (1 - p) / count).
    """
    weight = _NORMAL_95**2 / count
    centre = (share + weight / 2) / (1 + weight)
    margin = math.sqrt(weight * (share * (1 - share) + weight / 4)) / (1 + weight)
    return Estimate(mean=share, low=max(0.0, centre - margin), high=min(1.0, centre + margin))

"""How many rows each source gives, how often it may repeat them, and in which order they come.

Axes: N rows of the whole mixture.
"""

import math
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from configs.seed import derive

Int64 = npt.NDArray[np.int64]
Unsigned = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

_SLACK = 1e-9
"""Products of shares and rows are whole numbers only to rounding."""


def row_budget(shares: Mapping[str, float], total_rows: int) -> dict[str, int]:
    """Rows of each source so that shares hold and the rows add up to `total_rows`."""
    exact = {name: share * total_rows for name, share in shares.items()}
    budget = {name: math.floor(rows) for name, rows in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (budget[name] - exact[name], name))
    for name in by_remainder[: total_rows - sum(budget.values())]:
        budget[name] += 1
    return budget


def repeatable_rows(
    available: Mapping[str, int], max_epochs: Mapping[str, float]
) -> dict[str, int]:
    """The most rows that each source can give if each of its rows may come `max_epochs` times."""
    return {name: math.floor(rows * max_epochs[name] + _SLACK) for name, rows in available.items()}


def mixable_rows(shares: Mapping[str, float], available: Mapping[str, int], wanted: int) -> int:
    """The most rows, at most `wanted`, that can be had without bending the shares.

    `available` is what each source can give, repeats included: see `repeatable_rows`.
    """
    return min([wanted, *(math.floor(available[name] / shares[name] + _SLACK) for name in shares)])


def interleave_order(
    counts: Mapping[str, int], *, seed: int, available: Mapping[str, int] | None = None
) -> tuple[tuple[str, ...], Unsigned, Int64]:
    """Sources in name order, and of each output row which of them [N] and which of its rows [N].

    Every prefix holds the mixture to about a row a source: row j of a source's n lies at a point
    drawn from the j-th of n equal parts of the whole. Each source's rows are shuffled first, so
    that neighbours come from different documents. A source is asked for `counts` of its
    `available` rows (as many, if that is not given): for its first ones if there are enough; else
    for all of them again and again, each time in another order, so that no two of its rows differ
    by more than one in how often they come. Takes some 35 bytes a row while it works, 10 after.
    """
    names = tuple(sorted(counts))
    kind = np.uint8 if len(names) <= 256 else np.uint16
    sources, picks, points = [], [], []
    for number, name in enumerate(names):
        count = counts[name]
        distinct = count if available is None else min(count, available[name])
        assert distinct or not count, f"{name} has no rows, but is asked for {count}"
        rng = np.random.default_rng(derive(seed, "data", name, "rows"))
        picks.append(_epochs(rng, count, distinct, derive(seed, "data", name, "epochs")))
        points.append((np.arange(count) + rng.random(count)) / max(1, count))
        sources.append(np.full(count, number, dtype=kind))
    if not names:
        return names, np.empty(0, dtype=np.uint8), np.empty(0, dtype=np.int64)
    # Each source's points rise, so that a stable sort, which merges runs, has little to do.
    order = np.argsort(np.concatenate(points), kind="stable")
    return names, np.concatenate(sources)[order], np.concatenate(picks)[order]


def _epochs(rng: np.random.Generator, count: int, distinct: int, seed: int) -> Int64:
    """`count` picks of rows below `distinct`: all of them in one order after the other.

    `rng` orders the first epoch; the later ones have generators of their own.
    """
    orders = [rng.permutation(distinct)]
    for epoch in range(1, -(-count // max(1, distinct))):
        orders.append(np.random.default_rng(derive(seed, epoch)).permutation(distinct))
    return np.concatenate(orders)[:count]

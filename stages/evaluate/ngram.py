"""The baseline a model must beat: a bigram interpolated with the unigram, counted on its own diet.

p(next | previous) = w bigram + (1 - w) unigram, where bigram is the relative frequency among the
consumed tokens (the unigram where `previous` was never seen) and unigram is add-one smoothed. w is
chosen on the held-out text itself, which can only flatter the baseline.

Axes: N rows, S positions, P scored pairs, V vocabulary.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from stages.evaluate.text import target_mask

_WEIGHTS = (*(step / 100 for step in range(100)), 0.995, 0.999)
"""Values of w to try; never 1, which makes an unseen pair impossible."""


@dataclass(frozen=True, slots=True)
class PairCounts:
    """How often each pair of neighbouring tokens was consumed; sparse, for any vocabulary."""

    vocab_size: int
    codes: NDArray[np.int64]
    """previous * vocab_size + next of each pair seen, ascending."""
    counts: NDArray[np.int64]
    """Occurrences of each pair of `codes`."""
    previous_V: NDArray[np.int64]
    """Occurrences of each token as the first of a pair."""
    next_V: NDArray[np.int64]
    """Occurrences of each token as the second of a pair."""


def count_pairs(chunks: Iterable[NDArray[np.int64]], *, vocab_size: int) -> PairCounts:
    """Count the scored pairs of packed rows; a row read twice counts twice."""
    codes, counts = np.zeros(0, np.int64), np.zeros(0, np.int64)
    for rows_NS in chunks:
        previous_P, next_P = _scored_pairs(rows_NS)
        more, times = np.unique(previous_P * vocab_size + next_P, return_counts=True)
        codes, place = np.unique(np.concatenate([codes, more]), return_inverse=True)
        joined = np.zeros(len(codes), np.int64)
        np.add.at(joined, place, np.concatenate([counts, times]))
        counts = joined
    previous_V, next_V = np.zeros(vocab_size, np.int64), np.zeros(vocab_size, np.int64)
    np.add.at(previous_V, codes // vocab_size, counts)
    np.add.at(next_V, codes % vocab_size, counts)
    return PairCounts(
        vocab_size=vocab_size, codes=codes, counts=counts, previous_V=previous_V, next_V=next_V
    )


def best_bits(seen: PairCounts, rows_NS: NDArray[np.int64]) -> tuple[float, float]:
    """The least bits that the baseline needs for packed rows, and the weight w that attains it."""
    pairs = _scored_pairs(rows_NS)
    bits = {
        weight: -float(np.log2(probabilities(seen, *pairs, weight=weight)).sum())
        for weight in _WEIGHTS
    }
    best = min(bits, key=bits.__getitem__)
    return bits[best], best


def probabilities(
    seen: PairCounts, previous_P: NDArray[np.int64], next_P: NDArray[np.int64], *, weight: float
) -> NDArray[np.float64]:
    """p(next | previous) with bigram weight `weight`; sums to 1 over all tokens but one.

    Begin-of-text is that one: it is never a target, so the baseline wastes nothing on it.
    """
    outcomes = seen.vocab_size - 1
    unigram_P = (seen.next_V[next_P] + 1) / (seen.next_V.sum() + outcomes)
    contexts_P = seen.previous_V[previous_P]
    bigram_P = np.where(
        contexts_P > 0,
        _occurrences(seen, previous_P, next_P) / np.maximum(contexts_P, 1),
        unigram_P,
    )
    return np.asarray(weight * bigram_P + (1 - weight) * unigram_P, dtype=np.float64)


def _scored_pairs(rows_NS: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    mask = target_mask(rows_NS)
    return rows_NS[:, :-1][mask], rows_NS[:, 1:][mask]


def _occurrences(
    seen: PairCounts, previous_P: NDArray[np.int64], next_P: NDArray[np.int64]
) -> NDArray[np.int64]:
    if len(seen.codes) == 0:
        return np.zeros_like(previous_P)
    wanted_P = previous_P * seen.vocab_size + next_P
    place_P = np.minimum(np.searchsorted(seen.codes, wanted_P), len(seen.codes) - 1)
    return np.where(seen.codes[place_P] == wanted_P, seen.counts[place_P], 0)

"""The n-gram baseline against ten tokens counted by hand and a plain dictionary."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest

from stages.evaluate.ngram import best_bits, count_pairs, probabilities
from stages.framing import BOS_ID

ROWS = np.array([[0, 2, 3, 2, 4], [3, 2, 3, 1, 0]])
"""Scored pairs: 02 23 32 24 | 32 23 31; the last, 10, has begin-of-text as its target."""


def test_ten_tokens_counted_by_hand() -> None:
    seen = count_pairs([ROWS], vocab_size=5)
    assert seen.previous_V.tolist() == [1, 0, 3, 3, 0]
    assert seen.next_V.tolist() == [0, 1, 3, 2, 1]
    found = probabilities(seen, np.array([2, 3, 1]), np.array([3, 4, 2]), weight=0.25)
    # 2 -> 3: bigram 2/3, unigram (2+1)/(7+4). 3 -> 4: never seen. 1: never a context.
    assert found == pytest.approx([0.25 * 2 / 3 + 0.75 * 3 / 11, 0.75 * 2 / 11, 4 / 11])


def test_the_weight_is_the_best_for_the_held_out_text() -> None:
    bits, weight = best_bits(count_pairs([ROWS], vocab_size=5), np.array([[2, 3, 4]]))
    assert weight == 0.15  # (w 2/3 + (1-w) 3/11) (1-w) is greatest at w = 2/13
    expected = (0.15 * 2 / 3 + 0.85 * 3 / 11) * (0.85 * 2 / 11)
    assert bits == pytest.approx(-math.log2(expected))


def test_probabilities_of_all_possible_targets_add_up_to_one() -> None:
    seen = count_pairs([ROWS], vocab_size=5)
    targets = np.array([token for token in range(5) if token != BOS_ID])
    for previous in range(5):
        found = probabilities(seen, np.full(4, previous), targets, weight=0.7)
        assert found.sum() == pytest.approx(1)


def test_counts_equal_a_dictionarys_however_the_rows_are_cut() -> None:
    rows = np.random.default_rng(0).integers(0, 9, (40, 12))
    expected = Counter(
        (int(previous), int(following))
        for row in rows
        for previous, following in itertools.pairwise(row)
        if following != BOS_ID
    )
    for chunks in ([rows], list(rows[:, None]), [rows[:7], rows[7:7], rows[7:]]):
        seen = count_pairs(chunks, vocab_size=9)
        pairs = zip(seen.codes // 9, seen.codes % 9, strict=True)
        assert dict(zip(pairs, seen.counts.tolist(), strict=True)) == expected


def test_a_row_read_twice_counts_twice() -> None:
    once = count_pairs([ROWS[:1], ROWS], vocab_size=5)
    assert once.next_V.tolist() == [0, 1, 5, 3, 2]


def test_a_model_that_consumed_nothing_meets_a_uniform_baseline() -> None:
    bits, _ = best_bits(count_pairs([], vocab_size=5), np.array([[0, 2, 3, 0, 4]]))
    assert bits == pytest.approx(3 * math.log2(4))  # three targets, four possible tokens

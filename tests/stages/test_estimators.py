"""pass@k against enumeration, intervals against hand-worked numbers and simulated coverage."""

import itertools
import math

import numpy as np
import pytest

from stages.estimators import mean_over_problems, paired_gain, pass_at_k, wilson


@pytest.mark.parametrize("num_samples", [1, 2, 5, 7])
def test_pass_at_k_is_the_share_of_subsets_that_hold_a_correct_answer(num_samples: int) -> None:
    for num_correct in range(num_samples + 1):
        answers = [True] * num_correct + [False] * (num_samples - num_correct)
        for k in range(1, num_samples + 1):
            subsets = list(itertools.combinations(answers, k))
            share = sum(map(any, subsets)) / len(subsets)
            found = pass_at_k(num_samples=num_samples, num_correct=num_correct, k=k)
            assert found == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("k", [1, 3, 8])
def test_pass_at_k_is_unbiased(k: int) -> None:
    p, n = 0.3, 8
    expected = sum(
        math.comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(num_samples=n, num_correct=c, k=k)
        for c in range(n + 1)
    )
    assert expected == pytest.approx(1 - (1 - p) ** k)


def test_the_interval_is_the_normal_one_over_problems() -> None:
    found = mean_over_problems([0.2, 0.4, 0.6, 0.8])  # sd 0.2581989, / sqrt(4), * 1.959964
    assert found.mean == pytest.approx(0.5)
    assert (found.low, found.high) == pytest.approx((0.2469703, 0.7530297), abs=1e-6)


def test_an_interval_never_leaves_zero_to_one() -> None:
    found = mean_over_problems([0.0, 0.0, 0.0, 1.0])
    assert found.low == 0.0
    assert found.high == pytest.approx(0.25 + 1.959964 * 0.5 / 2)
    assert mean_over_problems([1.0, 1.0, 1.0, 0.0]).high == 1.0


@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_equal_problems_still_leave_doubt(value: float) -> None:
    found = mean_over_problems([value] * 10)
    assert found == wilson(value, 10)
    assert found.high - found.low > 0.2


def test_none_of_ten_may_be_more_than_a_quarter() -> None:
    found = wilson(0.0, 10)  # z^2 / (10 + z^2)
    assert (found.low, found.high) == pytest.approx((0.0, 0.2775328), abs=1e-6)


def test_the_ends_of_wilsons_interval_are_just_compatible_with_the_share() -> None:
    found = wilson(0.3, 40)
    for end in (found.low, found.high):
        assert abs(0.3 - end) == pytest.approx(1.959964 * math.sqrt(end * (1 - end) / 40), rel=1e-6)


def test_the_interval_holds_the_truth_19_times_of_20_though_samples_are_correlated() -> None:
    rng = np.random.default_rng(0)
    trials, num_problems, num_samples = 400, 100, 8
    covered = naive = 0
    for _ in range(trials):
        difficulty = rng.beta(0.5, 0.5, num_problems)  # mean 1/2, mostly near 0 or 1
        correct = rng.binomial(num_samples, difficulty)
        found = mean_over_problems(list(correct / num_samples))
        covered += found.low <= 0.5 <= found.high
        one_by_one = wilson(float(correct.mean()) / num_samples, num_problems * num_samples)
        naive += one_by_one.low <= 0.5 <= one_by_one.high
    assert 0.92 <= covered / trials <= 0.98
    assert naive / trials < 0.8  # what the interval would be worth if samples were independent


def test_a_paired_gain_is_the_mean_difference_with_the_normal_interval() -> None:
    found = paired_gain([0.2, 0.4, 0.6, 0.8], [0.4, 0.4, 1.0, 0.8])  # 0.2, 0, 0.4, 0
    assert found.mean == pytest.approx(0.15)
    assert found.high - found.mean == pytest.approx(1.959964 * 0.1914854 / 2, abs=1e-6)


def test_pairing_sees_a_gain_that_two_intervals_side_by_side_do_not() -> None:
    rng = np.random.default_rng(0)
    before = rng.uniform(0, 0.9, 200)
    after = before + rng.uniform(0.0, 0.1, 200)
    one, two = mean_over_problems(list(before)), mean_over_problems(list(after))
    assert one.high > two.low
    assert paired_gain(list(before), list(after)).low > 0.04


def test_equal_differences_still_leave_doubt() -> None:
    found = paired_gain([0.5] * 59, [0.5] * 59)
    assert (found.low, found.high) == pytest.approx((-0.05, 0.05), abs=1e-3)  # 0.95^59 = 0.0485
    assert paired_gain([0.0] * 10, [1.0] * 10).high == 1.0


def test_the_paired_interval_holds_the_truth_19_times_of_20() -> None:
    rng = np.random.default_rng(1)
    covered, trials = 0, 400
    for _ in range(trials):
        easy = rng.beta(0.5, 0.5, 120)
        before = rng.binomial(8, 0.8 * easy) / 8
        after = rng.binomial(8, easy) / 8
        found = paired_gain(list(before), list(after))
        covered += found.low <= 0.1 <= found.high  # mean of 0.2 * easy
    assert 0.92 <= covered / trials <= 0.98

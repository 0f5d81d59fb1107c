"""The arithmetic of gaps, on bare curves."""

import statistics

import pytest

from configs.parity import ParityConfig
from stages.loss_parity.gaps import Findings, Pair, compare, rolling_mean, student_t

HIGH = [5.0 - 0.02 * step for step in range(100)]


def found_of(*factors: float, asked: ParityConfig | None = None) -> Findings:
    """Seeds 0, 1, ... whose FP8 losses are this many times the others, at every step."""
    pairs = {
        seed: Pair(fp8=[factor * loss for loss in HIGH], high=HIGH)
        for seed, factor in enumerate(factors)
    }
    return compare(pairs, asked or ParityConfig())


def test_a_curve_three_tenths_of_a_percent_higher_is_caught_and_two_tenths_are_not() -> None:
    assert found_of(1.003, 1.003, 1.003).mean == pytest.approx(0.003)
    assert not found_of(1.003, 1.003, 1.003).within
    assert found_of(1.002, 1.002, 1.002).within


def test_the_limit_itself_is_not_below_it_and_a_gap_downwards_is_one_too() -> None:
    above = ParityConfig(limit=0.25)
    assert not found_of(1.25, asked=above).within
    assert not found_of(0.997, 0.997).within


def test_seeds_that_cancel_out_are_no_parity() -> None:
    found = found_of(1.01, 0.99)
    assert found.mean == pytest.approx(0, abs=1e-12)
    assert found.largest == pytest.approx(0.01)
    assert not found.within


def test_only_the_last_part_counts() -> None:
    worse = [1.01 * loss for loss in HIGH[:80]] + HIGH[80:]
    found = compare({0: Pair(fp8=worse, high=HIGH)}, ParityConfig())
    assert (found.tail_steps, found.mean, found.within) == (20, 0.0, True)
    whole = compare({0: Pair(fp8=worse, high=HIGH)}, ParityConfig(tail_share=1))
    assert whole.mean == pytest.approx(sum(worse) / sum(HIGH) - 1)
    assert not whole.within


def test_a_gap_is_of_means_and_not_a_mean_of_gaps() -> None:
    found = compare({0: Pair(fp8=[2.0, 1.0], high=[1.0, 3.0])}, ParityConfig(tail_share=1))
    assert found.gaps == [pytest.approx(-0.25)]


def test_the_order_of_seeds_does_not_matter() -> None:
    pairs = {seed: Pair(fp8=[(1 + seed) * x for x in HIGH], high=HIGH) for seed in (0, 1, 2)}
    shuffled = {seed: pairs[seed] for seed in (2, 0, 1)}
    assert list(compare(shuffled, ParityConfig()).tails) == [0, 1, 2]
    assert compare(shuffled, ParityConfig()) == compare(pairs, ParityConfig())


def test_the_rolling_gap_ends_where_the_tail_of_its_window_does() -> None:
    found = found_of(1.001, 1.002)
    assert found.window_steps == 5
    assert [len(curve) for curve in found.rolling.values()] == [100, 100]
    for curve, gap in zip(found.rolling.values(), found.gaps, strict=True):
        assert curve == pytest.approx([gap] * 100)
    assert rolling_mean([1, 2, 6, 4], 2) == [1, 1.5, 4, 5]


def test_the_interval_is_students() -> None:
    gaps = [0.001, 0.002, 0.0015]
    found = found_of(*(1 + gap for gap in gaps))
    assert found.spread == pytest.approx(statistics.stdev(gaps))
    # t for 95 % and 2 degrees of freedom, from published tables: 4.303.
    margin = 4.302653 * statistics.stdev(gaps) / 3**0.5
    assert found.interval == pytest.approx((0.0015 - margin, 0.0015 + margin))
    assert found_of(1.001).interval is None
    assert found_of(1.001).spread is None


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (30, 2.0423)],
)
def test_students_quantiles_are_those_of_the_tables(freedom: int, quantile: float) -> None:
    assert student_t(0.95, freedom) == pytest.approx(quantile, abs=5e-5)

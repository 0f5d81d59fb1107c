"""Promises of mixing sources."""

from collections import Counter
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.seed import derive
from stages.data.mixture import (
    interleave_order,
    mixable_rows,
    repeatable_rows,
    row_budget,
)

Int32 = npt.NDArray[np.int32]


def interleave(rows: Mapping[str, Int32], *, seed: int) -> Int32:
    """All rows, each once, in the order of the mixture."""
    names, source_N, row_N = interleave_order({n: len(some) for n, some in rows.items()}, seed=seed)
    mixed = [rows[names[source]][row] for source, row in zip(source_N, row_N, strict=True)]
    return np.stack(mixed) if mixed else np.empty((0, 0), np.int32)


def slow_interleave(rows: Mapping[str, Int32], seed: int) -> list[list[int]]:
    """Rows in the order of their points, one by one."""
    placed = []
    for name in sorted(rows):
        rng = np.random.default_rng(derive(seed, "data", name, "rows"))
        count = len(rows[name])
        shuffled = rows[name][rng.permutation(count)]
        for place, (row, offset) in enumerate(zip(shuffled, rng.random(count), strict=True)):
            placed.append(((place + offset) / count, name, place, row.tolist()))
    return [row for *_, row in sorted(placed, key=lambda one: one[:3])]


def rows_of(counts: Mapping[str, int]) -> dict[str, Int32]:
    """Rows that differ from all others."""
    return {
        name: np.arange(count * 3, dtype=np.int32).reshape(count, 3) + 1000 * number
        for number, (name, count) in enumerate(counts.items())
    }


count_table = st.dictionaries(st.sampled_from("abcdef"), st.integers(0, 60), min_size=1)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(0, 500))
def test_budgets_add_up_and_keep_to_the_shares(weights: list[int], total: int) -> None:
    shares = {str(n): weight / sum(weights) for n, weight in enumerate(weights)}
    budget = row_budget(shares, total)
    assert sum(budget.values()) == total
    assert all(abs(budget[name] - shares[name] * total) < 1 for name in shares)


@pytest.mark.parametrize(
    ("available", "rows"), [({"a": 100, "b": 100}, 100), ({"a": 20, "b": 100}, 40), ({}, 100)]
)
def test_the_scarcest_source_bounds_the_whole(available: dict[str, int], rows: int) -> None:
    shares = dict.fromkeys(available, 0.5)
    assert mixable_rows(shares, available, 100) == rows


def test_a_source_gives_no_more_than_its_epochs() -> None:
    caps = {"a": 1.0, "b": 2.5, "c": 1.15}
    assert repeatable_rows({"a": 7, "b": 3, "c": 100}, caps) == {"a": 7, "b": 7, "c": 115}


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=5),
    st.lists(st.integers(0, 40), min_size=5, max_size=5),
    st.lists(st.sampled_from([1.0, 1.3, 2.0, 3.7]), min_size=5, max_size=5),
)
def test_what_is_mixed_keeps_to_shares_and_epochs(
    weights: list[int], rows: list[int], epochs: list[float]
) -> None:
    names = [str(number) for number in range(len(weights))]
    shares = {name: weight / sum(weights) for name, weight in zip(names, weights, strict=True)}
    available = dict(zip(names, rows, strict=False))
    caps = dict(zip(names, epochs, strict=False))
    can_give = repeatable_rows(available, caps)
    total = mixable_rows(shares, can_give, 10_000)
    budget = row_budget(shares, total)
    assert all(budget[name] <= can_give[name] <= available[name] * caps[name] for name in names)
    assert any(shares[name] * (total + 1) > can_give[name] - 1e-6 for name in names)
    _, source_N, row_N = interleave_order(budget, seed=0, available=available)
    for number, name in enumerate(names):
        often = np.bincount(row_N[source_N == number], minlength=max(1, available[name]))
        assert often.max() <= np.ceil(caps[name])


@given(count_table, st.integers(0, 3))
def test_the_order_is_that_of_the_points_of_all_rows(counts: dict[str, int], seed: int) -> None:
    rows = rows_of(counts)
    mixed = interleave(rows, seed=seed).tolist()
    assert mixed == slow_interleave(rows, seed)
    names, source_N, row_N = interleave_order(counts, seed=seed, available=counts)
    picked = [rows[names[s]][r].tolist() for s, r in zip(source_N, row_N, strict=True)]
    assert picked == mixed
    assert source_N.dtype == np.uint8 and row_N.dtype == np.int64


def test_of_more_rows_than_are_wanted_the_first_ones_are_taken() -> None:
    _, _, row_N = interleave_order({"a": 5}, seed=0, available={"a": 9})
    np.testing.assert_array_equal(row_N, interleave_order({"a": 5}, seed=0)[2])


@given(count_table, st.dictionaries(st.sampled_from("abcdef"), st.integers(1, 30)))
def test_epochs_differ_by_at_most_one(counts: dict[str, int], more: dict[str, int]) -> None:
    available = {name: more[name] if name in more else max(1, n) for name, n in counts.items()}
    names, source_N, row_N = interleave_order(counts, seed=3, available=available)
    assert Counter(names[number] for number in source_N) == Counter(counts) + Counter()
    for number, name in enumerate(names):
        drawn, rows = row_N[source_N == number], min(available[name], max(1, counts[name]))
        often = np.bincount(drawn, minlength=rows)
        assert len(often) == rows
        assert often.max() - often.min() <= 1
        for start in range(0, counts[name], rows):
            epoch = drawn[start : start + rows]
            assert len(set(epoch.tolist())) == len(epoch)


def test_each_epoch_has_an_order_of_its_own() -> None:
    _, _, row_N = interleave_order({"a": 150}, seed=0, available={"a": 50})
    epochs = row_N.reshape(3, 50)
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert (epochs[0] == epochs[1]).sum() < 10 and (epochs[1] == epochs[2]).sum() < 10
    names, source_N, both_N = interleave_order(
        {"a": 150, "b": 150}, seed=0, available={"a": 50, "b": 50}
    )
    other = both_N[source_N == names.index("b")].reshape(3, 50)
    reseeded = interleave_order({"a": 150}, seed=1, available={"a": 50})[2].reshape(3, 50)
    for epoch in range(3):
        assert not np.array_equal(other[epoch], epochs[epoch])
        assert not np.array_equal(reseeded[epoch], epochs[epoch])
    np.testing.assert_array_equal(
        epochs[0], np.random.default_rng(derive(0, "data", "a", "rows")).permutation(50)
    )


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(0, 5))
def test_every_prefix_holds_the_mixture(a: int, b: int, c: int, seed: int) -> None:
    counts = {"a": a, "b": b, "c": c}
    _, source_N, _ = interleave_order(counts, seed=seed, available={"a": 7, "b": 300, "c": 100})
    total = sum(counts.values())
    for number, count in enumerate(counts.values()):
        seen = np.cumsum(source_N == number)
        share = count / total
        # At any point each source is less than a row off, and their sum is the place.
        assert np.abs(seen - share * np.arange(1, total + 1)).max() <= 1 + share * len(counts)
        assert seen[-1] == count


def test_mixing_loses_no_row_and_depends_on_nothing_but_the_seed() -> None:
    rows = rows_of({"a": 10, "b": 10})
    mixed = interleave(rows, seed=0)
    assert sorted(map(tuple, mixed)) == sorted(map(tuple, np.concatenate([*rows.values()])))
    np.testing.assert_array_equal(mixed, interleave({name: rows[name] for name in "ba"}, seed=0))
    assert not np.array_equal(mixed, interleave(rows, seed=1))


def test_hundreds_of_sources_have_numbers() -> None:
    names, source_N, _ = interleave_order({f"s{n:03}": 2 for n in range(300)}, seed=0)
    assert source_N.dtype == np.uint16
    assert sorted(source_N.tolist()) == sorted([*range(300)] * 2)
    assert names[299] == "s299"
    empty, source_N, row_N = interleave_order({}, seed=0)
    assert empty == () and len(source_N) == len(row_N) == 0

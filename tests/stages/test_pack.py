"""Promises of packing and mixing."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.pack import frame, interleave, mixable_rows, pack, row_budget, take_until
from stages.framing import BOS_ID, EOS_ID

document_list = st.lists(
    st.lists(st.integers(2, 99), max_size=12).map(lambda ids: frame(np.array(ids, dtype=np.int32))),
    min_size=1,
    max_size=12,
)


def test_a_document_stands_between_its_boundaries() -> None:
    assert frame(np.array([5, 6], dtype=np.int32)).tolist() == [BOS_ID, 5, 6, EOS_ID]


@given(document_list, st.integers(2, 9), st.integers(1, 9))
def test_rows_are_the_documents_end_to_end(
    documents: list[np.ndarray], length: int, max_rows: int
) -> None:
    rows = pack(documents, sequence_tokens=length, max_rows=max_rows)
    stream = np.concatenate(documents)
    assert len(rows) == min(max_rows, len(stream) // length)
    np.testing.assert_array_equal(rows.reshape(-1), stream[: rows.size])


@given(document_list, st.integers(2, 9))
def test_padding_loses_no_token_and_adds_only_what_is_never_scored(
    documents: list[np.ndarray], length: int
) -> None:
    packed = pack(documents, sequence_tokens=length, max_rows=1000, pad=True).reshape(-1)
    stream = np.concatenate(documents)
    np.testing.assert_array_equal(packed[: len(stream)], stream)
    assert set(packed[len(stream) :].tolist()) <= {BOS_ID}
    assert len(packed) - len(stream) < length


def test_taking_stops_as_soon_as_there_is_enough() -> None:
    documents = iter([np.zeros(4, dtype=np.int32)] * 9)
    assert len(take_until(documents, 8)) == 2
    assert len(list(documents)) == 6  # one more was looked at, none was used


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


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 300), st.integers(0, 5))
def test_every_prefix_holds_the_mixture(a: int, b: int, c: int, seed: int) -> None:
    counts = {"a": a, "b": b, "c": c}
    rows = {
        name: np.full((count, 4), number, dtype=np.int32)
        for number, (name, count) in enumerate(counts.items())
    }
    mixed = interleave(rows, seed=seed)[:, 0]
    total = sum(counts.values())
    for number, count in enumerate(counts.values()):
        seen = np.cumsum(mixed == number)
        ideal = np.arange(1, total + 1) * count / total
        assert np.abs(seen - ideal).max() <= len(counts)
        assert seen[-1] == count


def test_mixing_loses_no_row_and_depends_on_nothing_but_the_seed() -> None:
    rows = {
        name: np.arange(at, at + 40, dtype=np.int32).reshape(10, 4)
        for name, at in (("a", 0), ("b", 100))
    }
    mixed = interleave(rows, seed=0)
    assert sorted(map(tuple, mixed)) == sorted(map(tuple, np.concatenate([*rows.values()])))
    np.testing.assert_array_equal(mixed, interleave({name: rows[name] for name in "ba"}, seed=0))
    assert not np.array_equal(mixed, interleave(rows, seed=1))

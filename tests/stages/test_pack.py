"""Promises of packing."""

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data import pack as packing
from stages.data.pack import (
    Filling,
    Int32,
    best_fit_rows,
    concat_rows,
    fill_in_middle,
    filling,
    frame,
    is_fim,
    pack,
    take_until,
)
from stages.framing import BOS_ID, EOS_ID

document_list = st.lists(
    st.lists(st.integers(2, 99), max_size=25).map(lambda ids: frame(np.array(ids, dtype=np.int32))),
    min_size=1,
    max_size=30,
)
small_blocks = st.sampled_from([1, 40, 1 << 20])
"""Tokens of a block."""


@pytest.fixture(autouse=True)
def _blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK_TOKENS", packing.BLOCK_TOKENS)


def joined(blocks: Iterator[Int32], length: int) -> Int32:
    found = list(blocks)
    assert all(len(block) and block.dtype == np.int32 for block in found)
    return np.concatenate([np.empty((0, length), dtype=np.int32), *found])


def slow_concat(documents: Sequence[Int32], length: int, *, pad: bool) -> list[list[int]]:
    """Rows of the documents end to end, token by token."""
    rows: list[list[int]] = []
    row: list[int] = []
    for document in documents:
        for token in document.tolist():
            row.append(token)
            if len(row) == length:
                rows.append(row)
                row = []
    if pad and row:
        rows.append(row + [BOS_ID] * (length - len(row)))
    return rows


def slow_best_fit(documents: Sequence[Int32], length: int, window: int) -> list[list[int]]:
    """The rows of `best_fit_rows` by looking at every open row for every document."""
    closed: list[list[int]] = []
    opened: list[list[int]] = []
    for document in documents:
        tokens, is_rest = document.tolist(), False
        while len(tokens) >= length:
            closed.append(tokens[:length])
            tokens, is_rest = tokens[length:], True
        if not tokens:
            continue
        fits = [row for row in opened if not is_rest and len(row) + len(tokens) <= length]
        if not fits:
            if len(opened) == window:
                fullest = max(opened, key=len)
                # By identity: two rows may hold the same tokens.
                opened = [row for row in opened if row is not fullest]
                closed.append(fullest)
            opened.append([])
            fits = [opened[-1]]
        row = max(fits, key=len)
        row += tokens
        if len(row) == length:
            opened = [one for one in opened if one is not row]
            closed.append(row)
    return [row + [BOS_ID] * (length - len(row)) for row in [*closed, *opened]]


def parts(row: list[int]) -> list[list[int]]:
    """What a row holds, parted at each BOS; padding are parts of a BOS alone."""
    starts = [0, *(place for place, token in enumerate(row) if token == BOS_ID and place)]
    return [row[start:end] for start, end in zip(starts, [*starts[1:], len(row)], strict=True)]


def test_a_document_stands_between_its_boundaries() -> None:
    framed = frame(np.array([5, 6], dtype=np.int32))
    assert framed.tolist() == [BOS_ID, 5, 6, EOS_ID]
    assert framed.dtype == np.int32


@given(document_list, st.integers(2, 9), st.integers(0, 9), st.booleans())
def test_rows_are_the_documents_end_to_end(
    documents: list[Int32], length: int, max_rows: int, pad: bool
) -> None:
    rows = pack(iter(documents), sequence_tokens=length, max_rows=max_rows, pad=pad)
    assert rows.tolist() == slow_concat(documents, length, pad=pad)[:max_rows]
    assert rows.dtype == np.int32 and rows.shape[1] == length


@given(document_list, st.integers(2, 9), st.booleans(), small_blocks)
def test_blocks_of_any_size_hold_the_same_rows(
    documents: list[Int32], length: int, pad: bool, block_tokens: int
) -> None:
    packing.BLOCK_TOKENS = block_tokens
    rows = joined(concat_rows(documents, sequence_tokens=length, pad=pad), length)
    assert rows.tolist() == slow_concat(documents, length, pad=pad)


@given(document_list, st.integers(2, 9))
def test_padding_loses_no_token_and_adds_only_what_is_never_scored(
    documents: list[Int32], length: int
) -> None:
    packed = pack(documents, sequence_tokens=length, max_rows=1000, pad=True).reshape(-1)
    stream = np.concatenate(documents)
    np.testing.assert_array_equal(packed[: len(stream)], stream)
    assert set(packed[len(stream) :].tolist()) <= {BOS_ID}
    assert len(packed) - len(stream) < length


@pytest.mark.parametrize("method", [concat_rows, best_fit_rows])
def test_no_more_is_read_than_a_block_needs(method: type[Iterator[Int32]]) -> None:
    packing.BLOCK_TOKENS = 64
    seen = 0

    def documents() -> Iterator[Int32]:
        nonlocal seen
        for _ in range(1000):
            seen += 1
            yield frame(np.full(6, 9, dtype=np.int32))

    blocks = method(documents(), sequence_tokens=8)  # type: ignore[call-arg]
    assert seen == 0
    for number in range(1, 4):
        assert next(blocks).shape == (8, 8)
        assert seen == 8 * number


@given(document_list, st.integers(2, 30), st.integers(1, 6), small_blocks)
def test_best_fit_is_what_looking_at_every_open_row_finds(
    documents: list[Int32], length: int, window: int, block_tokens: int
) -> None:
    packing.BLOCK_TOKENS = block_tokens
    rows = joined(best_fit_rows(documents, sequence_tokens=length, window=window), length)
    assert rows.tolist() == slow_best_fit(documents, length, window)


@given(document_list, st.integers(2, 30), st.integers(1, 6))
def test_best_fit_keeps_documents_whole_and_loses_no_token(
    documents: list[Int32], length: int, window: int
) -> None:
    rows = joined(best_fit_rows(documents, sequence_tokens=length, window=window), length)
    whole, begun, rests = Counter[tuple[int, ...]](), [], []
    for row in rows.tolist():
        content = row
        while content[-1] == BOS_ID:
            content = content[:-1]
        for place, part in enumerate(parts(content)):
            if part[0] == BOS_ID and part[-1] == EOS_ID:
                whole[tuple(part)] += 1
            elif part[0] == BOS_ID:
                assert place == 0 and len(part) == length, "a document is cut where it could fit"
                begun.append(part)
            else:
                assert place == 0, "a rest stands behind another document"
                rests.append(part)
    fitting = [document for document in documents if len(document) <= length]
    assert whole == Counter(tuple(document.tolist()) for document in fitting)
    longer = [document for document in documents if len(document) > length]
    cut_rows = [
        document[start : start + length].tolist()
        for document in longer
        for start in range(0, len(document), length)
    ]
    assert sorted([*begun, *rests]) == sorted(cut_rows)
    assert (rows.size - sum(map(len, documents))) == filling(rows).padding_tokens
    assert filling(rows).cut_documents == len(longer)


def test_a_document_goes_where_it_leaves_the_least_space() -> None:
    documents = [frame(np.full(size - 2, 10 + size, dtype=np.int32)) for size in (5, 7, 3, 4)]
    rows = joined(best_fit_rows(documents, sequence_tokens=10), 10)
    # 3 would fit behind 5, but leaves nothing behind 7.
    assert rows[0].tolist() == [0, 17, 17, 17, 17, 17, 1, 0, 13, 1]
    assert rows[1].tolist() == [0, 15, 15, 15, 1, 0, 14, 14, 1, 0]


def test_best_fit_wastes_little_on_documents_of_many_lengths() -> None:
    rng = np.random.default_rng(0)
    lengths = np.minimum(rng.lognormal(5.5, 1.2, 4000).astype(int) + 3, 20_000)
    documents = [frame(np.full(length - 2, 7, dtype=np.int32)) for length in lengths]
    rows = joined(best_fit_rows(documents, sequence_tokens=2048), 2048)
    packed, end_to_end = (
        filling(rows),
        filling(pack(documents, sequence_tokens=2048, max_rows=9999)),
    )
    assert packed.padding_tokens < 0.02 * rows.size
    assert packed.cut_documents == (lengths > 2048).sum() < 0.3 * end_to_end.cut_documents


def test_what_packing_costs_is_counted_in_the_rows() -> None:
    rows = np.array(
        [[0, 5, 1, 0, 6, 7], [7, 7, 7, 7, 7, 7], [7, 1, 0, 8, 1, 0], [0, 8, 1, 0, 0, 0], [0] * 6],
        dtype=np.int32,
    )
    assert filling(rows) == Filling(rows=5, padding_tokens=1 + 3 + 6, cut_documents=1)
    assert filling(rows[:2]) + filling(rows[2:]) == filling(rows)


def test_taking_stops_as_soon_as_there_is_enough() -> None:
    documents = iter([np.zeros(4, dtype=np.int32)] * 9)
    assert len(take_until(documents, 8)) == 2
    assert len(list(documents)) == 6  # one more was looked at, none was used


FIM = (900, 901, 902)


@given(st.integers(3, 40), st.integers(0, 2**63 - 1))
def test_the_middle_is_asked_for_and_the_document_can_be_put_together_again(
    length: int, seed: int
) -> None:
    document = np.arange(10, 10 + length, dtype=np.int32)
    asked = fill_in_middle(document, FIM, seed=seed)
    assert asked.dtype == np.int32
    begin, hole, end = (asked.tolist().index(number) for number in FIM)
    assert begin == 0 < hole < end
    prefix, suffix, middle = asked[1:hole], asked[hole + 1 : end], asked[end + 1 :]
    assert all(map(len, (prefix, suffix, middle)))
    np.testing.assert_array_equal(np.concatenate([prefix, middle, suffix]), document)
    np.testing.assert_array_equal(fill_in_middle(document, FIM, seed=seed), asked)


def test_every_pair_of_cuts_is_as_likely() -> None:
    rng = np.random.default_rng(0)
    document = np.arange(6, dtype=np.int32)
    found = Counter(
        tuple(fill_in_middle(document, FIM, seed=int(seed)).tolist())
        for seed in rng.integers(2**62, size=5000)
    )
    assert len(found) == 10
    assert all(400 < count < 600 for count in found.values())


@pytest.mark.parametrize("length", [0, 1, 2])
def test_a_document_without_room_for_three_parts_stays(length: int) -> None:
    document = np.arange(10, 10 + length, dtype=np.int32)
    np.testing.assert_array_equal(fill_in_middle(document, FIM, seed=3), document)


def test_the_draw_depends_on_the_document_and_keeps_to_its_rate() -> None:
    names = [f"file-{number}.txt" for number in range(4000)]
    asked = {name for name in names if is_fim(0, name, 0.1)}
    assert 300 < len(asked) < 500
    assert asked <= {name for name in names if is_fim(0, name, 0.2)}
    assert asked != {name for name in names if is_fim(1, name, 0.1)}
    assert all(is_fim(0, name, 1.0) and not is_fim(0, name, 0.0) for name in names)

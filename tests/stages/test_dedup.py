"""Promises of exact deduplication and of the held-out split."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.dedup import Seen, digest, hold_out
from stages.data.ingest import Document


def documents(*texts: str, source: str = "mine") -> list[Document]:
    return [Document(source, f"{number}.txt", text) for number, text in enumerate(texts)]


def test_the_first_of_equal_documents_is_kept_across_sources() -> None:
    seen = Seen()
    first, second = documents("Some text", "other text")
    repeat = documents("some\n  TEXT", source="yours")[0]
    assert [seen.check(one) is None for one in (first, second, repeat)] == [True, True, False]
    drop = seen.check(repeat)
    assert drop is not None
    assert (drop.rule, drop.value, drop.source) == ("exact_duplicate", "mine/0.txt", "yours")


@pytest.mark.parametrize("other", ["a  b", "a\nb", "A B", " a b "])
def test_case_and_white_space_make_no_other_document(other: str) -> None:
    assert digest("a b") == digest(other)


def test_two_spellings_of_one_character_are_one() -> None:
    assert digest("\u00e9t\u00e9") == digest("e\u0301te\u0301")


def test_words_run_together_are_another_document() -> None:
    assert digest("a b") != digest("ab")


@given(st.sets(st.integers(0, 99), min_size=2, max_size=20).map(sorted), st.floats(0.001, 0.499))
def test_every_document_is_on_one_side_and_neither_side_is_empty(
    texts: list[int], share: float
) -> None:
    everything = documents(*map(str, texts))
    train, held = hold_out(everything, share, seed=0)
    assert train and held
    assert sorted(one.id for one in train + held) == sorted(one.id for one in everything)


def test_the_split_is_by_content_and_adding_documents_moves_none() -> None:
    few = documents(*(f"text {n}" for n in range(200)))
    more = documents(*(f"text {n}" for n in range(399, -1, -1)))
    held_few = {one.text for one in hold_out(few, 0.1, seed=0)[1]}
    held_more = {one.text for one in hold_out(more, 0.1, seed=0)[1]}
    assert held_few == held_more & {one.text for one in few}


def test_the_share_held_out_is_the_share_asked() -> None:
    held = hold_out(documents(*map(str, range(4000))), 0.1, seed=0)[1]
    assert 0.1 - 0.02 < len(held) / 4000 < 0.1 + 0.02  # four standard deviations


def test_another_seed_holds_out_other_documents() -> None:
    texts = documents(*map(str, range(100)))
    assert hold_out(texts, 0.1, seed=0) != hold_out(texts, 0.1, seed=1)

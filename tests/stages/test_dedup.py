"""Promises of exact deduplication."""

import pytest

from stages.data.dedup import Seen, digest
from stages.data.files import Document


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

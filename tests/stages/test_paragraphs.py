"""Promises of paragraphs' keys, and of texts without what tells no two apart."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data import paragraphs as tested
from stages.data.paragraphs import paragraphs, plain

ALPHABET = "abAB \n\n\t\r.\x1f\x85\u2003éÄe\u0301İß🙂\ud800"


def twin(text: str, least: int) -> list[tuple[str, str]]:
    """Each paragraph as it stands and what it is compared by, found line by line."""
    blocks, block = list[str](), ""
    for line in text.split("\n"):
        if line.strip():
            block += line + "\n"
        else:
            blocks, block = [*blocks, block], ""
    found = [(one.strip(), "".join(one.lower().split())) for one in [*blocks, block]]
    return [(one, folded) for one, folded in found if folded and len(folded) >= least]


@given(st.text(ALPHABET, max_size=80), st.integers(0, 5))
def test_paragraphs_are_what_stands_between_blank_lines(text: str, least: int) -> None:
    spans, keys = paragraphs(text, least)
    expected = twin(text, least)
    assert spans.shape == (len(keys), 2)
    assert [str(one.dtype) for one in (spans, keys)] == ["int64", "uint64"]
    assert [text[first:last] for first, last in spans] == [one for one, _ in expected]
    names = [folded for _, folded in expected]
    assert [keys.tolist().index(key) for key in keys] == [names.index(name) for name in names]


def test_capitals_and_white_space_make_no_other_paragraph() -> None:
    spans, keys = paragraphs("\n\n  Some text.\n\nother\n \t\nSOME\n  text.\r\n\r\nsomé text.", 6)
    assert spans.tolist() == [[4, 14], [25, 37], [41, 51]]
    assert keys[0] == keys[1] != keys[2]
    assert keys[0] == paragraphs("some text.\n\nÉ", 1)[1][0]


@given(st.text(ALPHABET, max_size=80) | st.text(ALPHABET[:12], max_size=80), st.integers(0, 100))
def test_plain_text_is_words_with_single_spaces(text: str, split_chars: int) -> None:
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tested, "_SPLIT_CHARS", split_chars)
        found = plain(text)
    normal = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    assert found == normal.encode("utf-8", "surrogatepass")

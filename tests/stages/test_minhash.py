"""Promises of MinHash: what shingles are, how well signatures estimate, what bands find."""

import tracemalloc
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data import minhash
from stages.data.minhash import (
    BANDS,
    PERMUTATIONS,
    ROWS,
    SHINGLE_WORDS,
    band_keys,
    jaccard,
    shingle_set,
    signatures,
)

ALPHABET = "abcAB_19 \n\t\u2003.,-!éÄЖσΣİ\u0130\u0301漢字ひカ한กཀ🙂👍𝔸𠀀\ud800\x00\xad"
TEXTS = st.one_of(
    st.text(ALPHABET, max_size=60),
    st.lists(st.sampled_from(["one", "TWO", "drei_3", "naïve", "漢字", "x" * 70, "🙂", "élan" * 4]))
    .map(" ".join)
    .filter(lambda text: len(text) < 400),
)
ALONE = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI")


def twin(text: str) -> set[tuple[str, ...]]:
    """Shingles as tuples of words, found character by character."""
    words, word = list[str](), ""
    for c in text.lower():
        alone = c.isalnum() and unicodedata.name(c, "").startswith(ALONE)
        if (alone or not (c.isalnum() or c == "_")) and word:
            words.append(word)
            word = ""
        if alone:
            words.append(c)
        elif c.isalnum() or c == "_":
            word += c
    words += [word] if word else []
    if not words:
        visible = "".join(text.lower().split())
        return {("", visible)} if visible else set()
    last = max(len(words) - SHINGLE_WORDS, 0)
    return {tuple(words[i : i + SHINGLE_WORDS]) for i in range(last + 1)}


def prose(rng: np.random.Generator, words: int) -> str:
    return " ".join(f"w{number}" for number in rng.integers(0, 50_000, words))


def twos(texts: list[str]) -> list[tuple[str, str]]:
    return list(zip(texts[::2], texts[1::2], strict=True))


def pairs(similarity: float, count: int, words: int) -> list[str]:
    """Texts of which each two in turn are about so similar."""
    rng, texts = np.random.default_rng(int(1000 * similarity)), list[str]()
    shared = round(words * 2 * similarity / (1 + similarity))
    for _ in range(count):
        common = prose(rng, shared)
        texts += [common + " " + prose(rng, words - shared) for _ in range(2)]
    return texts


@settings(max_examples=300, deadline=None)
@given(TEXTS, TEXTS, st.booleans())
def test_similarity_is_that_of_sets_of_runs_of_words(one: str, other: str, joined: bool) -> None:
    other = one + " " + other if joined else other
    a, b = twin(one), twin(other)
    assert len(shingle_set(one)) == len(a)
    assert jaccard(shingle_set(one), shingle_set(other)) == len(a & b) / max(len(a | b), 1)


@settings(max_examples=60, deadline=None)
@given(st.lists(TEXTS, max_size=8), st.integers(1, 9))
def test_no_text_depends_on_those_it_is_hashed_with(texts: list[str], slice_: int) -> None:
    alone = [signatures([text])[0] for text in texts]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(minhash, "_SLICE", slice_)
        patched.setattr(minhash, "_BLOCK_CHARS", 10 * slice_)
        together = signatures(texts)
    assert together.shape == (len(texts), PERMUTATIONS)
    assert together.dtype == np.uint32
    assert all(np.array_equal(one, row) for one, row in zip(alone, together, strict=True))


@pytest.mark.parametrize("words", [60, 2_000])
@pytest.mark.parametrize("similarity", [0.5, 0.7, 0.8, 0.9])
def test_signatures_estimate_similarity_without_bias_as_random_orders_would(
    similarity: float, words: int
) -> None:
    texts = pairs(similarity, 400, words)
    exact = np.array([jaccard(*map(shingle_set, two)) for two in twos(texts)])
    rows = signatures(texts)
    errors = (rows[::2] == rows[1::2]).mean(axis=1) - exact
    binomial = (exact * (1 - exact)).mean() / PERMUTATIONS
    assert abs(exact.mean() - similarity) < 0.05
    assert abs(errors.mean()) < 4 * np.sqrt(binomial / len(errors))
    assert abs((errors**2).mean() / binomial - 1) < 4 * np.sqrt(2 / len(errors))


@pytest.mark.parametrize("similarity", [0.3, 0.5, 0.7, 0.8, 0.9])
def test_bands_find_as_many_pairs_as_the_formula_says(similarity: float) -> None:
    texts = pairs(similarity, 500, 200)
    keys = band_keys(signatures(texts))
    assert keys.shape == (1000, BANDS)
    found = (keys[::2] == keys[1::2]).any(axis=1)
    exact = np.array([jaccard(*map(shingle_set, two)) for two in twos(texts)])
    expected = 1 - (1 - exact**ROWS) ** BANDS
    spread = np.sqrt((expected * (1 - expected)).sum())
    assert abs(found.sum() - expected.sum()) <= 4 * spread + 0.5


def test_bands_find_what_they_must() -> None:
    assert 1 - (1 - 0.8**ROWS) ** BANDS >= 0.995
    assert 1 - (1 - 0.7**ROWS) ** BANDS >= 0.9


def test_equal_rows_of_different_bands_have_different_keys() -> None:
    keys = band_keys(np.full((3, PERMUTATIONS), 7, np.uint32))
    assert len(np.unique(keys[0])) == BANDS
    assert (keys == keys[0]).all()
    other = np.full((1, PERMUTATIONS), 7, np.uint32)
    other[0, ROWS] = 8
    assert (band_keys(other) != keys[:1]).tolist() == [[False, True] + [False] * (BANDS - 2)]
    moved = np.tile(np.arange(ROWS, dtype=np.uint32), BANDS)
    assert not (band_keys(moved[None]) == band_keys(moved[None, ::-1].copy())).any()


@pytest.mark.parametrize(
    "other",
    [
        "the CAT sat on the Mat today",
        "The cat, sat (on) the\n\n mat; today!",
        "\tthe cat sat “on” the — mat today…\u2003",
    ],
)
def test_case_punctuation_and_white_space_make_no_difference(other: str) -> None:
    text = "The cat sat on the mat today."
    assert len(shingle_set(text)) == 3
    assert np.array_equal(shingle_set(text), shingle_set(other))
    assert np.array_equal(signatures([text]), signatures([other]))


def test_characters_of_scripts_without_spaces_are_words() -> None:
    assert len(shingle_set("我们今天去学校")) == len(shingle_set("我们 今天, 去学校")) == 3
    assert np.array_equal(shingle_set("我们今天去学校"), shingle_set("我 们 今 天 去 学 校"))
    assert len(shingle_set("เราไปโรงเรียน")) > 1
    assert len(shingle_set("Привет")) == len(shingle_set("naïveté")) == 1


def test_white_space_alone_is_like_nothing_and_signs_are_like_themselves() -> None:
    nothing = shingle_set(" \n\u2003")
    assert len(nothing) == 0
    assert jaccard(nothing, nothing) == jaccard(nothing, shingle_set("a")) == 0
    rows = signatures(["", "🙂 🙂", "", "one", "🙂🙂", " ", "?!"])
    assert (rows[[0, 2, 5]] == 2**32 - 1).all()
    assert np.array_equal(rows[1], rows[4])
    assert not (rows[1] == rows[3]).any()
    assert jaccard(shingle_set("🙂🙂"), shingle_set("?!")) == 0
    assert jaccard(shingle_set("one"), shingle_set("One!")) == 1
    assert jaccard(shingle_set("one"), shingle_set("one two")) == 0
    assert signatures([]).shape == (0, PERMUTATIONS)


def test_words_are_told_apart_to_their_last_letter() -> None:
    words = ["x" * length for length in range(1, 140)]
    words += ["x" * at + "y" + "x" * (99 - at) for at in range(100)]
    words += ["x" * at + "é" + "x" * (60 - at) for at in range(60)]
    assert len({int(shingle_set(word)[0]) for word in words}) == len(words)


@pytest.mark.parametrize("kind", ["prose", "one word", "Chinese"])
def test_a_huge_document_takes_a_few_times_its_size(kind: str) -> None:
    rng = np.random.default_rng(0)
    text = {
        "prose": prose(rng, 750_000),
        "one word": "a" * 5_000_000,
        "Chinese": "".join(map(chr, rng.integers(0x4E00, 0x9000, 1_700_000))),
    }[kind]
    tracemalloc.start()
    try:
        signatures([text])
        assert tracemalloc.get_traced_memory()[1] < 20 * len(text.encode())
    finally:
        tracemalloc.stop()

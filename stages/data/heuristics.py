"""What the published rules for prose of the web measure of texts (`configs/quality_rules.py`).

What counts as a word, a line and a paragraph is said in `stages/data/texts.py`. A share of
characters is one of those that the lines, paragraphs or words hold, so that it lies between 0 and
1; of nothing, every share is 0. What repeats is counted without its first place.

Axes: D texts, W words, L lines.
"""

from collections.abc import Callable
from functools import cache

import numpy as np
import numpy.typing as npt

from stages.data.repetition import Float64, Int64, Uint64, largest, shares, sums
from stages.data.texts import BULLET, CLOSING, DASH, ENDING, LETTER, TERMINAL, Texts, hashes

Measure = Callable[[Texts], Float64 | Int64]
"""A number for each text."""

_STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
_NOTICES = (
    *(b"javascript", b"terms of use", b"privacy policy", b"cookie policy"),
    *(b"uses cookies", b"use of cookies", b"use cookies"),
)
_LOREM = b"lorem ipsum"
_SHORT_LINE_CHARS = 30
_SLOT_SHIFT = np.uint64(64 - 12)


def _mean_word_chars(texts: Texts) -> Float64:
    return shares(_in_texts(texts.chars_W, texts.edges_W), texts.num_words_D)


def _per_word(*parts: str) -> Measure:
    """How often one of these stands in a text, for each of its words."""

    def measure(texts: Texts) -> Float64:
        times = [sum(map(text.count, parts)) for text in texts.texts]
        return shares(times, texts.num_words_D)

    return measure


def _bullet_lines(texts: Texts) -> Float64:
    """The part of the lines that begin with a bullet, or with a dash or star that stands alone."""
    kinds_L = texts.kinds_C[texts.begins_L]
    alone_L = texts.chars_W[texts.first_words_L] == 1
    return _of_lines(texts, (kinds_L & BULLET != 0) | (kinds_L & DASH != 0) & alone_L)


def _ellipsis_lines(texts: Texts) -> Float64:
    """The part of the lines that end in three dots."""
    codes_C, ends_L = texts.codes_C, texts.ends_L
    # What is before a shorter line is white space, or, of the first, the line feed at the end.
    dots_L = np.logical_and.reduce([codes_C[ends_L - back] == ord(".") for back in (1, 2, 3)])
    return _of_lines(texts, dots_L | (codes_C[ends_L - 1] == ord("…")))


def _letter_words(texts: Texts) -> Float64:
    """The part of the words that hold a letter."""
    if not len(texts.begins_W):
        return np.zeros(len(texts.texts))
    kinds_W = np.bitwise_or.reduceat(texts.kinds_C, texts.begins_W)
    return shares(_in_texts(kinds_W & LETTER != 0, texts.edges_W), texts.num_words_D)


def _stop_words(texts: Texts) -> Int64:
    """How many of the eight stand in a text as words: small, with a capital, or in capitals."""
    known, which, slots = _stop_hashes()
    # Most words are told from these by their first bits.
    maybe = slots[texts.words_W >> _SLOT_SHIFT].nonzero()[0]
    at = known.searchsorted(texts.words_W[maybe])
    at[at == len(known)] = 0
    found = known[at] == texts.words_W[maybe]
    seen = np.zeros((len(texts.texts), len(_STOP_WORDS)), np.bool_)
    seen[texts.texts_W[maybe[found]], which[at[found]]] = True
    found_D: Int64 = seen.sum(axis=1, dtype=np.int64)
    return found_D


@cache
def _stop_hashes() -> tuple[Uint64, Int64, npt.NDArray[np.bool_]]:
    """Of every form of the stop words the hash, ascending, and which of the eight it is; and the
    first bits that they have.
    """
    forms = [form for word in _STOP_WORDS for form in (word, word.capitalize(), word.upper())]
    known = hashes(forms)
    order = known.argsort()
    slots = np.zeros(1 << 12, np.bool_)
    slots[known >> _SLOT_SHIFT] = True
    return known[order], order // (len(forms) // len(_STOP_WORDS)), slots


def _curly_brackets(texts: Texts) -> Int64:
    return np.array([text.count("{") + text.count("}") for text in texts.texts], np.int64)


def _lorem_ipsum(texts: Texts) -> Int64:
    return np.array([lower.count(_LOREM) for lower in texts.lower], np.int64)


def _sentences(texts: Texts) -> Int64:
    """Words with a full stop, `!` or `?` at their end, or before one quotation mark or bracket.

    Abbreviations are counted as well, sentences without white space behind them are not.
    """
    kinds_W = texts.kinds_C[texts.ends_W - 1]
    # What is before a word of one character is white space, or the line feed at the end.
    before_W = texts.kinds_C[texts.ends_W - 2]
    ended_W = (kinds_W & ENDING != 0) | (kinds_W & CLOSING != 0) & (before_W & ENDING != 0)
    return _in_texts(ended_W, texts.edges_W)


def _notice_lines(texts: Texts) -> Float64:
    """The part of the lines that C4 takes out, as they speak of scripts, cookies or terms."""
    told = [_notices(lower) for lower in texts.lower]
    return shares(told, texts.num_lines_D)


def _notices(lower: bytes) -> int:
    """How many lines hold one."""
    present = [notice for notice in _NOTICES if notice in lower]
    if not present:
        return 0
    return sum(any(notice in line for notice in present) for line in lower.split(b"\n"))


def _repeated_chars(texts: Texts) -> Float64:
    """The part of the lines' characters in those that repeat an earlier one."""
    repeated_L = texts.chars_L * texts.again_L
    return shares(_in_texts(repeated_L, texts.edges_L), _in_texts(texts.chars_L, texts.edges_L))


def _repeated_paragraphs(texts: Texts) -> Float64:
    return shares(_in_texts(texts.again_P, texts.edges_P), texts.num_paragraphs_D)


def _repeated_paragraph_chars(texts: Texts) -> Float64:
    repeated_P = texts.chars_P * texts.again_P
    return shares(_in_texts(repeated_P, texts.edges_P), _in_texts(texts.chars_P, texts.edges_P))


def _in_texts(values: npt.NDArray[np.integer | np.bool_], edges: Int64) -> Int64:
    """The sum of each text's values."""
    total = sums(values)
    return total[edges[1:]] - total[edges[:-1]]


def _of_lines(texts: Texts, holds_L: npt.NDArray[np.bool_]) -> Float64:
    """The part of the lines of which this is true."""
    return shares(_in_texts(holds_L, texts.edges_L), texts.num_lines_D)


def _top(num_words: int) -> Measure:
    return lambda texts: texts.repetition.top_share(num_words)


def _duplicate(num_words: int) -> Measure:
    return lambda texts: texts.repetition.duplicate_share(num_words)


MEASURES: dict[str, Measure] = {
    "gopher_min_words": lambda texts: texts.num_words_D,
    "gopher_max_words": lambda texts: texts.num_words_D,
    "gopher_min_mean_word_chars": _mean_word_chars,
    "gopher_max_mean_word_chars": _mean_word_chars,
    "gopher_max_hashes_per_word": _per_word("#"),
    "gopher_max_ellipses_per_word": _per_word("...", "…"),
    "gopher_max_bullet_lines": _bullet_lines,
    "gopher_max_ellipsis_lines": _ellipsis_lines,
    "gopher_min_letter_words": _letter_words,
    "gopher_min_stop_words": _stop_words,
    "c4_max_curly_brackets": _curly_brackets,
    "c4_max_lorem_ipsum": _lorem_ipsum,
    "c4_max_word_chars": lambda texts: largest(texts.chars_W, texts.edges_W),
    "c4_min_sentences": _sentences,
    "c4_max_notice_lines": _notice_lines,
    "fineweb_min_terminal_lines": lambda texts: _of_lines(
        texts, texts.kinds_C[texts.ends_L - 1] & TERMINAL != 0
    ),
    "fineweb_max_short_lines": lambda texts: _of_lines(texts, texts.chars_L <= _SHORT_LINE_CHARS),
    "fineweb_max_duplicate_line_chars": _repeated_chars,
    "fineweb_max_line_breaks_per_word": _per_word("\n"),
    "gopher_max_duplicate_lines": lambda texts: _of_lines(texts, texts.again_L),
    "gopher_max_duplicate_paragraphs": _repeated_paragraphs,
    "gopher_max_duplicate_line_chars": _repeated_chars,
    "gopher_max_duplicate_paragraph_chars": _repeated_paragraph_chars,
    "gopher_max_top_2gram_chars": _top(2),
    "gopher_max_top_3gram_chars": _top(3),
    "gopher_max_top_4gram_chars": _top(4),
    "gopher_max_duplicate_5gram_chars": _duplicate(5),
    "gopher_max_duplicate_6gram_chars": _duplicate(6),
    "gopher_max_duplicate_7gram_chars": _duplicate(7),
    "gopher_max_duplicate_8gram_chars": _duplicate(8),
    "gopher_max_duplicate_9gram_chars": _duplicate(9),
    "gopher_max_duplicate_10gram_chars": _duplicate(10),
}
"""What each rule measures, by name."""

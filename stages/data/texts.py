"""Texts cut into lines and words, many at a time: what the rules of quality read.

A word is a run of characters other than white space; tools that split punctuation off words count
some more of them, and shorter ones. A line is what stands between line feeds, without white space
at its ends; empty ones are not counted. Paragraphs are runs of lines, between empty ones.

Everything is an array over all texts, as one call for each text would cost more than its work.
Words, lines and paragraphs are compared by hashes of 64 bits.

Axes: D texts, C characters (of all texts, with a line feed behind each), W words, L lines,
P paragraphs; `edges_W[d]` to `edges_W[d + 1]` are the words of text d.
"""

import unicodedata
from collections.abc import Sequence
from functools import cache, cached_property
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from stages.data.repetition import Bool, Int64, Repetition, Uint64, again, scrambled, sums

LETTER, SPACE, CONTROL, ENDING, CLOSING, TERMINAL, BULLET, DASH = (1 << bit for bit in range(8))
"""Kinds of characters, as bits. CONTROL is control characters other than tab and line breaks, and
replacement characters."""
_CHARS = {
    # What ends a sentence, and what may stand behind that.
    ENDING: ".!?",
    CLOSING: "\"'”’)]»",
    # What ends a line that is a sentence; C4 has these of ASCII.
    TERMINAL: ".!?…\"'”’。！？",
    # What begins an item of a list; dashes and stars only where they stand alone.
    BULLET: "•‣◦▪●",
    DASH: "-*–",
}
_NUM_CODES = 0x110000
_BASE = 0x5851F42D4C957F2D
"""Odd; words and lines are polynomials of it, modulo 2^64."""
_KEPT_POWERS_BITS = 20


class Texts:
    """Some texts, and what several rules ask of them; each part is made when first asked for."""

    def __init__(self, texts: Sequence[str]) -> None:
        """Nothing analysed yet."""
        self.texts = texts
        self.chars_D = np.fromiter(map(len, texts), np.int64, len(texts))
        self.edges_C = sums(self.chars_D + 1)
        self._whole = "\n".join([*texts, ""])

    @cached_property
    def codes_C(self) -> npt.NDArray[np.uint8] | npt.NDArray[np.uint32]:
        """The code points."""
        if self._whole.isascii():
            return np.frombuffer(self._whole.encode("ascii"), np.uint8)
        return np.frombuffer(self._whole.encode("utf-32-le", "surrogatepass"), np.uint32)

    @cached_property
    def kinds_C(self) -> npt.NDArray[np.uint8]:
        """The kinds of each character."""
        return _kinds(128 if self._whole.isascii() else _NUM_CODES).take(self.codes_C)

    @cached_property
    def lower(self) -> list[bytes]:
        """Each text as UTF-8, the capitals of ASCII in small letters."""
        return [text.encode("utf-8", "surrogatepass").lower() for text in self.texts]

    @cached_property
    def breaks(self) -> Int64:
        """Where line feeds are."""
        return np.flatnonzero(self.codes_C == ord("\n"))

    @cached_property
    def _edges(self) -> Int64:
        """Where words begin and where they end, by turns."""
        inside = np.zeros(len(self.codes_C) + 1, np.bool_)
        np.equal(self.kinds_C & SPACE, 0, out=inside[1:])
        return np.flatnonzero(inside[1:] != inside[:-1])

    @cached_property
    def begins_W(self) -> Int64:
        """The first character of each word."""
        return self._edges[::2]

    @cached_property
    def ends_W(self) -> Int64:
        """The character behind each word."""
        return self._edges[1::2]

    @cached_property
    def chars_W(self) -> Int64:
        """The length of each word."""
        return self.ends_W - self.begins_W

    @cached_property
    def edges_W(self) -> Int64:
        """The first word of each text, and how many there are."""
        edges: Int64 = self.begins_W.searchsorted(self.edges_C)
        return edges

    @cached_property
    def num_words_D(self) -> Int64:
        """How many words each text has."""
        return self.edges_W[1:] - self.edges_W[:-1]

    @cached_property
    def texts_W(self) -> Int64:
        """The text of each word."""
        return np.arange(len(self.texts)).repeat(self.num_words_D)

    @cached_property
    def words_W(self) -> Uint64:
        """A hash of each word."""
        return self._hashes(self.begins_W, self.ends_W)

    @cached_property
    def first_words_L(self) -> Int64:
        """The first word of each line."""
        firsts = np.zeros(len(self.breaks) + 1, np.int64)
        firsts[1:] = self.begins_W.searchsorted(self.breaks)
        filled: Int64 = firsts[:-1][firsts[1:] != firsts[:-1]]
        return filled

    @cached_property
    def begins_L(self) -> Int64:
        """The first character of each line."""
        return self.begins_W[self.first_words_L]

    @cached_property
    def ends_L(self) -> Int64:
        """The character behind each line."""
        behind = np.append(self.first_words_L, len(self.ends_W))[1:]
        ends: Int64 = self.ends_W[behind - 1]
        return ends

    @cached_property
    def chars_L(self) -> Int64:
        """The length of each line."""
        return self.ends_L - self.begins_L

    @cached_property
    def edges_L(self) -> Int64:
        """The first line of each text, and how many there are."""
        edges: Int64 = self.begins_L.searchsorted(self.edges_C)
        return edges

    @cached_property
    def num_lines_D(self) -> Int64:
        """How many lines each text has."""
        return self.edges_L[1:] - self.edges_L[:-1]

    @cached_property
    def lines_L(self) -> Uint64:
        """A hash of each line."""
        return self._hashes(self.begins_L, self.ends_L)

    @cached_property
    def again_L(self) -> Bool:
        """Whether each line stands in its text earlier too."""
        texts_L = np.arange(len(self.texts)).repeat(self.num_lines_D)
        return again(self.lines_L ^ scrambled(texts_L))

    @cached_property
    def first_lines_P(self) -> Int64:
        """The first line of each paragraph."""
        breaks_L = self.breaks.searchsorted(self.begins_L)
        first = np.ones(len(breaks_L), np.bool_)
        np.greater(breaks_L[1:] - breaks_L[:-1], 1, out=first[1:])
        first[self.edges_L[:-1][self.num_lines_D > 0]] = True
        return np.flatnonzero(first)

    @cached_property
    def edges_P(self) -> Int64:
        """The first paragraph of each text, and how many there are."""
        edges: Int64 = self.first_lines_P.searchsorted(self.edges_L)
        return edges

    @cached_property
    def num_paragraphs_D(self) -> Int64:
        """How many paragraphs each text has."""
        return self.edges_P[1:] - self.edges_P[:-1]

    @cached_property
    def chars_P(self) -> Int64:
        """How many characters the lines of each paragraph have."""
        before = sums(self.chars_L)[np.append(self.first_lines_P, len(self.chars_L))]
        chars: Int64 = before[1:] - before[:-1]
        return chars

    @cached_property
    def again_P(self) -> Bool:
        """Whether the lines of each paragraph stand in its text as one earlier too."""
        if not self.again_L.any():
            return np.zeros(len(self.first_lines_P), np.bool_)
        powers, inverses = _powers(len(self.lines_L).bit_length())
        mixed_L = scrambled(self.lines_L) * powers[: len(self.lines_L)]
        paragraphs_P = np.add.reduceat(mixed_L, self.first_lines_P) * inverses[self.first_lines_P]
        texts_P = np.arange(len(self.texts)).repeat(self.num_paragraphs_D)
        return again(paragraphs_P ^ scrambled(texts_P))

    @cached_property
    def repetition(self) -> Repetition:
        """Repeated sequences of words."""
        words_W = self.words_W ^ scrambled(np.arange(len(self.texts))).repeat(self.num_words_D)
        return Repetition(words_W, self.chars_W, self.edges_W)

    def count(self, kind: int) -> Int64:
        """How many characters of each text are of this kind."""
        flags_C = self.kinds_C & kind
        edges = pairwise(self.edges_C.tolist())
        return np.array([np.count_nonzero(flags_C[begin:end]) for begin, end in edges], np.int64)

    @cached_property
    def _powers(self) -> tuple[Uint64, Uint64]:
        bits = max(16, len(self.codes_C).bit_length())
        return _powers(bits) if bits > _KEPT_POWERS_BITS else _kept_powers(bits)

    @cached_property
    def _before(self) -> Uint64:
        """The polynomial of the characters before each, and of all."""
        codes_C = self.codes_C
        terms_C = _scrambled_ascii().take(codes_C) if self._whole.isascii() else scrambled(codes_C)
        before = np.zeros(len(codes_C) + 1, np.uint64)
        np.multiply(terms_C, self._powers[0][: len(codes_C)], out=terms_C)
        np.cumsum(terms_C, out=before[1:])
        return before

    def _hashes(self, begins: Int64, ends: Int64) -> Uint64:
        return (self._before[ends] - self._before[begins]) * self._powers[1][begins]


def hashes(words: Sequence[str]) -> Uint64:
    """Those of single words, as `Texts` has them."""
    return Texts(["\n".join(words)]).words_W


@cache
def _kinds(num_codes: int) -> npt.NDArray[np.uint8]:
    """The kinds of the characters with the first so many codes."""
    kinds = np.zeros(num_codes, np.uint8)
    for code, char in enumerate(map(chr, range(num_codes))):
        if char.isalpha():
            kinds[code] = LETTER
        elif char.isspace():
            kinds[code] = SPACE
    control = [chr(code) for code in range(256) if unicodedata.category(chr(code)) == "Cc"]
    chars = _CHARS | {CONTROL: "".join({*control, "\ufffd"} - set("\t\n\r"))}
    for kind, some in chars.items():
        kinds[[ord(char) for char in some if ord(char) < num_codes]] |= kind
    return kinds


@cache
def _scrambled_ascii() -> Uint64:
    return scrambled(np.arange(128))


def _powers(bits: int) -> tuple[Uint64, Uint64]:
    """The first 2^bits powers of the base, and of its inverse, modulo 2^64."""
    both = np.ones((2, 1 << bits), np.uint64)
    both[0, 1:], both[1, 1:] = _BASE, pow(_BASE, -1, 1 << 64)
    np.multiply.accumulate(both, axis=1, out=both)
    return both[0], both[1]


_kept_powers = cache(_powers)

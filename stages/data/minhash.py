"""MinHash signatures of documents, by which near-duplicates are found among any number of them.

A document is the set of its shingles: all runs of `SHINGLE_WORDS` words. Two documents are alike by
the Jaccard similarity of these sets, |A and B| / |A or B|. Under a random order of all shingles the
least ones of A and B are the same with just that probability (Broder, 1997); a signature holds the
least hash in each of `PERMUTATIONS` orders. Cut into bands of `ROWS` values, two signatures have a
band in common with probability 1 - (1 - J^ROWS)^BANDS (Leskovec, Rajaraman and Ullman, Mining of
Massive Datasets, 3.4), which for 25 bands of 5 is

    J        0.9       0.8      0.7    0.6    0.5    0.4    0.3    0.2
    found    1 - 1e-9  0.99995  0.990  0.868  0.548  0.227  0.059  0.008

What is found so is a candidate: `jaccard` of two `shingle_set`s says what it is.

A word is a run of letters, digits and underscores in lower case. Chinese, Japanese and the other
scripts that put no space between words have each of their characters as a word, Hangul too. A text
of fewer words is one shingle of all it has; one without words is one of its visible characters.
White space alone is the empty set, which is like nothing.

Orders: the first 32 bits of a shingle's hash, times an odd number for each order. As these bits are
as good as random, so is the least one in each order; that two orders are nearly independent is
tested, not proved.

Axes: N documents, W words, S shingles, K permutations, B bands, R rows of a band.
"""

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stages.rolling import Int64, Uint64, batches, distinct, mixed

SHINGLE_WORDS = 5
BANDS = 25
ROWS = 5
PERMUTATIONS = BANDS * ROWS

Uint32 = npt.NDArray[np.uint32]

_BLOCK_CHARS = 1 << 20
"""Documents are hashed so many characters at a time, or one by one if longer."""
_SLICE = 1 << 15
"""Words or shingles whose hashes fit the processor's caches."""
_EMPTY = np.uint32(0xFFFFFFFF)
_BASE = np.uint64(0x9E3779B97F4A7C15)
_FACTORS_K = mixed(np.arange(PERMUTATIONS, dtype=np.uint64)).astype(np.uint32) | np.uint32(1)

_APART, _WORD, _ALONE, _INSIDE = range(4)
"""Kinds of bytes of UTF-8: of no word; of a word; the first of a character that is a word by
itself; another of these."""
_ALONE_RANGES = (
    (0x0E00, 0x0EFF),  # Thai, Lao
    (0x1000, 0x109F),  # Burmese
    (0x1100, 0x11FF),  # Hangul
    (0x1780, 0x17FF),  # Khmer
    (0x2E80, 0x31FF),  # radicals, Kana, Bopomofo, Hangul
    (0x3400, 0x4DBF),  # Chinese characters
    (0x4E00, 0x9FFF),
    (0xA960, 0xA97F),  # Hangul
    (0xAC00, 0xD7FF),
    (0xF900, 0xFAFF),
    (0xFF66, 0xFFDC),  # half-width Kana and Hangul
    (0x1AFF0, 0x1B16F),  # Kana
    (0x20000, 0x3FFFF),  # rare Chinese characters
)
_LAST_CODE = 0x40000
"""No character from here on is a letter."""
_ASCII = bytes(range(0x80))
_KINDS_ASCII = bytes(_WORD if chr(c).isalnum() or c == 0x5F else _APART for c in _ASCII) + bytes(
    0x80
)
_WIDE = 8
"""Bytes of a word that are hashed at once."""
_MASKS = np.array([(1 << (8 * n)) - 1 for n in range(_WIDE + 1)], np.uint64)
_LONG_WORD = 64
"""Bytes; what is longer is no word of a language and hashed by itself."""


def signatures(texts: Sequence[str]) -> Uint32:
    """The signature of each text, [N, PERMUTATIONS], whatever others it is hashed with.

    Of a text without a visible character all values are 2^32 - 1: such rows are equal, though these
    texts are like nothing.
    """
    signatures_NK = np.empty((len(texts), PERMUTATIONS), np.uint32)
    first = 0
    for block in batches(texts, _BLOCK_CHARS):
        signatures_NK[first : first + len(block)] = _least(*_shingles(block))
        first += len(block)
    return signatures_NK


def band_keys(signatures_NK: Uint32) -> Uint64:
    """A key of each band of each signature, [N, BANDS].

    Documents with a key in common are candidates. The number of a band is part of its keys, so that
    all may lie in one table.
    """
    rows_NBR = signatures_NK.reshape(-1, BANDS, ROWS)
    keys_NB = np.broadcast_to(mixed(np.arange(BANDS, dtype=np.uint64)), rows_NBR.shape[:2]).copy()
    for row in range(ROWS):
        keys_NB *= _BASE
        keys_NB += rows_NBR[:, :, row]
    return mixed(keys_NB)


def shingle_set(text: str) -> Uint64:
    """The hashes of a text's shingles, ascending, each once; none of white space alone."""
    return distinct(_shingles([text])[0])


def jaccard(a: Uint64, b: Uint64) -> float:
    """The similarity of two sets as `shingle_set` gives them, 0 to 1; of the empty set 0."""
    both = np.sort(np.concatenate([a, b]))
    shared = int(np.count_nonzero(both[1:] == both[:-1]))
    return shared / (len(both) - shared) if len(both) else 0.0


def _least(shingles_S: Uint64, counts_N: Int64) -> Uint32:
    """Of each document, which has so many of these shingles, the least in each order, [N, K]."""
    hashes_S = (shingles_S >> np.uint64(32)).astype(np.uint32)
    filled = np.flatnonzero(counts_N)
    starts = np.cumsum(counts_N)[filled] - counts_N[filled]
    least = np.full((PERMUTATIONS, len(filled)), _EMPTY, np.uint32)
    moved = np.empty(min(_SLICE, len(hashes_S)), np.uint32)
    for start in range(0, len(hashes_S), _SLICE):
        part = hashes_S[start : start + _SLICE]
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, start + len(part)))
        at = np.maximum(starts[first:last] - start, 0)
        here = np.empty((PERMUTATIONS, last - first), np.uint32)
        for order, factor in enumerate(_FACTORS_K):
            np.multiply(part, factor, out=moved[: len(part)])
            np.minimum.reduceat(moved[: len(part)], at, out=here[order])
        np.minimum(least[:, first:last], here, out=least[:, first:last])
    least_NK = np.full((len(counts_N), PERMUTATIONS), _EMPTY, np.uint32)
    least_NK[filled] = least.T
    return least_NK


def _shingles(texts: Sequence[str]) -> tuple[Uint64, Int64]:
    """The hashes of the shingles of all texts end to end, repeats included, and each one's count.

    A shingle's hash is a polynomial in a fixed base of its words' hashes, 0 in place of those that
    a short text lacks.
    """
    words_W, counts_N = _words(texts)
    ends_N = np.cumsum(counts_N)
    short = np.flatnonzero((counts_N > 0) & (counts_N < SHINGLE_WORDS))
    firsts = ends_N[short] - counts_N[short]
    # The last shingles of a text go on into the next one; they are not kept.
    padded = np.r_[words_W, np.zeros(SHINGLE_WORDS - 1, np.uint64)]
    hashes = padded[: len(words_W)].copy()
    in_short = padded[firsts]
    keep = np.ones(len(words_W), np.bool_)
    for further in range(1, SHINGLE_WORDS):
        hashes *= _BASE
        hashes += padded[further : further + len(words_W)]
        in_short = in_short * _BASE + np.where(
            counts_N[short] > further, padded[firsts + further], 0
        )
        keep[ends_N[counts_N >= further] - further] = False
    hashes[firsts] = in_short
    keep[firsts] = True
    per_text = np.where(
        counts_N < SHINGLE_WORDS, np.minimum(counts_N, 1), counts_N - SHINGLE_WORDS + 1
    )
    return mixed(hashes[keep]), per_text


def _words(texts: Sequence[str]) -> tuple[Uint64, Int64]:
    """The hashes of the words of all texts end to end, and how many each text has."""
    parts, others = zip(*(_lower(text) for text in texts), strict=True)
    # One byte of no word stands before, between and after the texts.
    data = b"\n".join((b"", *parts, bytes(_WIDE)))
    begins, ends = _edges(data, "".join(others))
    words_W = _hashes(data, begins, ends)
    stops = np.cumsum([len(part) + 1 for part in parts])
    counts_N = np.diff(np.searchsorted(begins, stops), prepend=0)
    bare = np.flatnonzero(counts_N == 0).tolist()
    visible = {n: "".join(texts[n].lower().split()) for n in bare}
    named = [n for n, characters in visible.items() if characters]
    if named:
        hashes = np.array([_long_hash(visible[n].encode("utf-8", "surrogatepass")) for n in named])
        words_W = np.insert(words_W, np.cumsum(counts_N)[named], hashes)
        counts_N[named] = 1
    return words_W, counts_N


def _lower(text: str) -> tuple[bytes, str]:
    """The text in lower case, in UTF-8, and its characters beyond ASCII."""
    if text.isascii():
        return text.lower().encode(), ""
    # `str.lower` is slow if it is not ASCII, and most such text has no other capitals.
    data = text.encode("utf-8", "surrogatepass").lower()
    others = data.translate(None, _ASCII).decode("utf-8", "surrogatepass")
    if others.lower() != others:
        data = text.lower().encode("utf-8", "surrogatepass")
        others = data.translate(None, _ASCII).decode("utf-8", "surrogatepass")
    return data, others


def _edges(data: bytes, others: str) -> tuple[Int64, Int64]:
    """Where words begin and end in these bytes, whose characters beyond ASCII are `others`."""
    kinds = np.frombuffer(bytearray(data.translate(_KINDS_ASCII)), np.uint8)
    before, here = kinds[:-1], kinds[1:]
    if not others:
        edges = np.flatnonzero(before != here) + 1
        return edges[::2], edges[1::2]
    codes = np.frombuffer(others.encode("utf-32-le", "surrogatepass"), np.uint32)
    kind = _kinds().take(codes, mode="clip")
    further = np.array([_APART, _WORD, _INSIDE], np.uint8)[kind]
    leads = np.flatnonzero(np.frombuffer(data, np.uint8) >= 0xC0)
    kinds[leads], kinds[leads + 1] = kind, further
    for back, least in ((2, 0x800), (3, 0x10000)):
        wide = codes >= least
        kinds[leads[wide] + back] = further[wide]
    begin = (here == _ALONE) | ((here == _WORD) & (before != _WORD))
    end = ((before == _WORD) & (here != _WORD)) | ((before >= _ALONE) & (here != _INSIDE))
    return np.flatnonzero(begin) + 1, np.flatnonzero(end) + 1


@lru_cache(maxsize=1)
def _kinds() -> npt.NDArray[np.uint8]:
    """By code, the kind of a character's first byte; the last entry stands for all above."""
    kinds = np.array([_WORD if chr(c).isalnum() else _APART for c in range(_LAST_CODE)], np.uint8)
    for first, last in _ALONE_RANGES:
        kinds[first : last + 1] *= _ALONE
    kinds[-1] = _APART
    return kinds


def _hashes(data: bytes, begins_W: Int64, ends_W: Int64) -> Uint64:
    """The hash of each of these words, of which 8 bytes at a time are read as one number."""
    eights = np.ndarray(len(data) - _WIDE + 1, "<u8", data, strides=(1,))
    words_W = np.empty(len(begins_W), np.uint64)
    for start in range(0, len(begins_W), _SLICE):
        at, lengths = begins_W[start : start + _SLICE], ends_W[start : start + _SLICE]
        lengths = lengths - at
        words = lengths.astype(np.uint64) * _BASE
        words = _add(words, eights[at] & _MASKS.take(lengths, mode="clip"))
        longer = np.flatnonzero((lengths > _WIDE) & (lengths <= _LONG_WORD))
        for done in range(_WIDE, _LONG_WORD, _WIDE):
            longer = longer[lengths[longer] > done]
            rest = _MASKS.take(lengths[longer] - done, mode="clip")
            words[longer] = _add(words[longer], eights[at[longer] + done] & rest)
        for number in np.flatnonzero(lengths > _LONG_WORD).tolist():
            words[number] = _long_hash(data[at[number] : at[number] + lengths[number]])
        words_W[start : start + _SLICE] = words
    return words_W


def _add(hashes_W: Uint64, numbers_W: Uint64) -> Uint64:
    return mixed(hashes_W ^ numbers_W)


def _long_hash(data: bytes) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little"))

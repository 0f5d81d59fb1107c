"""Text that stands in more than one document: near-duplicates, and passages of held-out text.

Texts are compared by their characters without white space and in lower case, so that indentation,
line breaks and capitals do not tell two copies apart; Unicode composition does. A *window* is
`WINDOW_CHARS` of these in a row (of a shorter text, all of them), known by a 64-bit hash, as in
`stages/rolling.py`.

Axes: T texts, C characters compared, W windows, K known windows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from stages.rolling import (
    BLOCK,
    INVERSES,
    LONGEST,
    Codes,
    Int64,
    Uint64,
    batches,
    block_runs,
    distinct,
    fold,
    half_mixed,
    mixed,
    mixed_rest,
    running_sums,
    runs,
)

WINDOW_CHARS = LONGEST
"""Code of different authors shares shorter runs by chance alone; 100 characters of a line of text
hold about 80 that count."""
LEAST_CHARS = 20
"""A text with fewer characters is compared with none: what it says, others say too."""
NEAR_DUPLICATE_SHARE = 0.5
"""Two documents are near-duplicates if so many of the smaller one's windows stand in the other."""

_SAMPLED = 32
"""One window in so many takes part in comparing documents with each other."""
_LIMIT = np.uint64((1 << 64) // _SAMPLED)
_LOW_BITS = np.uint64((1 << 33) - 1)
"""Those that the last step of mixing changes."""
_LEAST_SAMPLED = 16
"""As many windows of a short document do so in any case."""
_LIKELY_SAMPLED = 48
"""So many are drawn to have `_LEAST_SAMPLED`; only of a text that repeats itself are these few."""

Span = tuple[int, int]
"""Where a passage begins and ends in a text, in characters."""


def sketches(texts: Sequence[str]) -> list[Uint64]:
    """A sample of the windows of each text, ascending: the same ones of equal windows everywhere.

    One window in 32, by its hash; the 16 least hashes where these would be fewer.
    """
    return [one for batch in batches(texts) for one in _sketches(batch)]


@dataclass(slots=True, frozen=True)
class _Hashes:
    """A set of hashes that is asked for many others, most of which it does not have."""

    values_K: Uint64
    """Ascending."""
    present: npt.NDArray[np.bool_] = field(repr=False)
    """By the first bits of a hash, whether any of the set has them."""
    shift: np.uint64

    @classmethod
    def of(cls, values_K: Uint64) -> "_Hashes":
        """Of distinct values, ascending."""
        bits = min(27, max(8, len(values_K).bit_length() + 4))
        shift = np.uint64(64 - bits)
        present = np.zeros(1 << bits, np.bool_)
        present[values_K >> shift] = True
        return cls(values_K, present, shift)

    def find(self, hashes_W: Uint64) -> tuple[Int64, Int64]:
        """Which of these are in the set, and the places of those in it."""
        first = (hashes_W >> self.shift).view(np.int64)
        maybe = np.flatnonzero(self.present.take(first, mode="clip"))
        wanted = hashes_W[maybe]
        at = np.searchsorted(self.values_K, wanted)
        hit = self.values_K.take(at, mode="clip") == wanted
        return maybe[hit], at[hit]


@dataclass(slots=True, frozen=True)
class _Known:
    """The windows of one length, and which of them were found elsewhere.

    A window of L characters, wherever it begins, covers a whole one of the pieces of (L + 1) // 2
    characters into which a text can be cut. So one place in so many is looked up among the known
    pieces of that length, and windows only around those that are known.
    """

    length: int
    windows: _Hashes
    counts_K: Int64
    """How often each stands in the held-out texts."""
    found_K: npt.NDArray[np.bool_]
    pieces: _Hashes

    @classmethod
    def of(cls, length: int, texts: Sequence[Codes]) -> "_Known":
        """Those of texts of at least `length` characters."""
        every = np.concatenate([runs(codes_C, length) for codes_C in texts])
        known, counts = np.unique(every, return_counts=True)
        pieces = np.concatenate([runs(codes_C, (length + 1) // 2) for codes_C in texts])
        found = np.zeros(len(known), np.bool_)
        return cls(length, _Hashes.of(known), counts, found, _Hashes.of(distinct(pieces)))

    def look(self, sums: Uint64) -> tuple[Int64, Int64]:
        """Where known windows begin in a block, up to `BLOCK`, and which ones they are."""
        piece, begins = (self.length + 1) // 2, min(BLOCK, len(sums) - self.length)
        if begins <= 0:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        at_P = sums[::piece]
        hashes_P = (at_P[1:] - at_P[:-1]) * INVERSES[: len(sums) - 1 : piece][: len(at_P) - 1]
        known = self.pieces.find(hashes_P)[0] * piece
        if not len(known):
            return known, known
        around = np.zeros(len(sums), np.bool_)
        for back in range(self.length - piece + 1):
            around[np.maximum(known - back, 0)] = True
        places = np.flatnonzero(around[:begins])
        windows_W = (sums[places + self.length] - sums[places]) * INVERSES[places]
        hit, which = self.windows.find(windows_W)
        return places[hit], which


@dataclass(slots=True)
class Windows:
    """The windows of held-out texts, and which of them were found elsewhere."""

    _lengths: list[_Known]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Windows":
        """Those of `texts`, none of which was found yet."""
        by_length: dict[int, list[Codes]] = {}
        for text in texts:
            codes_C = fold([text])[0]
            if len(codes_C) >= LEAST_CHARS:
                by_length.setdefault(min(len(codes_C), WINDOW_CHARS), []).append(codes_C)
        return cls([_Known.of(length, some) for length, some in by_length.items()])

    @property
    def total(self) -> int:
        """Windows in the held-out texts."""
        return sum(int(one.counts_K.sum()) for one in self._lengths)

    @property
    def found(self) -> int:
        """How many of those were found elsewhere."""
        return sum(int(one.counts_K[one.found_K].sum()) for one in self._lengths)

    def forget(self) -> None:
        """Take none of them as found."""
        for one in self._lengths:
            one.found_K[:] = False

    def marks(self) -> npt.NDArray[np.bool_]:
        """Which windows were found, of all lengths one after another."""
        return np.concatenate([np.empty(0, np.bool_), *(one.found_K for one in self._lengths)])

    def mark(self, marks: npt.NDArray[np.integer]) -> None:
        """Take those as found too that another, of the same texts, found: its `marks`, as 0 and
        1."""
        begin = 0
        for one in self._lengths:
            one.found_K[:] |= marks[begin : begin + len(one.found_K)].astype(np.bool_)
            begin += len(one.found_K)

    def look(self, text: str) -> list[Span]:
        """Passages of `text` that stand in the held-out texts, the longest possible, in order."""
        return self._look([text])[0]

    def look_many(self, texts: Sequence[str]) -> list[list[Span]]:
        """`look` at each of these texts, in much less time if they are short."""
        return [spans for batch in batches(texts) for spans in self._look(batch)]

    def _look(self, texts: Sequence[str]) -> list[list[Span]]:
        codes_C, places_C, ends_T, offsets_T = fold(texts)
        found: list[tuple[Int64, Int64, int]] = []
        for start, sums in running_sums(codes_C):
            for one in self._lengths:
                begins, which = one.look(sums)
                begins = begins + start
                text_of = np.searchsorted(ends_T, begins, side="right")
                # The texts of a batch stand end to end; no window goes over an end.
                whole = begins + one.length <= ends_T[text_of]
                one.found_K[which[whole]] = True
                found.append((begins[whole], text_of[whole], one.length))
        spans: list[list[Span]] = [[] for _ in texts]
        if not any(len(begins) for begins, _, _ in found):
            return spans
        # One empty place after each text keeps passages of neighbours apart.
        change = np.zeros(len(codes_C) + len(texts) + 1, np.int64)
        for begins, text_of, length in found:
            change[begins + text_of] += 1
            change[begins + text_of + length] -= 1
        inside = np.r_[False, np.cumsum(change) > 0]
        edges = np.flatnonzero(inside[1:] != inside[:-1])
        owners = np.searchsorted(ends_T + np.arange(len(texts)), edges[::2], side="right")
        firsts = places_C[edges[::2] - owners] - offsets_T[owners]
        lasts = places_C[edges[1::2] - owners - 1] - offsets_T[owners]
        for owner, first, last in zip(
            owners.tolist(), firsts.tolist(), lasts.tolist(), strict=True
        ):
            spans[owner].append((first, last + 1))
        return spans


def cut(text: str, spans: Iterable[Span]) -> str:
    """The text without these passages; what stood around one is joined by a line break."""
    kept, end = [], 0
    for first, last in merge(spans):
        kept.append(text[end:first])
        end = last
    kept.append(text[end:])
    return "\n".join(part for part in kept if part)


def merge(spans: Iterable[Span]) -> list[Span]:
    """The same passages in order, none of which touches another."""
    merged: list[Span] = []
    for first, last in sorted(spans):
        if merged and first <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(last, merged[-1][1])
        else:
            merged.append((first, last))
    return merged


def _sketches(texts: Sequence[str]) -> list[Uint64]:
    codes_C, _, ends_T, _ = fold(texts)
    starts_T = np.r_[0, ends_T[:-1]]
    windows_T = np.maximum(ends_T - starts_T - WINDOW_CHARS + 1, 0)
    place, hash_ = _sample(codes_C, ends_T, _limits(windows_T))
    owner = np.searchsorted(ends_T, place, side="right")
    whole = place + WINDOW_CHARS <= ends_T[owner]
    owner, hash_ = owner[whole], hash_[whole]
    order = np.lexsort((hash_, owner))
    owner, hash_ = owner[order], hash_[order]
    new = np.r_[True, (hash_[1:] != hash_[:-1]) | (owner[1:] != owner[:-1])][: len(hash_)]
    owner, hash_ = owner[new], hash_[new]
    bounds = np.searchsorted(owner, np.arange(len(texts) + 1))
    drawn_T = np.bincount(owner[hash_ < _LIMIT], minlength=len(texts))
    taken_T = np.maximum(drawn_T, np.minimum(np.diff(bounds), _LEAST_SAMPLED))
    found = [
        hash_[a : a + n].copy() for a, n in zip(bounds.tolist(), taken_T.tolist(), strict=False)
    ]
    for number in np.flatnonzero((taken_T < _LEAST_SAMPLED) & (windows_T > taken_T)).tolist():
        every = runs(codes_C[starts_T[number] : ends_T[number]], WINDOW_CHARS)
        found[number] = distinct(mixed(every))[:_LEAST_SAMPLED]
    return found


def _limits(windows_T: Int64) -> Uint64:
    """The highest hash that is drawn of a text with so many windows.

    It ends in ones, so that the last step of mixing moves no hash past it.
    """
    fair = np.uint64((1 << 64) - 1) // np.maximum(windows_T, _LIKELY_SAMPLED).astype(np.uint64)
    limits: Uint64 = np.maximum(fair * np.uint64(_LIKELY_SAMPLED), _LIMIT - np.uint64(1))
    return limits | _LOW_BITS


def _sample(codes_C: Codes, ends_T: Int64, limits_T: Uint64) -> tuple[Int64, Uint64]:
    """Where the windows begin that are drawn, some of which go over an end, and their hashes."""
    places, hashes = [np.empty(0, np.int64)], [np.empty(0, np.uint64)]
    for start, sums in running_sums(codes_C):
        windows_W = half_mixed(block_runs(sums, WINDOW_CHARS))
        bounds = np.clip(np.r_[0, ends_T], start, start + len(windows_W))
        here_T = bounds[1:] - bounds[:-1]
        sampled = np.flatnonzero(windows_W <= np.repeat(limits_T, here_T))
        places.append(sampled + start)
        hashes.append(mixed_rest(windows_W[sampled]))
    return np.concatenate(places), np.concatenate(hashes)

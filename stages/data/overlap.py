"""Text that stands in more than one document: near-duplicates, and passages of held-out text.

Texts are compared by their characters without white space and in lower case, so that indentation,
line breaks and capitals do not tell two copies apart; Unicode composition does. A *window* is
`WINDOW_CHARS` of these in a row (of a shorter text, all of them), known by a 64-bit hash: the sum
of r(c_i) b^i over its characters c_i, times b^-start, modulo 2^64, with r a fixed scrambling and b
odd, so that all windows of a text come from one running sum.

Axes: C characters compared, W windows, K known windows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

WINDOW_CHARS = 50
"""Code of different authors shares shorter runs by chance alone; 100 characters of a line of text
hold about 80 that count."""
LEAST_CHARS = 20
"""A text with fewer characters is compared with none: what it says, others say too."""
NEAR_DUPLICATE_SHARE = 0.5
"""Two documents are near-duplicates if so many of the smaller one's windows stand in the other."""

_SAMPLED = 32
"""One window in so many takes part in comparing documents with each other."""
_LEAST_SAMPLED = 16
"""As many windows of a short document do so in any case."""
_BASE = 0x9E3779B97F4A7C15
_INVISIBLE = (0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF)
_SPACE = np.array([*filter(lambda c: chr(c).isspace(), range(0x10000)), *_INVISIBLE], np.uint32)
"""All of Unicode's white space, and what pages and printed books hide between letters."""

Span = tuple[int, int]
"""Where a passage begins and ends in a text, in characters."""
Uint64 = npt.NDArray[np.uint64]


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """For each text the first one of its group: texts linked by near-duplication.

    Of the texts that hold a sampled window each is compared with the first and with the next, so
    that many copies cost no more than their number.
    """
    sketches = [_sketch(text) for text in texts]
    sizes = np.array([len(sketch) for sketch in sketches], np.int64)
    windows = np.concatenate([np.empty(0, np.uint64), *sketches])
    owners = np.repeat(np.arange(len(texts)), sizes)
    order = np.lexsort((owners, windows))
    windows, owners = windows[order], owners[order]
    starts = np.flatnonzero(np.r_[True, windows[1:] != windows[:-1]][: len(windows)])
    firsts = np.repeat(owners[starts], np.diff(np.r_[starts, len(windows)]))
    nexts = np.r_[owners[1:], owners[-1:]]
    nexts = np.where(np.r_[windows[1:] == windows[:-1], False][: len(windows)], nexts, owners)
    # A window that stands in two texts alone links them by both rules, and counts once.
    onward = (nexts != owners) & (firsts != owners)
    links = [np.stack([firsts, owners], axis=1)[firsts != owners]]
    links += [np.stack([owners, nexts], axis=1)[onward]]
    shared = np.concatenate(links)
    pairs, counts = np.unique(shared, axis=0, return_counts=True)
    leader = list(range(len(texts)))
    for (first, other), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        if count >= NEAR_DUPLICATE_SHARE * min(sizes[first], sizes[other]):
            one, two = _leader(leader, first), _leader(leader, other)
            leader[max(one, two)] = min(one, two)
    return [_leader(leader, number) for number in range(len(texts))]


@dataclass(slots=True)
class _Known:
    """The windows of one length, and which of them were found elsewhere."""

    length: int
    known_K: Uint64
    """Ascending."""
    counts_K: npt.NDArray[np.int64]
    """How often each stands in the held-out texts."""
    found_K: npt.NDArray[np.bool_]
    present: npt.NDArray[np.bool_] = field(repr=False)
    """By the first bits of a hash, whether any known window has them: most others do not."""
    shift: np.uint64

    @classmethod
    def of(cls, length: int, windows_W: Uint64) -> "_Known":
        known, counts = np.unique(windows_W, return_counts=True)
        bits = min(27, max(8, len(known).bit_length() + 4))
        shift = np.uint64(64 - bits)
        present = np.zeros(1 << bits, np.bool_)
        present[known >> shift] = True
        return cls(length, known, counts, np.zeros(len(known), np.bool_), present, shift)

    def look(self, codes_C: npt.NDArray[np.uint32]) -> npt.NDArray[np.int64]:
        """Where the known windows of a text begin, which are marked as found."""
        windows_W = _windows(codes_C, self.length)
        maybe = np.flatnonzero(self.present[windows_W >> self.shift])
        at = np.searchsorted(self.known_K, windows_W[maybe])
        hit = at < len(self.known_K)
        hit[hit] = self.known_K[at[hit]] == windows_W[maybe[hit]]
        self.found_K[at[hit]] = True
        return maybe[hit]


@dataclass(slots=True)
class Windows:
    """The windows of held-out texts, and which of them were found elsewhere."""

    _lengths: list[_Known]

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Windows":
        """Those of `texts`, none of which was found yet."""
        by_length: dict[int, list[Uint64]] = {}
        for text in texts:
            codes_C = _fold(text)[0]
            if len(codes_C) >= LEAST_CHARS:
                length = min(len(codes_C), WINDOW_CHARS)
                by_length.setdefault(length, []).append(_windows(codes_C, length))
        return cls([_Known.of(one, np.concatenate(some)) for one, some in by_length.items()])

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

    def look(self, text: str) -> list[Span]:
        """Passages of `text` that stand in the held-out texts, the longest possible, in order."""
        codes_C, places_C = _fold(text)
        change = np.zeros(len(codes_C) + 1, np.int64)
        for one in self._lengths:
            begins = one.look(codes_C)
            np.add.at(change, begins, 1)
            np.add.at(change, begins + one.length, -1)
        if not change.any():
            return []
        inside = np.r_[False, np.cumsum(change[:-1]) > 0, False]
        edges = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2)
        return [(int(places_C[first]), int(places_C[end - 1]) + 1) for first, end in edges]


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


def _leader(leader: list[int], number: int) -> int:
    while leader[number] != number:
        leader[number] = leader[leader[number]]
        number = leader[number]
    return number


def _sketch(text: str) -> Uint64:
    """A sample of the windows of a text, the same ones of equal windows in every text."""
    windows = np.unique(_windows(_fold(text)[0], WINDOW_CHARS))
    sampled = windows[windows < np.uint64((1 << 64) // _SAMPLED)]
    return sampled if len(sampled) >= _LEAST_SAMPLED else windows[:_LEAST_SAMPLED]


def _fold(text: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """The characters that are compared, and the place of each in `text`."""
    lower = text.lower()
    if len(lower) != len(text):
        # A few capitals become two characters; they stay as they are.
        lower = "".join(one if len(one.lower()) > 1 else one.lower() for one in text)
    codes = np.frombuffer(lower.encode("utf-32-le", "surrogatepass"), np.uint32)
    places = np.flatnonzero(~np.isin(codes, _SPACE))
    return codes[places], places


def _windows(codes_C: npt.NDArray[np.uint32], length: int) -> Uint64:
    """The hash of each window of this length, in order; none if the text is shorter."""
    if len(codes_C) < length:
        return np.empty(0, np.uint64)
    terms_C = _scrambled(codes_C) * _powers(_BASE, len(codes_C))
    sums = np.r_[np.zeros(1, np.uint64), np.cumsum(terms_C, dtype=np.uint64)]
    inverse = pow(_BASE, -1, 1 << 64)
    differences: Uint64 = sums[length:] - sums[:-length]
    # The lowest bits of the product depend on few bits of the terms; the scrambling spreads them.
    return _mixed(differences * _powers(inverse, len(differences)))


def _powers(base: int, count: int) -> Uint64:
    """1, base, base^2, ... modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _scrambled(codes_C: npt.NDArray[np.uint32]) -> Uint64:
    return _mixed((codes_C.astype(np.uint64) + np.uint64(1)) * np.uint64(_BASE))


def _mixed(x: Uint64) -> Uint64:
    """A bijection that spreads every bit over all (the finaliser of SplitMix64)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))

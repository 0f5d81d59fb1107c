"""Text that stands in more than one document: near-duplicates, and passages of held-out text.

Texts are compared by their characters without white space and in lower case, so that indentation,
line breaks and capitals do not tell two copies apart. A *window* is `WINDOW_CHARS` of these in a
row, known by a 64-bit hash: sum of r(c_i) b^i over its characters c_i, times b^-start, modulo 2^64,
with r a fixed scrambling and b odd, so that all windows of a text come from one running sum.

Axes: C characters compared, W windows, K known windows.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

WINDOW_CHARS = 50
"""Code of different authors shares shorter runs by chance alone; 100 characters of a line of text
hold about 80 that count."""
NEAR_DUPLICATE_SHARE = 0.5
"""Two documents are near-duplicates if so many of the smaller one's windows stand in the other."""

_SAMPLED = 32
"""One window in so many takes part in comparing documents with each other."""
_LEAST_SAMPLED = 16
"""As many windows of a short document do so in any case."""
_BASE = 0x9E3779B97F4A7C15
_SPACE = np.array([*range(9, 14), *range(28, 33), 0x85, 0xA0, 0x2028, 0x2029, 0x3000], np.uint32)

Span = tuple[int, int]
"""Where a passage begins and ends in a text, in characters."""
Uint64 = npt.NDArray[np.uint64]


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """For each text the first one of its group: texts linked by near-duplication.

    Every text is compared with the first that holds one of its sampled windows, so that many copies
    cost no more than their number.
    """
    sketches = [_sketch(text) for text in texts]
    sizes = np.array([len(sketch) for sketch in sketches], np.int64)
    windows = np.concatenate([np.empty(0, np.uint64), *sketches])
    owners = np.repeat(np.arange(len(texts)), sizes)
    order = np.lexsort((owners, windows))
    windows, owners = windows[order], owners[order]
    starts = np.flatnonzero(np.r_[True, windows[1:] != windows[:-1]][: len(windows)])
    firsts = np.repeat(owners[starts], np.diff(np.r_[starts, len(windows)]))
    shared = np.stack([firsts, owners], axis=1)[firsts != owners]
    pairs, counts = np.unique(shared, axis=0, return_counts=True)
    leader = list(range(len(texts)))
    for (first, other), count in zip(pairs.tolist(), counts.tolist(), strict=True):
        if count >= NEAR_DUPLICATE_SHARE * min(sizes[first], sizes[other]):
            one, two = _leader(leader, first), _leader(leader, other)
            leader[max(one, two)] = min(one, two)
    return [_leader(leader, number) for number in range(len(texts))]


@dataclass(slots=True)
class Windows:
    """The windows of held-out texts, and which of them were found elsewhere."""

    known_K: Uint64
    """Ascending."""
    counts_K: npt.NDArray[np.int64]
    """How often each stands in the held-out texts."""
    found_K: npt.NDArray[np.bool_]
    _present: npt.NDArray[np.bool_] = field(repr=False)
    """By the first bits of a hash, whether any known window has them: most others do not."""
    _shift: np.uint64

    @classmethod
    def of(cls, texts: Iterable[str]) -> "Windows":
        """Those of `texts`, none of which was found yet."""
        every = np.concatenate([np.empty(0, np.uint64), *(_windows(_fold(t)[0]) for t in texts)])
        known, counts = np.unique(every, return_counts=True)
        bits = min(27, max(8, len(known).bit_length() + 4))
        shift = np.uint64(64 - bits)
        present = np.zeros(1 << bits, np.bool_)
        present[known >> shift] = True
        return cls(known, counts, np.zeros(len(known), np.bool_), present, shift)

    @property
    def total(self) -> int:
        """Windows in the held-out texts."""
        return int(self.counts_K.sum())

    @property
    def found(self) -> int:
        """How many of those were found elsewhere."""
        return int(self.counts_K[self.found_K].sum())

    def look(self, text: str) -> list[Span]:
        """Passages of `text` that stand in the held-out texts, the longest possible, in order."""
        codes_C, places_C = _fold(text)
        windows_W = _windows(codes_C)
        maybe = np.flatnonzero(self._present[windows_W >> self._shift])
        at = np.searchsorted(self.known_K, windows_W[maybe])
        hit = at < len(self.known_K)
        hit[hit] = self.known_K[at[hit]] == windows_W[maybe[hit]]
        if not hit.any():
            return []
        self.found_K[at[hit]] = True
        change = np.zeros(len(codes_C) + 1, np.int64)
        np.add.at(change, maybe[hit], 1)
        np.add.at(change, maybe[hit] + WINDOW_CHARS, -1)
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
    windows = np.unique(_windows(_fold(text)[0]))
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


def _windows(codes_C: npt.NDArray[np.uint32]) -> Uint64:
    """The hash of each window, in order; none if the text is shorter than one."""
    if len(codes_C) < WINDOW_CHARS:
        return np.empty(0, np.uint64)
    terms_C = _scrambled(codes_C) * _powers(_BASE, len(codes_C))
    sums = np.r_[np.zeros(1, np.uint64), np.cumsum(terms_C, dtype=np.uint64)]
    inverse = pow(_BASE, -1, 1 << 64)
    differences: Uint64 = sums[WINDOW_CHARS:] - sums[:-WINDOW_CHARS]
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

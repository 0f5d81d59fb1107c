"""Hashes of all the runs of characters in many texts, from running sums.

A run's hash is the sum of r(c_i) b^i over its characters c_i, times b^-start, modulo 2^64, with r a
fixed scrambling and b odd (Karp and Rabin, 1987): equal runs have equal hashes, wherever they
stand. Many texts are hashed in one go, and block by block: a call of numpy costs as much as its
work on some hundred characters, and a block fits the processor's caches.

Axes: T texts, C characters compared, W runs.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

BATCH_CHARS = 1 << 18
"""A fair number of characters to fold at a time."""
BLOCK = 1 << 15
"""Characters in a running sum."""
LONGEST = 50
"""The longest run that may be asked of a block."""

_BASE = 0x9E3779B97F4A7C15
_INVISIBLE = (0xAD, 0x200B, 0x200C, 0x200D, 0x2060, 0xFEFF)
_SPACE = np.array([*filter(lambda c: chr(c).isspace(), range(0x10000)), *_INVISIBLE], np.uint32)
"""All of Unicode's white space, and what pages and printed books hide between letters."""
_VISIBLE = np.ones(0x10000, np.bool_)
"""By code, whether a character is compared; the last entry stands for all above it as well."""
_VISIBLE[_SPACE] = False
_VISIBLE_BYTES = _VISIBLE[:256].tobytes()

Uint64 = npt.NDArray[np.uint64]
Int64 = npt.NDArray[np.int64]
Codes = npt.NDArray[np.uint8] | npt.NDArray[np.uint32]
"""Characters: bytes where all of a batch is ASCII, as those take half the time."""


def batches(texts: Sequence[str], most_chars: int = BATCH_CHARS) -> Iterator[Sequence[str]]:
    """The texts in order, as many at a time as have `most_chars` characters, at least one."""
    first = chars = 0
    for number, text in enumerate(texts):
        if number > first and chars + len(text) > most_chars:
            yield texts[first:number]
            first, chars = number, 0
        chars += len(text)
    if len(texts) > first:
        yield texts[first:]


def distinct(values: Uint64) -> Uint64:
    """These in ascending order, each once; much faster than `np.unique`."""
    ascending = np.sort(values)
    new = np.r_[True, ascending[1:] != ascending[:-1]][: len(values)]
    once: Uint64 = ascending[new]
    return once


def fold(texts: Sequence[str]) -> tuple[Codes, Int64, Int64, Int64]:
    """The characters that are compared, of all texts end to end, and the place of each.

    Then by text where its characters end among those that are compared, and where it begins among
    all, of which the places are.
    """
    whole = "".join(_lower(text) for text in texts)
    offsets = np.cumsum([0, *map(len, texts)])
    codes: Codes
    if whole.isascii():
        data = whole.encode()
        codes = np.frombuffer(data, np.uint8)
        visible = np.frombuffer(data.translate(_VISIBLE_BYTES), np.bool_)
    else:
        codes = np.frombuffer(whole.encode("utf-32-le", "surrogatepass"), np.uint32)
        visible = _VISIBLE.take(codes, mode="clip")
    places = np.flatnonzero(visible)
    return codes[places], places, np.searchsorted(places, offsets[1:]), offsets[:-1]


def _lower(text: str) -> str:
    """As many characters as the text has, in lower case."""
    lower = text.lower()
    if len(lower) != len(text):
        # A few capitals become two characters; they stay as they are.
        lower = "".join(one if len(one.lower()) > 1 else one.lower() for one in text)
    return lower


def runs(codes_C: Codes, length: int) -> Uint64:
    """The hash of each run of this length, in order, unmixed; none of fewer characters."""
    blocks = [block_runs(sums, length) for _, sums in running_sums(codes_C)]
    return np.concatenate([np.empty(0, np.uint64), *blocks])


def running_sums(codes_C: Codes) -> Iterator[tuple[int, Uint64]]:
    """Where each block begins, and the running sum from there, which starts with 0.

    It goes on so far that all runs of up to `LONGEST` that begin in the first `BLOCK` end in it.
    """
    for start in range(0, len(codes_C), BLOCK):
        codes = codes_C[start : start + BLOCK + LONGEST - 1]
        sums = np.zeros(len(codes) + 1, np.uint64)
        terms = _scrambled(codes)
        terms *= _POWERS[: len(codes)]
        np.cumsum(terms, out=sums[1:])
        yield start, sums


def block_runs(sums: Uint64, length: int) -> Uint64:
    """The hash of each run that begins in a block, unmixed.

    The lowest bits depend on few bits of the characters; mixing spreads them.
    """
    count = max(0, min(BLOCK, len(sums) - length))
    hashes_W: Uint64 = sums[length : length + count] - sums[:count]
    hashes_W *= INVERSES[:count]
    return hashes_W


def _powers(base: int, count: int) -> Uint64:
    """1, base, base^2, ... modulo 2^64."""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return np.multiply.accumulate(factors)


def _scrambled(codes_C: Codes) -> Uint64:
    """A number for each character, by no rule that text could meet."""
    scrambled: Uint64 = _SCRAMBLED.take(codes_C, mode="clip")
    if codes_C.dtype != np.uint8:
        beyond = np.flatnonzero(codes_C >= len(_SCRAMBLED))
        scrambled[beyond] = _scramble(codes_C[beyond])
    return scrambled


def _scramble(codes_C: Codes) -> Uint64:
    return mixed((codes_C.astype(np.uint64) + np.uint64(1)) * np.uint64(_BASE))


def mixed(x: Uint64) -> Uint64:
    """A bijection that spreads every bit over all (the finaliser of SplitMix64)."""
    return mixed_rest(half_mixed(x))


def half_mixed(x: Uint64) -> Uint64:
    """All of `mixed` but its last step, which leaves the first 31 bits as they are."""
    x = x ^ (x >> np.uint64(30))
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    return x


def mixed_rest(x: Uint64) -> Uint64:
    """That last step."""
    return x ^ (x >> np.uint64(31))


_POWERS = _powers(_BASE, BLOCK + LONGEST)
INVERSES = _powers(pow(_BASE, -1, 1 << 64), BLOCK + LONGEST)
_SCRAMBLED = _scramble(np.arange(0x10000, dtype=np.uint32))
"""By code, for most characters."""

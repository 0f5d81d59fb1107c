"""How much of a text is sequences of words that it repeats, as Rae et al. 2021, A.1.1, ask.

A sequence of n words that stands twice holds two of n - 1 that do, one word apart. So the repeated
ones of each length are found among pairs of shorter ones, which soon are few.

Axes: D texts, W words of all texts, G places where a repeated sequence begins, ascending.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]
Float64 = npt.NDArray[np.float64]
Bool = npt.NDArray[np.bool_]

_SPREAD = np.uint64(0xD1342543DE82EF95)
_LEAST_WORDS = 2
_TIMES_BITS = 32


@dataclass(frozen=True, slots=True)
class Grams:
    """The sequences of one length that stand at least twice, in all their places."""

    at_G: Int64
    """The first word of each."""
    number_G: Int64
    """Equal for equal sequences; from 0 to `num_distinct` - 1."""
    again_G: Bool
    """Whether the sequence stands earlier too."""
    num_distinct: int

    def longer(self) -> "Grams":
        """Those with one word more."""
        pair = (self.at_G[1:] - self.at_G[:-1] == 1).nonzero()[0]
        key = self.number_G[pair] * self.num_distinct + self.number_G[pair + 1]
        return _repeated(self.at_G[pair], scrambled(key))


class Repetition:
    """Shares of the characters of each text's words that stand in repeated sequences of words."""

    def __init__(self, words_W: Uint64, chars_W: Int64, edges: Int64) -> None:
        """`words_W` are equal for equal words of one text, and for no others; `chars_W` are their
        lengths; those of text d begin at `edges[d]` and end before `edges[d + 1]`.
        """
        self._edges = edges
        self._before = sums(chars_W)
        self._chars_D = self._before[edges[1:]] - self._before[edges[:-1]]
        pairs = (words_W[:-1] * _SPREAD + words_W[1:]) * _SPREAD
        # As many slots as keep chance meetings few: sorting is dear, and most pairs stand once.
        bits = len(words_W).bit_length() + 2
        slots = (pairs >> np.uint64(64 - bits)).view(np.int64)
        at = (np.bincount(slots)[slots] > 1).nonzero()[0]
        self._by_length = [_repeated(at, pairs[at])]

    def top_share(self, num_words: int) -> Float64:
        """The part in the most frequent sequence of so many words, wherever it stands.

        Of several as frequent, one of the most characters is taken. One that stands once only is
        no repetition and counts nothing; what overlaps itself could count as more than all, which
        is 1.
        """
        grams = self._grams(num_words)
        times_G = np.bincount(grams.number_G, minlength=1)[grams.number_G]
        chars_G = self._before[grams.at_G + num_words] - self._before[grams.at_G]
        top_D = largest((times_G << _TIMES_BITS) | chars_G, grams.at_G.searchsorted(self._edges))
        times_D, chars_D = top_D >> _TIMES_BITS, top_D & ((1 << _TIMES_BITS) - 1)
        return np.minimum(1.0, shares(times_D * chars_D, self._chars_D))

    def duplicate_share(self, num_words: int) -> Float64:
        """The part in sequences of so many words that stand earlier too.

        A character in several of them is counted once.
        """
        grams = self._grams(num_words)
        begins = grams.at_G[grams.again_G]
        ends = begins + num_words
        np.minimum(ends[:-1], begins[1:], out=ends[:-1])
        chars = sums(self._before[ends] - self._before[begins])
        edges = begins.searchsorted(self._edges)
        return shares(chars[edges[1:]] - chars[edges[:-1]], self._chars_D)

    def _grams(self, num_words: int) -> Grams:
        while len(self._by_length) <= num_words - _LEAST_WORDS:
            self._by_length.append(self._by_length[-1].longer())
        return self._by_length[num_words - _LEAST_WORDS]


def shares(part_D: npt.ArrayLike, whole_D: npt.ArrayLike) -> Float64:
    """Each part of each whole; none of nothing."""
    found: Float64 = np.zeros(np.shape(whole_D))
    np.divide(part_D, whole_D, out=found, where=np.not_equal(whole_D, 0))
    return found


def sums(values: npt.NDArray[np.integer | np.bool_]) -> Int64:
    """Of the first none, one, two ... of the values."""
    total = np.zeros(len(values) + 1, np.int64)
    np.cumsum(values, out=total[1:])
    return total


def largest(values: Int64, edges: Int64) -> Int64:
    """The largest value from each edge to the next; 0 where there is none."""
    found = np.zeros(len(edges) - 1, np.int64)
    filled = edges[1:] > edges[:-1]
    if filled.any():
        found[filled] = np.maximum.reduceat(values[: edges[-1]], edges[:-1][filled])
    return found


def again(keys: Uint64) -> Bool:
    """Whether each key, whose upper bits are a hash, stands earlier too."""
    order, same = _ordered(keys)
    found = np.zeros(len(keys), np.bool_)
    found[order[1:]] = same
    return found


def scrambled(x: npt.NDArray[np.integer]) -> Uint64:
    """A bijection that spreads low bits over all."""
    y = (x.astype(np.uint64) + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    return (y ^ (y >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)


def _repeated(at: Int64, keys: Uint64) -> Grams:
    """What has an equal key elsewhere, of sequences that begin at the ascending places `at`."""
    order, same = _ordered(keys)
    first = np.ones(len(keys) + 1, np.bool_)
    np.logical_not(same, out=first[1:-1])
    twice = (~(first[:-1] & first[1:])).nonzero()[0]
    first, order = first[twice], order[twice]
    num_distinct = int(np.count_nonzero(first))
    # As they stand in the texts: the number of each sequence, negative where it stands first.
    numbers = np.zeros(len(keys), np.int64)
    numbers[order] = np.where(first, -first.cumsum(), first.cumsum())
    places = numbers.nonzero()[0]
    numbers = numbers[places]
    return Grams(at[places], np.abs(numbers) - 1, numbers > 0, num_distinct)


def _ordered(keys: Uint64) -> tuple[Int64, Bool]:
    """Places so that equal keys are neighbours, in the order of the places, and whether each key
    but the first is its neighbour's. Each key's place takes the lower bits of it.
    """
    mask = np.uint64((1 << len(keys).bit_length()) - 1)
    # Numbers alone are sorted several times faster than what they belong to.
    packed = keys & ~mask | np.arange(len(keys), dtype=np.uint64)
    packed.sort()
    return (packed & mask).view(np.int64), packed[1:] ^ packed[:-1] <= mask

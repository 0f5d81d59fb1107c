"""Finds documents that say what an earlier one said: equal ones, and near-duplicates.

Near-duplicates are found by MinHash with locality-sensitive hashing (Broder 1997; Leskovec et al.,
Mining of Massive Datasets, ch. 3), and judged by the exact Jaccard similarity of their shingles.
Who goes is always like somebody who stays.

Axes: N documents of all shards, numbered in order; P pairs.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from stages.data.join import Int64, bucket_entries, shard_of
from stages.data.minhash import jaccard, shingle_set
from stages.data.paragraphs import plain
from stages.data.tables import DOCUMENTS, Texts, load, save

KEPT, EXACT, NEAR = 0, 1, 2
PAIRS_A_TASK = 50_000
"""Of near-duplicates to be judged by one task."""
_SETS_KEPT = 4096
Float64 = npt.NDArray[np.float64]
Judge = Callable[[Int64], Float64]
"""The Jaccard similarity of each of P pairs."""


@dataclass(slots=True)
class Fates:
    """What became of each document, and why."""

    fate_N: npt.NDArray[np.uint8]
    """`KEPT`, `EXACT` or `NEAR`."""
    of_N: Int64
    """The document that it repeats; itself if it is kept."""
    value_N: Float64
    """How alike the two are; 1 for itself."""
    clusters: int = 0
    """Documents that stay and have near-duplicates that went."""
    candidates: int = 0
    """Pairs that were judged."""

    @classmethod
    def of(cls, count: int) -> "Fates":
        """Of so many documents, all kept."""
        return cls(np.zeros(count, np.uint8), np.arange(count), np.ones(count))

    def keep(self, fate: int) -> None:
        """Have those of this fate back."""
        back = np.flatnonzero(self.fate_N == fate)
        self.fate_N[back], self.of_N[back], self.value_N[back] = KEPT, back, 1.0

    def drop(self, numbers: Int64, of: Int64, fate: int, values: Float64 | float) -> None:
        """Let these documents go."""
        self.fate_N[numbers], self.of_N[numbers], self.value_N[numbers] = fate, of, values


def digest(text: str) -> bytes:
    """The first 16 bytes of the SHA-256 of a text without case, white-space runs and Unicode
    composition."""
    return hashlib.sha256(plain(text)).digest()[:16]


def drop_equal(fates: Fates, digests: npt.NDArray[np.uint64]) -> None:
    """Of documents with equal digests [N, 2] the first stays."""
    order = np.lexsort((np.arange(len(digests)), digests[:, 1], digests[:, 0]))
    ordered = digests[order]
    begins = np.r_[True, (ordered[1:] != ordered[:-1]).any(axis=1)][: len(order)]
    firsts = np.repeat(order[begins], np.diff(np.r_[np.flatnonzero(begins), len(order)]))
    again = ~begins
    fates.drop(order[again], firsts[again], EXACT, 1.0)


def drop_near(fates: Fates, candidates: Int64, judge: Judge, min_jaccard: float) -> None:
    """Of documents that are alike the first stays, among the pairs that `candidates` [P, 2] show.

    Whoever goes is like one that stays, and no two that stay are a pair that is alike. Who was a
    pair only with documents that went is judged beside what those repeat, once: so no more pairs
    are judged than twice the candidates, whatever chains they form.
    """
    values = judge(candidates)
    fates.candidates += len(candidates)
    _drop_repeats(fates, candidates, values, min_jaccard)
    further = _beside_those_that_stay(fates, candidates)
    if len(further):
        fates.candidates += len(further)
        fates.keep(NEAR)
        pairs = np.concatenate([candidates, further])
        _drop_repeats(fates, pairs, np.concatenate([values, judge(further)]), min_jaccard)
    fates.clusters = len(np.unique(fates.of_N[fates.fate_N == NEAR]))


def _drop_repeats(fates: Fates, pairs: Int64, values: Float64, min_jaccard: float) -> None:
    """In the order of the documents, let those go that are like an earlier one that stays: each
    with the one that it is most like."""
    alike = values >= min_jaccard
    pairs, values = pairs[alike], values[alike]
    order = np.lexsort((pairs[:, 0], -values, pairs[:, 1]))
    for (first, other), value in zip(pairs[order].tolist(), values[order].tolist(), strict=True):
        if fates.fate_N[other] == KEPT and fates.fate_N[first] == KEPT:
            fates.fate_N[other], fates.of_N[other], fates.value_N[other] = NEAR, first, value


def _beside_those_that_stay(fates: Fates, candidates: Int64) -> Int64:
    """Pairs [P, 2], not among the candidates, of who stays and what a document repeats that went
    and was a pair with it."""
    first, other = candidates[:, 0], candidates[:, 1]
    gone = fates.fate_N == NEAR
    here = (gone[first] & ~gone[other]) | (gone[other] & ~gone[first])
    one, two = fates.of_N[first[here]], fates.of_N[other[here]]
    low, high = np.minimum(one, two), np.maximum(one, two)
    count = len(fates.fate_N)
    pairs = np.unique((low * count + high)[low < high])
    new: Int64 = pairs[~np.isin(pairs, first * count + other)]
    return np.stack([new // count, new % count], axis=1)


def components(edges: Int64, count: int) -> Int64:
    """The first member of the component of each of `count` documents; its own number if alone."""
    if not count:
        return np.empty(0, np.int64)
    weights = np.ones(len(edges), np.uint8)
    graph = coo_array((weights, (edges[:, 0], edges[:, 1])), shape=(count, count))
    number, labels = connected_components(graph, directed=False)
    firsts = np.full(number, count, np.int64)
    np.minimum.at(firsts, labels, np.arange(count))
    found: Int64 = firsts[labels]
    return found


def judge_pairs(
    out: Path, *, pairs: Path, first: int, last: int, folders: Sequence[Path], offsets: Int64
) -> Mapping[str, Any]:
    """The task of judging some pairs: `jaccard` [P] of those from `first` to `last`."""
    asked = load(pairs, "pairs")[first:last]
    sets = _Sets(folders, offsets)
    values = [jaccard(sets.of(int(one)), sets.of(int(other))) for one, other in asked]
    save(out, jaccard=np.array(values, np.float64))
    return {"pairs": len(values)}


class _Sets:
    """Shingles of documents by number, those used last at hand."""

    def __init__(self, folders: Sequence[Path], offsets: Int64) -> None:
        self._folders, self._offsets = folders, offsets
        self._texts: dict[int, Texts] = {}
        self._found: OrderedDict[int, npt.NDArray[np.uint64]] = OrderedDict()

    def of(self, number: int) -> npt.NDArray[np.uint64]:
        if number in self._found:
            self._found.move_to_end(number)
            return self._found[number]
        shard = int(shard_of(np.array([number]), self._offsets)[0])
        if shard not in self._texts:
            self._texts[shard] = Texts(self._folders[shard] / DOCUMENTS)
        found = shingle_set(self._texts[shard][number - int(self._offsets[shard])])
        self._found[number] = found
        if len(self._found) > _SETS_KEPT:
            self._found.popitem(last=False)
        return found


def cut_bucket(
    out: Path,
    *,
    folders: Sequence[Path],
    offsets: Int64,
    paragraphs: Int64,
    bucket: int,
    buckets: int,
    alive: Path,
) -> Mapping[str, Any]:
    """The task of one bucket of paragraphs: `cuts` [P, 3], each the number of a paragraph that an
    earlier document has too, of its document, and of that earlier one. `paragraphs` holds the
    number of each shard's first paragraph, as `offsets` that of its first document."""
    keys, numbers = bucket_entries(folders, paragraphs, "paragraphs", bucket, buckets, None)
    shards = shard_of(numbers, paragraphs)
    documents = np.empty(len(numbers), np.int64)
    for shard in np.unique(shards).tolist():
        here = shards == shard
        spans = load(folders[shard], "paragraph_spans")
        documents[here] = spans[numbers[here] - paragraphs[shard], 0] + offsets[shard]
    stays = load(alive, "alive")[documents]
    keys, numbers, documents = keys[stays], numbers[stays], documents[stays]
    begins = np.r_[True, keys[1:] != keys[:-1]][: len(keys)]
    starts = np.flatnonzero(begins)
    firsts = np.repeat(documents[starts], np.diff(np.r_[starts, len(keys)]))
    again = documents != firsts
    save(out, cuts=np.stack([numbers, documents, firsts], axis=1)[again])
    return {"paragraphs": len(numbers), "cut": int(again.sum())}

"""Decides which documents are held out.

Near-duplicates go to the same side together: documents of which half of the smaller one's windows
stand in the other, which is more than `dedup.py` drops.

Axes: N documents, P pairs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from configs.seed import derive
from stages.data.dedup import components
from stages.data.join import Int64
from stages.overlap import NEAR_DUPLICATE_SHARE

CHARS_A_TOKEN = 8
"""More than tokenizers take together on the whole: of held-out text, more could not be packed."""

Bools = npt.NDArray[np.bool_]
Uint64 = npt.NDArray[np.uint64]


@dataclass(slots=True)
class Sides:
    """Which documents are held out, and what was found on the way."""

    held_out_N: Bools
    groups: int = 0
    """Groups of near-duplicates, of two documents or more."""
    large_groups: int = 0
    """Those that are larger than the share to hold out and so were left to training."""
    grouped_documents: int = 0


@dataclass(frozen=True, slots=True)
class Corpus:
    """The documents that are left, as far as their side depends on it."""

    names: Sequence[str]
    """The sources'."""
    source_N: npt.NDArray[np.integer]
    """Each document's source, by its place in `names`."""
    digest_N: Uint64
    chars_N: Int64
    sketch_sizes_N: Int64
    alive_N: Bools = field(repr=False)
    """Those that no step before has dropped; the others are on neither side."""


def part(
    corpus: Corpus,
    pairs: Int64,
    counts: Int64,
    share: float,
    *,
    max_tokens: int,
    seed: int,
) -> Sides:
    """Each source's documents on two sides; those that share windows, as `pairs` [P, 2] and the
    `counts` [P] of them say, on the same one."""
    leaders = near_duplicates(pairs, counts, corpus.sketch_sizes_N)
    members = np.bincount(leaders[corpus.alive_N], minlength=len(leaders))
    is_group = members > 1
    is_large = _larger(corpus, leaders, share) & is_group
    # The least digest of a group, so that the order in which sources are read moves nothing.
    keys = np.full(len(leaders), np.iinfo(np.uint64).max, np.uint64)
    np.minimum.at(keys, leaders, corpus.digest_N)
    held_out = np.zeros(len(leaders), np.bool_)
    for number in range(len(corpus.names)):
        here = np.flatnonzero((corpus.source_N == number) & corpus.alive_N)
        chosen = keys[leaders[here]]
        if len(np.unique(chosen)) < 2:
            # One group alone: each document for itself, or nothing could be held out.
            chosen = corpus.digest_N[here]
        stays = np.isin(chosen, chosen[is_large[leaders[here]]])
        held_out[here] = hold_out(
            chosen,
            corpus.chars_N[here],
            share,
            max_chars=CHARS_A_TOKEN * max_tokens,
            seed=seed,
            stays=stays,
        )
    _follow(held_out, corpus, leaders, is_group & ~is_large)
    return Sides(held_out, int(is_group.sum()), int(is_large.sum()), int(members[is_group].sum()))


def _follow(held_out: Bools, corpus: Corpus, leaders: Int64, is_group: Bools) -> None:
    """Hold out what is in a group with a document that another source holds out, unless nothing of
    its own source would be left to train on."""
    held = np.zeros(len(leaders), np.bool_)
    held[leaders[held_out]] = True
    for number in range(len(corpus.names)):
        here = (corpus.source_N == number) & corpus.alive_N
        more = here & (held & is_group)[leaders] & ~held_out
        if (here & ~held_out & ~more).any():
            held_out |= more


def near_duplicates(pairs: Int64, counts: Int64, sizes_N: Int64) -> Int64:
    """For each document the first one of its group [N]: documents linked by pairs of which the one
    has half of the smaller one's windows, as `counts` [P] and how many each has, `sizes_N`, say."""
    smaller = sizes_N[pairs].min(axis=1, initial=np.iinfo(np.int64).max)
    return components(pairs[counts >= NEAR_DUPLICATE_SHARE * smaller], len(sizes_N))


def hold_out(
    keys: Uint64, chars: Int64, share: float, *, max_chars: int, seed: int, stays: Bools
) -> Bools:
    """Which of a source's documents are held out; those of equal keys go to the same side.

    A document's place follows from its key and the seed alone, so that adding documents moves
    those alone whose key they change, as near-duplicates do, and those that `max_chars` has no more
    room for: of the documents within `share` the first are taken until so much text is held out.
    Those that stay are trained on, unless all are of that kind. When chance would leave either side
    without any, the nearest to the threshold crosses it.
    """
    if not len(keys):
        return np.zeros(0, np.bool_)
    places = draw(keys, seed)
    if not stays.all():
        places = np.where(stays, 1.0, places)
    least, most = float(places.min()), float(places.max())
    threshold = min(max(share, least), most - 2**-53) if least < most else share
    order = np.argsort(places, kind="stable")
    before = np.r_[0, np.cumsum(chars[order])[:-1]]
    # Of equal places, which are those of one group, all or none.
    enough = places[order][before >= max_chars]
    limit = float(enough[0]) if len(enough) else np.inf
    return (places <= threshold) & ((places < limit) | (places <= least))


def draw(keys: Uint64, seed: int) -> npt.NDArray[np.float64]:
    """A place in [0, 1) for each key, as if drawn (the finaliser of SplitMix64)."""
    x = keys ^ np.uint64(derive(seed, "data", "held-out"))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((x ^ (x >> np.uint64(31))) >> np.uint64(11)).astype(np.float64) / 2.0**53


def _larger(corpus: Corpus, leaders: Int64, share: float) -> Bools:
    """Whether a leader's group makes up more than `share` of the text of some source."""
    large = np.zeros(len(leaders), np.bool_)
    for number in range(len(corpus.names)):
        here = (corpus.source_N == number) & corpus.alive_N
        sizes = np.bincount(leaders[here], corpus.chars_N[here], minlength=len(leaders))
        large |= sizes > share * sizes.sum()
    return large


def by_place(numbers: Int64, digest_N: Uint64, seed: int) -> Int64:
    """Documents in the order in which held-out text is packed: drawn, whatever was read first."""
    return numbers[np.lexsort((numbers, draw(digest_N[numbers], seed)))]


def share_of(count: int, whole: int) -> float:
    """A part of a whole; nothing of nothing."""
    return count / whole if whole else 0.0


def named(counts: Mapping[str, int]) -> dict[str, int]:
    """Counts in the order of their names."""
    return dict(sorted(counts.items()))

"""Finds documents that share keys, in parts that each fit in memory.

Every shard leaves its *entries*, (64-bit key, row) sorted by key. A *bucket* is the entries of all
shards whose keys lie in one of equal parts of the range: what shares a key is in the same bucket.
Of the documents that hold a key each is linked with the first and with the next, so that a key that
everybody has costs no more than its entries; nothing compares all pairs.

Axes: E entries, P pairs, N documents of all shards, numbered in the shards' order.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from stages.data.tables import load, save

ENTRIES_A_BUCKET = 1_000_000
"""Some 100 MB while they are sorted and linked."""

Int64 = npt.NDArray[np.int64]
Uint64 = npt.NDArray[np.uint64]
Offsets = Sequence[int] | Int64
"""The numbers of the shards' first documents."""


def save_entries(folder: Path, name: str, keys_E: Uint64, rows_E: npt.NDArray[np.integer]) -> None:
    """One shard's entries, sorted by key and row."""
    order = np.lexsort((rows_E, keys_E))
    arrays: dict[str, npt.NDArray[Any]] = {
        f"{name}_keys": keys_E[order],
        f"{name}_rows": rows_E[order].astype(np.uint32),
    }
    save(folder, **arrays)


def buckets_for(folders: Sequence[Path], name: str) -> int:
    """How many buckets the entries of these shards need."""
    total = sum(len(load(folder, f"{name}_keys")) for folder in folders)
    return max(1, -(-total // ENTRIES_A_BUCKET))


def link_bucket(
    out: Path,
    *,
    folders: Sequence[Path],
    offsets: Offsets,
    name: str,
    bucket: int,
    buckets: int,
    alive: Path | None,
) -> Mapping[str, Any]:
    """The task of one bucket: `pairs` [P, 2] (lower number first, each once) and how many keys
    each shares, `counts` [P], of the documents that the bits in `alive` keep."""
    keys, owners = bucket_entries(
        folders, offsets, name, bucket, buckets, None if alive is None else load(alive, "alive")
    )
    pairs, counts = links(keys, owners)
    save(out, pairs=pairs, counts=counts)
    return {"entries": len(keys), "pairs": len(pairs)}


def bucket_entries(
    folders: Sequence[Path],
    offsets: Offsets,
    name: str,
    bucket: int,
    buckets: int,
    alive_N: npt.NDArray[np.bool_] | None,
) -> tuple[Uint64, Int64]:
    """Keys [E] and documents [E] of one bucket, sorted by key, then document."""
    low, high = (bucket << 64) // buckets, ((bucket + 1) << 64) // buckets - 1
    keys, owners = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for folder, offset in zip(folders, offsets, strict=True):
        found = load(folder, f"{name}_keys")
        first = int(np.searchsorted(found, np.uint64(low), side="left"))
        last = int(np.searchsorted(found, np.uint64(high), side="right"))
        rows = load(folder, f"{name}_rows")[first:last].astype(np.int64) + offset
        kept = slice(None) if alive_N is None else alive_N[rows]
        keys.append(np.asarray(found[first:last])[kept])
        owners.append(rows[kept])
    every_E, owners_E = np.concatenate(keys), np.concatenate(owners)
    order = np.lexsort((owners_E, every_E))
    return every_E[order], owners_E[order]


def links(keys_E: Uint64, owners_E: Int64) -> tuple[Int64, Int64]:
    """Pairs [P, 2] of documents linked by sorted entries, and by how many keys each is."""
    if not len(keys_E):
        return np.empty((0, 2), np.int64), np.empty(0, np.int64)
    begins = np.r_[True, keys_E[1:] != keys_E[:-1]]
    starts = np.flatnonzero(begins)
    firsts = np.repeat(owners_E[starts], np.diff(np.r_[starts, len(keys_E)]))
    nexts = np.where(np.r_[~begins[1:], False], np.r_[owners_E[1:], owners_E[-1:]], owners_E)
    # What stands in two documents alone links them by both rules, and counts once.
    onward = (nexts != owners_E) & (firsts != owners_E)
    one = np.stack([firsts, owners_E], axis=1)[firsts != owners_E]
    other = np.stack([owners_E, nexts], axis=1)[onward]
    return tally(np.concatenate([one, other]))


def tally(pairs: Int64, counts: Int64 | None = None) -> tuple[Int64, Int64]:
    """The distinct pairs [P, 2], ascending, and the sum of the counts of each, or how often it is
    there."""
    if not len(pairs):
        return np.empty((0, 2), np.int64), np.empty(0, np.int64)
    order = np.lexsort((pairs[:, 1], pairs[:, 0]))
    pairs = pairs[order]
    begins = np.r_[True, (pairs[1:] != pairs[:-1]).any(axis=1)]
    starts = np.flatnonzero(begins)
    if counts is None:
        return pairs[starts], np.diff(np.r_[starts, len(pairs)])
    return pairs[starts], np.add.reduceat(counts[order], starts)


def shard_of(numbers: Int64, offsets: Offsets) -> Int64:
    """Which shard each document is in; `offsets` are the first numbers of the shards."""
    found: Int64 = np.searchsorted(np.asarray(offsets), numbers, side="right") - 1
    return found

"""Packs documents into rows of one length, and mixes the rows of several sources.

Axes: N rows, S tokens of a row.
"""

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

from configs.seed import derive
from stages.framing import BOS_ID, EOS_ID

Int32 = npt.NDArray[np.int32]


def frame(token_ids: Int32) -> Int32:
    """A document as it is packed: BOS, its tokens, EOS."""
    return np.concatenate([[BOS_ID], token_ids, [EOS_ID]]).astype(np.int32)


def take_until(documents: Iterable[Int32], max_tokens: int) -> list[Int32]:
    """Framed documents from the front until they hold `max_tokens` or none is left."""
    taken, total = [], 0
    for document in documents:
        if total >= max_tokens:
            break
        taken.append(document)
        total += len(document)
    return taken


def pack(
    documents: Sequence[Int32], *, sequence_tokens: int, max_rows: int, pad: bool = False
) -> Int32:
    """Rows [N, S] of framed documents laid end to end, at most `max_rows`.

    What is left at the end is dropped, or with `pad` filled up with BOS, which is never scored.
    """
    if not documents:
        return np.empty((0, sequence_tokens), dtype=np.int32)
    stream = np.concatenate(documents)
    if pad and (lack := -len(stream) % sequence_tokens):
        stream = np.concatenate([stream, np.full(lack, BOS_ID, dtype=np.int32)])
    num_rows = min(max_rows, len(stream) // sequence_tokens)
    return stream[: num_rows * sequence_tokens].reshape(num_rows, sequence_tokens)


def row_budget(shares: Mapping[str, float], total_rows: int) -> dict[str, int]:
    """Rows of each source so that shares hold and the rows add up to `total_rows`."""
    exact = {name: share * total_rows for name, share in shares.items()}
    budget = {name: math.floor(rows) for name, rows in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (budget[name] - exact[name], name))
    for name in by_remainder[: total_rows - sum(budget.values())]:
        budget[name] += 1
    return budget


def mixable_rows(shares: Mapping[str, float], available: Mapping[str, int], wanted: int) -> int:
    """The most rows, at most `wanted`, that the available rows fill without bending the shares."""
    return min([wanted, *(math.floor(available[name] / shares[name] + 1e-9) for name in shares)])


def interleave(rows: Mapping[str, Int32], *, seed: int) -> Int32:
    """All rows [N, S] in an order whose every prefix holds the mixture to about a row a source.

    Each source's rows are shuffled first, so that neighbours come from different documents; row
    j of a source's n then lies at a point drawn from the j-th of n equal parts of the whole.
    """
    blocks, points = [], []
    for name, block in sorted(rows.items()):
        rng = np.random.default_rng(derive(seed, "data", name, "rows"))
        blocks.append(block[rng.permutation(len(block))])
        points.append((np.arange(len(block)) + rng.random(len(block))) / max(1, len(block)))
    order = np.argsort(np.concatenate(points), kind="stable")
    return np.concatenate(blocks)[order]

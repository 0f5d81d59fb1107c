"""Work on entries that were gathered for each query, without ever keeping what was gathered.

Attention over K chosen entries of width X reads K * X values a query, many times what it returns.
Here queries go chunk by chunk: a chunk's entries are gathered, used and dropped, and gathered
again in the backward pass, where their gradients are added into one buffer of the entries' own
size. Time grows with Q * K, and memory with Q + L.

Axes: Q queries, K entries chosen for each, L entries, X entry width.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.rows import add_rows
from model.widening import widened

Core = Callable[[Sequence[Tensor], Sequence[Tensor], Tensor, Sequence[Tensor]], tuple[Tensor, ...]]
"""(per query, gathered_QKX of each of the entries, valid_QK, shared) -> tensors [Q, ...].

A query's results may depend on its own entries and on what is shared alone."""

CHUNK_VALUES = 2**22
"""Values gathered at a time: 16 MiB in float32. Fewer cost more in calls, more cost more in misses
(measured from 2^16 to 2^24)."""


def over_chosen(
    core: Core,
    chosen_QK: Int[Tensor, "Q K"],
    *,
    entries: Sequence[Tensor],
    queries: Sequence[Tensor],
    shared: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """What `core` returns for all queries.

    `entries` are tensors [L, X] of any widths, `queries` have Q as their first axis, `shared`
    belong to all; each receives its gradient, summed in float32 at least, once: there is no second
    derivative. An index below 0 in `chosen` stands for no entry; `valid` is false there, and what
    is gathered is entry 0.
    """
    width = sum(tensor.shape[1] for tensor in entries)
    rows = max(1, CHUNK_VALUES // max(1, chosen_QK.shape[1] * width))
    counts = len(entries), len(queries)
    results: tuple[Tensor, ...] = _OverChosen.apply(
        core, rows, counts, chosen_QK, *entries, *queries, *shared
    )
    return results


class _OverChosen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        core: Core,
        rows: int,
        counts: tuple[int, int],
        chosen_QK: Tensor,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.core, ctx.rows, ctx.counts = core, rows, counts
        ctx.save_for_backward(chosen_QK, *tensors)
        entries, queries, shared = _parts(tensors, counts)
        results: list[Tensor] = []
        for part, index_QK, valid_QK in _chunks(chosen_QK, rows):
            gathered = [_rows(e_LX, index_QK) for e_LX in entries]
            found = core([q[part] for q in queries], gathered, valid_QK, shared)
            if not results:
                results = [y.new_empty(len(chosen_QK), *y.shape[1:]) for y in found]
            for whole, y in zip(results, found, strict=True):
                whole[part] = y
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        chosen_QK, *tensors = ctx.saved_tensors
        entries, queries, shared = _parts(tensors, ctx.counts)
        sums = [torch.zeros_like(widened(tensor)) for tensor in tensors]
        d_entries, d_queries, d_shared = _parts(sums, ctx.counts)
        for part, index_QK, valid_QK in _chunks(chosen_QK, ctx.rows):
            gathered = [_leaf(_rows(e_LX, index_QK)) for e_LX in entries]
            mine = [_leaf(q[part]) for q in queries]
            common = [_leaf(tensor) for tensor in shared]
            with torch.enable_grad():
                found = ctx.core(mine, gathered, valid_QK, common)
            slopes = torch.autograd.grad(
                found, [*gathered, *mine, *common], [g[part] for g in grads]
            )
            d_gathered, d_mine, d_common = _parts(slopes, ctx.counts)
            for whole, d_QKX in zip(d_entries, d_gathered, strict=True):
                add_rows(whole, index_QK.flatten(), d_QKX.flatten(0, 1))
            for whole, d in zip(d_queries, d_mine, strict=True):
                whole[part] = d
            for whole, d in zip(d_shared, d_common, strict=True):
                whole += d
        slopes_of_all = (s.to(tensor.dtype) for s, tensor in zip(sums, tensors, strict=True))
        return None, None, None, None, *slopes_of_all


def _parts(
    tensors: Sequence[Tensor], counts: tuple[int, int]
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """(entries, per query, shared)."""
    entries, queries = counts
    return tensors[:entries], tensors[entries : entries + queries], tensors[entries + queries :]


def _chunks(chosen_QK: Tensor, rows: int) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(queries, indices that exist, validity) of each chunk; one of none where there are none."""
    for begin in range(0, max(1, len(chosen_QK)), rows):
        part = slice(begin, begin + rows)
        yield part, chosen_QK[part].clamp_min(0), chosen_QK[part] >= 0


def _rows(entries_LX: Tensor, index_QK: Tensor) -> Tensor:
    """entries[index], at half the time of an indexing."""
    flat_NX = entries_LX.index_select(0, index_QK.flatten())
    return flat_NX.view(*index_QK.shape, flat_NX.shape[1])


def _leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().requires_grad_()

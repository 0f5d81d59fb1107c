"""Grouped GEMM for experts: rows sorted by expert, one weight matrix each.

The numbers are those of `model/fp8/linear.py` applied to each expert alone, with one quantisation
call for the whole sorted batch. Tiles never straddle two experts, nor the gate and up halves of
one.

Axes: N rows sorted by expert, E experts on this device, I inputs, O outputs.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.fp8.format import round_trip, round_trip_segments
from model.fp8.linear import ACTIVATION, BLOCK


def grouped_linear(
    x_NI: Float[Tensor, "N I"],
    weight_EOI: Float[Tensor, "E O I"],
    counts_E: Int[Tensor, " E"],
    *,
    halves: int = 1,
) -> Float[Tensor, "N O"]:
    """Row block e of `x` times weight e, transposed. `halves` stacked outputs quantise apart."""
    result: Tensor = _Fp8Grouped.apply(x_NI, weight_EOI, counts_E, halves)
    return result


def _per_expert(counts: list[int], product: Callable[[int, slice], Tensor]) -> list[Tensor]:
    results, start = [], 0
    for expert, count in enumerate(counts):
        results.append(product(expert, slice(start, start + count)))
        start += count
    return results


class _Fp8Grouped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, counts_E: Tensor, halves: int) -> Tensor:
        x8 = round_trip(x, ACTIVATION)
        split = weight.unflatten(1, (halves, -1))
        weight8 = round_trip(split, BLOCK).flatten(1, 2)
        ctx.save_for_backward(x8, weight8, counts_E)
        ctx.halves = halves
        return torch.cat(_per_expert(counts_E.tolist(), lambda e, rows: x8[rows] @ weight8[e].T))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = grads
        x8, weight8, counts_E = ctx.saved_tensors
        counts = counts_E.tolist()
        dy8 = round_trip(dy.unflatten(1, (ctx.halves, -1)), ACTIVATION).flatten(1)
        dx = torch.cat(_per_expert(counts, lambda e, rows: dy8[rows] @ weight8[e]))
        dy_tokens = round_trip_segments(dy, counts_E)
        x_tokens = round_trip_segments(x8, counts_E)
        dw = torch.stack(_per_expert(counts, lambda e, rows: dy_tokens[rows].T @ x_tokens[rows]))
        return dx, dw, None, None

"""Several matrices at once in FP8: rows sorted by the matrix that they meet.

The numbers are those of `model/fp8/linear.py` for each matrix alone; tiles along tokens start anew
with each.

Axes: N rows sorted by group, G groups, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fp8.quantized import Quantized
from model.fp8.scheme import Fp8


def fp8_grouped_linear(
    x_NI: Float[Tensor, "N I"],
    weight_GOI: Float[Tensor, "G O I"],
    counts: Sequence[int],
    scheme: Fp8,
) -> Float[Tensor, "N O"]:
    """Row block g of `x`, of `counts[g]` rows, times weight g, transposed."""
    learning = torch.is_grad_enabled()
    result: Tensor = _Fp8Grouped.apply(x_NI, weight_GOI, tuple(counts), scheme, learning)
    return result


class _Fp8Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, counts: tuple[int, ...], scheme: Fp8, learning: bool
    ) -> Tensor:
        x8, weight8 = scheme.activations(x), scheme.weights(weight)
        if learning:
            ctx.save_for_backward(*scheme.input_to_save(x, x8), weight8.values, weight8.scales)
            ctx.tiles, ctx.columns = (x8.tile, weight8.tile), x.shape[1]
            ctx.counts, ctx.scheme = counts, scheme
        return scheme.backend(x.device).grouped_matmul(x8, weight8.T, counts).to(x.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy,), scheme, counts = grads, ctx.scheme, ctx.counts
        values, scales, weight_values, weight_scales = ctx.saved_tensors
        x_tile, weight_tile = ctx.tiles
        backend = scheme.backend(dy.device)
        weight8 = Quantized(weight_values, weight_scales, weight_tile)
        dx = backend.grouped_matmul(scheme.gradients(dy.contiguous(), counts), weight8, counts).to(
            dy.dtype
        )
        saved = scheme.saved_input(values, scales, x_tile, ctx.columns)
        x_tokens = scheme.activations_along_tokens(saved, counts)
        dy_tokens = scheme.gradients_along_tokens(dy, counts)
        return dx, backend.grouped_outer(dy_tokens, x_tokens, counts), None, None, None

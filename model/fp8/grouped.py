"""A Linear of several matrices in FP8: rows sorted by group, each group with a matrix of its own.

The numbers are those of `model/fp8/linear.py` for each group alone: tiles along tokens start anew
with each group, so that no scale is shared between two.

Axes: N rows sorted by group, G groups, I inputs, O outputs.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fp8.products import dgrad, fprop, wgrad
from model.fp8.quantized import from_tensors, to_tensors
from model.fp8.scheme import Fp8


def fp8_grouped_linear(
    x_NI: Float[Tensor, "N I"],
    weight_GOI: Float[Tensor, "G O I"],
    counts: Sequence[int],
    scheme: Fp8,
) -> Float[Tensor, "N O"]:
    """x W[g]^T for each group's rows, in the dtype of `x`; `counts[g]` rows of x are group g's."""
    learning = torch.is_grad_enabled()
    result: Tensor = _Fp8Grouped.apply(x_NI, weight_GOI, tuple(counts), scheme, learning)
    return result


class _Fp8Grouped(torch.autograd.Function):
    """The products of one x; `learning` says whether a backward pass may follow."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_GOI: Tensor,
        counts: tuple[int, ...],
        scheme: Fp8,
        learning: bool,
    ) -> Tensor:
        x8_NI, weight8_GOI = scheme.activations(x_NI), scheme.weights(weight_GOI)
        if learning:
            tensors, ctx.layouts = to_tensors([scheme.input_to_save(x_NI, x8_NI), weight8_GOI])
            ctx.save_for_backward(*tensors)
            ctx.counts, ctx.scheme = counts, scheme
        return fprop(scheme.backend(x_NI.device), x8_NI, weight8_GOI, counts).to(x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_NO,), scheme, counts = grads, ctx.scheme, ctx.counts
        backend = scheme.backend(dy_NO.device)
        saved_NI, weight8_GOI = from_tensors(ctx.saved_tensors, ctx.layouts)
        dy8_NO = scheme.gradients(dy_NO.contiguous(), counts)
        dx_NI = dgrad(backend, dy8_NO, weight8_GOI, counts).to(dy_NO.dtype)
        x_tokens_NI = scheme.activations_along_tokens(saved_NI, counts)
        dy_tokens_NO = scheme.gradients_along_tokens(dy_NO, counts)
        dw_GOI = wgrad(backend, dy_tokens_NO, x_tokens_NI, counts)
        return dx_NI, dw_GOI, None, None, None

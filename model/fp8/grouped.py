"""A Linear of several matrices in FP8: rows sorted by group, each group with a matrix of its own.

The numbers are those of `model/fp8/linear.py` for each group alone: tiles along tokens start anew
with each group, so that no scale is shared between two.

Axes: N rows sorted by group, G groups, I inputs, O outputs, Y = G * O.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.fp8.groups import Groups
from model.fp8.products import dgrad, fprop, wgrad
from model.fp8.quantized import from_tensors, to_tensors
from model.fp8.scheme import Fp8
from model.weight_gradients import gradients


def fp8_grouped_linear(
    x_NI: Float[Tensor, "N I"],
    weight_YI: Float[Tensor, "Y I"],
    groups: Groups,
    scheme: Fp8,
) -> Float[Tensor, "N O"]:
    """x W[g]^T for each group's rows, in the dtype of `x`.

    The groups' matrices stand one above the other in `weight`, a parameter as it is: by it the
    quantised weights are found again.
    """
    learning = torch.is_grad_enabled()
    result: Tensor = _Fp8Grouped.apply(x_NI, weight_YI, groups, scheme, learning)
    return result


class _Fp8Grouped(torch.autograd.Function):
    """The products of one x; `learning` says whether a backward pass may follow."""

    @staticmethod
    def forward(
        ctx: Any,
        x_NI: Tensor,
        weight_YI: Tensor,
        groups: Groups,
        scheme: Fp8,
        learning: bool,
    ) -> Tensor:
        x8_NI = scheme.activations(x_NI)
        weight8_GOI = scheme.weights(weight_YI, matrices=len(groups), learning=learning)
        if learning:
            tensors, ctx.layouts = to_tensors([scheme.input_to_save(x_NI, x8_NI), weight8_GOI])
            ctx.save_for_backward(*tensors)
            ctx.groups, ctx.scheme, ctx.weight = groups, scheme, weight_YI
        return fprop(scheme.backend(x_NI.device), x8_NI, weight8_GOI, groups).to(x_NI.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (dy_NO,), scheme, groups = grads, ctx.scheme, ctx.groups
        backend = scheme.backend(dy_NO.device)
        saved_NI, weight8_GOI = from_tensors(ctx.saved_tensors, ctx.layouts)
        dy8_NO = scheme.gradients(dy_NO.contiguous(), groups)
        dx_NI = dgrad(backend, dy8_NO, weight8_GOI, groups).to(dy_NO.dtype)

        def make() -> list[Tensor]:
            x_tokens_NI = scheme.activations_along_tokens(saved_NI, groups)
            dy_tokens_NO = scheme.gradients_along_tokens(dy_NO, groups)
            return [wgrad(backend, dy_tokens_NO, x_tokens_NI, groups).flatten(0, 1)]

        return dx_NI, *gradients([ctx.weight], make), None, None, None

"""Sums in float32 at least, whatever type the weights and the stream of states have.

bfloat16 has 8 bits: a sum of many terms held in it stops growing once a term is below 2^-9 of it,
and a softmax of scores rounded to it is off by their last bit, 3 % at a score of 8. So scores,
softmaxes, norms and every accumulator are float32 inside, and a result is rounded once, when it
leaves. float64 stays float64.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.weight_cache import cast


def widened(x: Tensor) -> Tensor:
    """`x` in float32 at least: narrower types are cast, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def wide_mm(a_NK: Tensor, b_KM: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a @ b of two narrow matrices in float32, and of wider ones in their own type; into `out`.

    Devices whose units multiply narrow values and add in float32 hand the sum out as it is where
    torch can ask for it, which is on CUDA; elsewhere it is rounded on its way out. CPUs multiply
    what is widened.
    """
    if a_NK.device.type == "cpu" or widened(a_NK) is a_NK:
        return torch.mm(widened(a_NK), widened(b_KM), out=out)
    if a_NK.device.type == "cuda":
        return torch.mm(a_NK, b_KM, out_dtype=torch.float32, out=out)
    return widened(a_NK @ b_KM) if out is None else out.copy_(a_NK @ b_KM)


def add_wide_mm(sum_NM: Tensor, a_NK: Tensor, b_KM: Tensor) -> None:
    """Add `wide_mm` of two matrices to a sum of its type."""
    if a_NK.dtype == sum_NM.dtype:
        sum_NM.addmm_(a_NK, b_KM)
    else:
        sum_NM += wide_mm(a_NK, b_KM)


def wide_linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """x W^T [*B, O] for each last-dim vector of `x`, in float32 at least.

    Values multiplied have the type of `x`; of a float32 weight the gradient is float32.
    """
    y: Tensor = _WideLinear.apply(x.reshape(-1, x.shape[-1]), weight_OI, cast(weight_OI, x.dtype))
    return y.view(*x.shape[:-1], len(weight_OI))


class _WideLinear(torch.autograd.Function):
    """`copy` is the weight in the type of `x`, and passes no gradient on."""

    @staticmethod
    def forward(ctx: Any, x_NI: Tensor, weight_OI: Tensor, copy_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_NI, copy_OI)
        ctx.dtype = weight_OI.dtype
        return wide_mm(x_NI, copy_OI.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_NI, copy_OI = ctx.saved_tensors
        dy_NO = grads[0].to(x_NI.dtype)
        return dy_NO @ copy_OI, wide_mm(dy_NO.T, x_NI).to(ctx.dtype), None

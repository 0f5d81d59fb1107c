"""Cross-entropy of a linear head that keeps neither the logits nor their gradient.

Logits of a batch are its largest tensor by far: at 4,096 tokens of vocabulary they outweigh every
activation, and a pass over them costs more in fresh memory than in arithmetic. Rows go chunk by
chunk through one buffer instead, and a chunk's gradients are taken while its probabilities lie
there (the loss is a sum, so they are known but for one factor).

Axes: N rows, D width, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.fp8.linear import Linear
from model.weight_cache import cast
from model.widening import add_wide_mm, wide_mm, widened

CHUNK_ROWS = 512
"""Rows whose logits are there at a time: a few MiB that stay in a core's reach between passes, and
enough rows to make adding to the head's gradient cheap."""

UNSCORED = -1
"""The target of a row that says nothing."""


def cross_entropy(
    x_ND: Float[Tensor, "N D"], head: Linear, targets_N: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """`linear_cross_entropy` of the head, or of the logits that it makes in FP8."""
    if head.scheme is None:
        return linear_cross_entropy(x_ND, head.weight, targets_N)
    logits_NV = widened(head(x_ND))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=UNSCORED, reduction="sum")


def linear_cross_entropy(
    x_ND: Float[Tensor, "N D"], head_VD: Float[Tensor, "V D"], targets_N: Int[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Sum of -log softmax(x head^T)[target] in nats, over the rows whose target is not negative.

    Logits and sums are float32 at least; what is multiplied has the type of `x`, on CPUs float32
    at least. Memory is one chunk of logits, a copy of `head` if it is wider than `x`, and where
    gradients may follow, theirs.
    """
    learning = torch.is_grad_enabled()
    copy_VD = cast(head_VD, x_ND.dtype)
    loss: Tensor = _LinearCrossEntropy.apply(x_ND, head_VD, copy_VD, targets_N, learning)
    return loss


class _LinearCrossEntropy(torch.autograd.Function):
    """`copy` is the head in the type of `x`, and passes no gradient on."""

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, head_VD: Tensor, copy_VD: Tensor, targets_N: Tensor, learning: bool
    ) -> Tensor:
        ctx.dtypes = x_ND.dtype, head_VD.dtype
        if x_ND.device.type == "cpu":
            x_ND, copy_VD = widened(x_ND), widened(copy_VD)
        wide = torch.promote_types(x_ND.dtype, torch.float32)
        loss = x_ND.new_zeros((), dtype=wide)
        slopes = (torch.empty_like(x_ND), torch.zeros_like(copy_VD, dtype=wide)) if learning else ()
        buffer_CV = x_ND.new_empty(min(CHUNK_ROWS, len(x_ND)), len(copy_VD), dtype=wide)
        for begin in range(0, len(x_ND), CHUNK_ROWS):
            part = slice(begin, begin + CHUNK_ROWS)
            x_CD, targets_C1 = x_ND[part], targets_N[part, None]
            scored_C1 = (targets_C1 >= 0).to(x_ND.dtype)
            targets_C1 = targets_C1.clamp_min(0)
            logits_CV = wide_mm(x_CD, copy_VD.T, out=buffer_CV[: len(x_CD)])
            torch.log_softmax(logits_CV, dim=1, out=logits_CV)
            loss -= (logits_CV.gather(1, targets_C1) * scored_C1).sum()
            if slopes:
                d_x_ND, d_head_VD = slopes
                d_logits_CV = logits_CV.exp_()
                d_logits_CV.scatter_add_(1, targets_C1, loss.new_full(targets_C1.shape, -1))
                d_logits_CV = d_logits_CV.to(x_ND.dtype)
                torch.mm(d_logits_CV, copy_VD, out=d_x_ND[part]).mul_(scored_C1)
                add_wide_mm(d_head_VD, d_logits_CV.T, x_CD * scored_C1)
        ctx.save_for_backward(*slopes)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_x, d_head = (
            (slope * grads[0]).to(dtype)
            for slope, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return d_x, d_head, None, None, None

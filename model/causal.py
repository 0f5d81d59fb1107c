"""Causal softmax attention of short texts on a CPU, forward and backward in blocks of queries.

torch's own kernels need equal widths of keys and values, or else score every pair of tokens and
keep several copies of the scores. Here a block of queries meets the keys up to its last query and
no more, and the probabilities are all that is kept for the backward pass; they take B H S^2 / 2
values, which is why longer texts are left to torch, as are other devices and narrower types.

Axes: B sequences, H heads, S positions, Q query and key width, V value width, P = B H pairs.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK = 128
"""Queries in a block: a shorter one scores fewer pairs in vain, a longer one multiplies faster."""
LONGEST = 1024
"""Positions up to which probabilities are kept."""


def causal_attention(
    q_BHSQ: Float[Tensor, "B H S Q"],
    k_BHSQ: Float[Tensor, "B H S Q"],
    v_BHSV: Float[Tensor, "B H S V"],
    mask_B1SS: Bool[Tensor, "B 1 S S"] | None,
    *,
    scale: float,
) -> Float[Tensor, "B S H V"]:
    """softmax(scale q k^T) v over the keys that are not later, or true in the mask if there is one.

    The mask must be false for later keys, and true somewhere for each query.
    """
    in_blocks = q_BHSQ.device.type == "cpu" and q_BHSQ.dtype in (torch.float32, torch.float64)
    if in_blocks and 0 < q_BHSQ.shape[2] <= LONGEST:
        out_BSHV: Tensor = _CausalAttention.apply(q_BHSQ, k_BHSQ, v_BHSV, mask_B1SS, scale)
        return out_BSHV
    return F.scaled_dot_product_attention(
        q_BHSQ, k_BHSQ, v_BHSV, attn_mask=mask_B1SS, is_causal=mask_B1SS is None, scale=scale
    ).transpose(1, 2)


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask_B1SS: Tensor | None, scale: float
    ) -> Tensor:
        q_PSQ = torch.mul(q, scale, out=q.new_empty(q.shape)).flatten(0, 1)
        k_PSQ, v_PSV = k.contiguous().flatten(0, 1), v.contiguous().flatten(0, 1)
        hidden = _hidden(q.shape[2], mask_B1SS, q)
        out = v.new_empty(v.shape[0], v.shape[2], v.shape[1], v.shape[3])
        kept = []
        for begin, end in _blocks(q.shape[2]):
            weights = torch.bmm(q_PSQ[:, begin:end], k_PSQ[:, :end].mT)
            # Without a mask only the last keys, those of the block itself, may be later.
            first = begin if mask_B1SS is None else 0
            scores = weights.unflatten(0, q.shape[:2])[..., first:]
            scores += hidden[..., begin:end, first:end]
            torch.softmax(weights, -1, out=weights)
            mixed = torch.bmm(weights, v_PSV[:, :end])
            out[:, begin:end] = mixed.unflatten(0, q.shape[:2]).transpose(1, 2)
            if any(ctx.needs_input_grad):
                kept.append(weights)
        ctx.save_for_backward(q_PSQ, k_PSQ, v_PSV, *kept)
        ctx.scale = scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_PSQ, k_PSQ, v_PSV, *kept = ctx.saved_tensors
        (dy_BSHV,) = grads
        length, heads = q_PSQ.shape[1], (dy_BSHV.shape[0], dy_BSHV.shape[2])
        dy_PSV = dy_BSHV.transpose(1, 2).flatten(0, 1)
        d_q = q_PSQ.new_empty(heads[0], length, heads[1], q_PSQ.shape[2]).transpose(1, 2)
        # The last block meets all keys and begins their gradients; the others add to them.
        for (begin, end), weights in reversed(list(zip(_blocks(length), kept, strict=True))):
            dy = dy_PSV[:, begin:end]
            slope = torch.bmm(dy, v_PSV[:, :end].mT)
            torch.ops.aten._softmax_backward_data.out(
                slope, weights, -1, weights.dtype, grad_input=slope
            )
            d_q_part = torch.bmm(slope, k_PSQ[:, :end]).unflatten(0, heads)
            torch.mul(d_q_part, ctx.scale, out=d_q[:, :, begin:end])
            d_k_part = torch.bmm(slope.mT, q_PSQ[:, begin:end])
            d_v_part = torch.bmm(weights.mT, dy)
            if end == length:
                d_k, d_v = d_k_part, d_v_part
            else:
                d_k[:, :end] += d_k_part
                d_v[:, :end] += d_v_part
        return d_q, d_k.unflatten(0, heads), d_v.unflatten(0, heads), None, None


def _blocks(length: int) -> list[tuple[int, int]]:
    return [(begin, min(begin + BLOCK, length)) for begin in range(0, length, BLOCK)]


def _hidden(length: int, mask_B1SS: Tensor | None, like: Tensor) -> Tensor:
    """-inf where a query must not look, else 0; [S, S] or [B, 1, S, S]."""
    if mask_B1SS is None:
        return like.new_full((length, length), float("-inf")).triu_(1)
    return like.new_zeros(mask_B1SS.shape).masked_fill_(~mask_B1SS, float("-inf"))

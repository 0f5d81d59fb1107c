"""SwiGLU with derivatives of its own: down(silu(gate(x)) * up(x)), dense or expert by expert.

Left to autograd, each small operation would keep its result and allocate its gradient; on a CPU
that costs as much as the matrix products. Here a forward pass keeps the input and the products of
gate and up, and the backward pass makes everything else again. Experts' products are written into
one tensor for all of them. Only FP8 products, whose derivatives are other products, go through
`gated` alone.

Axes: N rows, D width, I inner width, J = 2 I gate and up side by side, E experts.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def gated(
    gate: Float[Tensor, "*B I"], up: Float[Tensor, "*B I"], limit: float | None
) -> Float[Tensor, "*B I"]:
    """silu(gate) * up, after gate <= limit and |up| <= limit where there is one (V4)."""
    result: Tensor = _Gated.apply(gate, up, limit)
    return result


def swiglu(
    x: Float[Tensor, "*B D"],
    gate_ID: Float[Tensor, "I D"],
    up_ID: Float[Tensor, "I D"],
    down_DI: Float[Tensor, "D I"],
    limit: float | None,
) -> Float[Tensor, "*B D"]:
    """The whole of it for each last-dim vector, in the tensors' own precision."""
    result: Tensor = _SwiGLU.apply(x.reshape(-1, x.shape[-1]), gate_ID, up_ID, down_DI, limit)
    return result.view(x.shape)


def grouped_swiglu(
    x_ND: Float[Tensor, "N D"],
    gate_up_EJD: Float[Tensor, "E J D"],
    down_EDI: Float[Tensor, "E D I"],
    counts_E: Int[Tensor, " E"],
    limit: float | None,
) -> Float[Tensor, "N D"]:
    """As `swiglu` for rows sorted by expert, of which expert e has `counts[e]`."""
    result: Tensor = _Grouped.apply(x_ND, gate_up_EJD, down_EDI, counts_E.tolist(), limit)
    return result


def _activation(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate).mul_(up)


def _slopes(
    gate: Tensor, up: Tensor, dy: Tensor, limit: float | None, d_gate: Tensor, d_up: Tensor
) -> Tensor:
    """Fill `d_gate` and `d_up` from `dy`, which is used up; returns the activation again."""
    kept_gate, kept_up = gate, up
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    y = F.silu(gate)
    torch.mul(dy, y, out=d_up)
    torch.ops.aten.silu_backward.grad_input(dy.mul_(up), gate, grad_input=d_gate)
    if limit is not None:
        d_gate.masked_fill_(kept_gate > limit, 0)
        d_up.masked_fill_(kept_up.abs() > limit, 0)
    return y.mul_(up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.limit = limit
        return _activation(gate, up, limit)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        _slopes(gate, up, grads[0].clone(), ctx.limit, d_gate, d_up)
        return d_gate, d_up, None


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor, limit: float | None
    ) -> Tensor:
        gate, up = x @ gate_ID.T, x @ up_ID.T
        ctx.save_for_backward(x, gate, up, gate_ID, up_ID, down_DI)
        ctx.limit = limit
        return _activation(gate, up, limit) @ down_DI.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gate, up, gate_ID, up_ID, down_DI = ctx.saved_tensors
        dy = grads[0]
        d_gate, d_up = torch.empty_like(gate), torch.empty_like(up)
        inner = _slopes(gate, up, dy @ down_DI, ctx.limit, d_gate, d_up)
        dx = (d_gate @ gate_ID).addmm_(d_up, up_ID)
        return dx, d_gate.T @ x, d_up.T @ x, dy.T @ inner, None


class _Grouped(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_up: Tensor, down: Tensor, counts: list[int], limit: float | None
    ) -> Tensor:
        inner_NJ = x.new_empty(len(x), gate_up.shape[1])
        _each_mm(x.split(counts), gate_up.mT, inner_NJ.split(counts))
        ctx.save_for_backward(x, inner_NJ, gate_up, down)
        ctx.counts, ctx.limit = counts, limit
        y = torch.empty_like(x)
        inner_NI = _activation(*inner_NJ.chunk(2, dim=1), limit)
        _each_mm(inner_NI.split(counts), down.mT, y.split(counts))
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner_NJ, gate_up, down = ctx.saved_tensors
        counts = ctx.counts
        dy = grads[0].contiguous()
        rows = dy.split(counts)
        d_inner_NI = dy.new_empty(len(dy), down.shape[2])
        _each_mm(rows, down, d_inner_NI.split(counts))
        d_inner_NJ = torch.empty_like(inner_NJ)
        halves = inner_NJ.chunk(2, dim=1)
        inner_NI = _slopes(*halves, d_inner_NI, ctx.limit, *d_inner_NJ.chunk(2, dim=1))
        d_down, d_gate_up, dx = map(torch.empty_like, (down, gate_up, x))
        _each_mm([r.T for r in rows], inner_NI.split(counts), d_down)
        rows = d_inner_NJ.split(counts)
        _each_mm([r.T for r in rows], x.split(counts), d_gate_up)
        _each_mm(rows, gate_up, dx.split(counts))
        return dx, d_gate_up, d_down, None, None


def _each_mm(left: Any, right: Any, out: Any) -> None:
    """out[e] = left[e] @ right[e]; a product over no rows is zero."""
    for a, b, c in zip(left, right, out, strict=True):
        torch.mm(a, b, out=c)

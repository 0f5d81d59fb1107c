"""SwiGLU with derivatives of its own: down(silu(gate(x)) * up(x)), dense or expert by expert.

Left to autograd, each small operation would keep its result and allocate its gradient, and rows
would be copied for their experts and back again; on a CPU that costs as much as the matrix
products. Here a forward pass keeps its input and the products of gate and up alone, and the
backward pass makes everything else again; where none can follow, nothing is kept. FP8 products
are in `model.fp8.experts`.

Axes: R rows, N visits of a row to an expert, C visits of a group of experts, D width, I inner
width, J = 2 I gate and up side by side, E experts, M room for visits to an expert, X = E * M.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.dispatch import Dispatched
from model.weight_gradients import gradients, is_left
from model.widening import widened

GROUP_ROWS = 2**11
"""Visits worked on at a time: what passes between their products stays in a core's cache."""
FEW_VISITS = range(8, 65)
"""Where the busiest expert has so many visits, as in decoding, all experts may go into one padded
product: calls and threads then cost more than padding does. With fewer visits most experts have
none, and a product over all of them would read every weight for nothing."""


def swiglu(
    x: Float[Tensor, "*B D"],
    gate_ID: Float[Tensor, "I D"],
    up_ID: Float[Tensor, "I D"],
    down_DI: Float[Tensor, "D I"],
    limit: float | None,
) -> Float[Tensor, "*B D"]:
    """The whole of it for each last-dim vector, in the tensors' own precision."""
    if not torch.is_grad_enabled():
        return activation(x @ gate_ID.T, x @ up_ID.T, limit) @ down_DI.T
    result: Tensor = _SwiGLU.apply(x.reshape(-1, x.shape[-1]), gate_ID, up_ID, down_DI, limit)
    return result.view(x.shape)


def grouped_swiglu(
    sent: Dispatched,
    gate_up_EJD: Float[Tensor, "E J D"],
    down_EDI: Float[Tensor, "E D I"],
    limit: float | None,
) -> Float[Tensor, "R D"]:
    """Each row's sum of its visits' `swiglu`, by gate."""
    # The host cuts rows by expert, and waits for the device to have counted them.
    counts, learning = sent.counts_E.tolist(), torch.is_grad_enabled()
    if not learning and _are_few(counts):
        return _padded(sent, gate_up_EJD, down_EDI, max(counts), limit)
    result: Tensor = _Grouped.apply(
        sent.x_RD, sent.gates_N, gate_up_EJD, down_EDI, sent.rows_N, counts, limit, learning
    )
    return result


def _are_few(counts: list[int]) -> bool:
    """Whether a padded product is worth its padding: that may triple the work, but no more."""
    most = max(counts)
    return most in FEW_VISITS and most * len(counts) <= 3 * sum(counts)


def _padded(
    sent: Dispatched, gate_up_EJD: Tensor, down_EDI: Tensor, most: int, limit: float | None
) -> Tensor:
    """What `_Grouped` computes, without derivatives, for at most `most` visits to an expert."""
    rows_N, counts_E = sent.rows_N, sent.counts_E
    device, experts = rows_N.device, len(counts_E)
    first_E = counts_E.cumsum(0) - counts_E
    shift_E = torch.arange(0, experts * most, most, device=device) - first_E
    visits_N = torch.arange(len(rows_N), device=device)
    place_N = visits_N + shift_E.repeat_interleave(counts_E, output_size=len(rows_N))
    # Places without a visit read some row, and nobody reads them.
    row_X = rows_N.new_zeros(experts * most).scatter_(0, place_N, rows_N)
    x_EMD = sent.x_RD.index_select(0, row_X).unflatten(0, (experts, most))
    # With so few rows, a product is quickest when the matrix is its left side and not transposed.
    gate_EIM, up_EIM = torch.bmm(gate_up_EJD, x_EMD.mT).chunk(2, dim=1)
    y_EMD = torch.bmm(activation(gate_EIM, up_EIM, limit).mT, down_EDI.mT)
    y_ND = y_EMD.flatten(0, 1).index_select(0, place_N)
    return sent.collect(y_ND)


def halves(inner_NJ: Tensor) -> tuple[Tensor, Tensor]:
    """Gate and up, as views."""
    gate_NI, up_NI = inner_NJ.chunk(2, dim=1)
    return gate_NI, up_NI


def activation(
    gate: Float[Tensor, "*B I"], up: Float[Tensor, "*B I"], limit: float | None
) -> Float[Tensor, "*B I"]:
    """silu(gate) * up, after gate <= limit and |up| <= limit where there is one (V4)."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate).mul_(up)


@dataclass(frozen=True, slots=True)
class ActivationGrads:
    """What the backward pass of the activation finds."""

    d_inner_NJ: Tensor
    """Gradients of gate and up, side by side."""
    y_NI: Tensor
    """The activation itself, made again, times each row's weight if there is one."""
    d_weight_N: Tensor | None
    """Gradient of each row's weight."""


def activation_backward(
    inner_NJ: Float[Tensor, "N J"],
    dy_NI: Float[Tensor, "N I"],
    limit: float | None,
    weight_N: Float[Tensor, " N"] | None = None,
) -> ActivationGrads:
    """The gradients of `activation` of the halves of `inner`, times `weight` row by row if given.

    With s = silu(gate): d_up = dy w s, d_gate = dy w up silu'(gate), d_w = <dy, s up>; beyond a
    limit, gate and up have no slope.
    """
    gate_NI, up_NI = halves(inner_NJ)
    clamped, up = gate_NI, up_NI
    if limit is not None:
        clamped, up = gate_NI.clamp(max=limit), up_NI.clamp(-limit, limit)
    silu_NI = F.silu(clamped)
    y_NI = silu_NI * up
    d_weight_N = None
    if weight_N is not None:
        d_weight_N = (dy_NI * y_NI).sum(1)
        dy_NI = dy_NI * weight_N.unsqueeze(1)
        y_NI.mul_(weight_N.unsqueeze(1))
    d_inner_NJ = torch.empty_like(inner_NJ)
    d_gate_NI, d_up_NI = halves(d_inner_NJ)
    torch.mul(dy_NI, silu_NI, out=d_up_NI)
    torch.mul(dy_NI, up, out=d_gate_NI)
    torch.ops.aten.silu_backward.grad_input(d_gate_NI, clamped, grad_input=d_gate_NI)
    if limit is not None:
        d_gate_NI.masked_fill_(gate_NI > limit, 0)
        d_up_NI.masked_fill_(up_NI.abs() > limit, 0)
    return ActivationGrads(d_inner_NJ, y_NI, d_weight_N)


class _SwiGLU(torch.autograd.Function):
    """Gate and up are multiplied as one matrix: narrow products are slow ones."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gate_ID: Tensor, up_ID: Tensor, down_DI: Tensor, limit: float | None
    ) -> Tensor:
        gate_up_JD = torch.cat([gate_ID, up_ID])
        inner_NJ = x @ gate_up_JD.T
        ctx.save_for_backward(x, inner_NJ, gate_ID, up_ID, down_DI)
        ctx.limit, ctx.weights = limit, (gate_ID, up_ID, down_DI)
        return activation(*halves(inner_NJ), limit) @ down_DI.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, inner_NJ, gate_ID, up_ID, down_DI = ctx.saved_tensors
        (dy,) = grads
        found = activation_backward(inner_NJ, dy @ down_DI, ctx.limit)
        dx = found.d_inner_NJ @ torch.cat([gate_ID, up_ID])

        def make() -> list[Tensor]:
            d_gate_up = (found.d_inner_NJ.T @ x).split([len(gate_ID), len(up_ID)])
            return [*d_gate_up, dy.T @ found.y_NI]

        return dx, *gradients(ctx.weights, make), None


class _Grouped(torch.autograd.Function):
    """Experts in groups of neighbours: what passes between products is of one group's visits."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gates_N: Tensor | None,
        gate_up: Tensor,
        down: Tensor,
        rows_N: Tensor,
        counts: list[int],
        limit: float | None,
        learning: bool,
    ) -> Tensor:
        y_RD = torch.zeros_like(widened(x_RD))
        inner_NJ = x_RD.new_empty(len(rows_N) if learning else 0, gate_up.shape[1])
        for group in _groups(counts):
            rows_C = rows_N[group.visits]
            x_CD = x_RD.index_select(0, rows_C)
            if learning:
                inner_CJ = inner_NJ[group.visits]
            else:
                inner_CJ = x_RD.new_empty(len(rows_C), gate_up.shape[1])
            group.each_mm(x_CD, gate_up[group.experts].mT, inner_CJ)
            inner_CI = activation(*halves(inner_CJ), limit)
            if gates_N is not None:
                inner_CI.mul_(gates_N[group.visits, None])
            y_CD = group.each_mm(inner_CI, down[group.experts].mT, x_CD)
            y_RD.index_add_(0, rows_C, widened(y_CD))
        ctx.save_for_backward(x_RD, gates_N, gate_up, down, rows_N, inner_NJ)
        ctx.counts, ctx.limit, ctx.weights = counts, limit, (gate_up, down)
        return y_RD.to(x_RD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gates_N, gate_up, down, rows_N, inner_NJ = ctx.saved_tensors
        dx_RD = torch.zeros_like(widened(x_RD))
        leaving = is_left()
        left: list[_Outer] = []
        d_gates: list[Tensor] = []
        if not leaving:
            d_gate_up, d_down = torch.empty_like(gate_up), torch.empty_like(down)
        for group in _groups(ctx.counts):
            rows_C, inner_CJ = rows_N[group.visits], inner_NJ[group.visits]
            dy_CD, x_CD = grads[0].index_select(0, rows_C), x_RD.index_select(0, rows_C)
            d_inner_CI = dy_CD.new_empty(len(dy_CD), down.shape[2])
            group.each_mm(dy_CD, down[group.experts], d_inner_CI)
            gates_C = None if gates_N is None else gates_N[group.visits]
            found = activation_backward(inner_CJ, d_inner_CI, ctx.limit, gates_C)
            if found.d_weight_N is not None:
                d_gates.append(found.d_weight_N)
            outer = _Outer(group, dy_CD, found.y_NI, found.d_inner_NJ, x_CD)
            if leaving:
                left.append(outer)
                dy_CD = torch.empty_like(dy_CD)
            else:
                outer.into(d_gate_up, d_down)
            dx_CD = group.each_mm(found.d_inner_NJ, gate_up[group.experts], dy_CD)
            dx_RD.index_add_(0, rows_C, widened(dx_CD))
        d_gates_N = torch.cat(d_gates) if d_gates else None

        def make() -> list[Tensor]:
            if not leaving:
                return [d_gate_up, d_down]
            made = [torch.empty_like(gate_up), torch.empty_like(down)]
            for outer in left:
                outer.into(*made)
            return made

        dx_RD = dx_RD.to(x_RD.dtype)
        return dx_RD, d_gates_N, *gradients(ctx.weights, make), None, None, None, None


@dataclass(frozen=True, slots=True)
class _Group:
    """Neighbouring experts and their visits."""

    experts: slice
    visits: slice
    counts: list[int]

    def each_mm(self, left_CA: Tensor, right_EAB: Tensor, out_CB: Tensor) -> Tensor:
        """Each expert's rows times its matrix, into `out`."""
        split = (tensor.split(self.counts) for tensor in (left_CA, out_CB))
        for left, out, right in zip(*split, right_EAB, strict=True):
            torch.mm(left, right, out=out)
        return out_CB

    def each_outer(self, left_CA: Tensor, right_CB: Tensor, out_EAB: Tensor) -> None:
        """Each expert's rows, transposed, times its other rows, into `out`; 0 for no rows."""
        split = (tensor.split(self.counts) for tensor in (left_CA, right_CB))
        for left, right, out in zip(*split, out_EAB, strict=True):
            torch.mm(left.T, right, out=out)


@dataclass(frozen=True, slots=True)
class _Outer:
    """What the gradients of a group's weights are made of."""

    group: _Group
    dy_CD: Tensor
    y_CI: Tensor
    d_inner_CJ: Tensor
    x_CD: Tensor

    def into(self, d_gate_up: Tensor, d_down: Tensor) -> None:
        """Make them, at the group's place among all experts'."""
        self.group.each_outer(self.dy_CD, self.y_CI, d_down[self.group.experts])
        self.group.each_outer(self.d_inner_CJ, self.x_CD, d_gate_up[self.group.experts])


def _groups(counts: list[int]) -> Iterator[_Group]:
    """All experts in order, as few at a time as have GROUP_ROWS visits."""
    first, begin, end = 0, 0, 0
    for expert, count in enumerate(counts):
        end += count
        if end - begin >= GROUP_ROWS or expert == len(counts) - 1:
            experts = slice(first, expert + 1)
            yield _Group(experts, slice(begin, end), counts[experts])
            first, begin = expert + 1, end

"""Rows that are taken by index, and what is added up at an index, in an order that is fixed.

Axes: L rows, N indices, X width; R rows and N visits of a row, D width.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


@dataclass(frozen=True, slots=True)
class ByRow:
    """The visits of each row, from which a row's sum is added up in an order that is fixed.

    Added where they lie (`index_add_`), visits of a row come in any order on a GPU, and a training
    that repeats would not repeat to the last bit.
    """

    rows_N: Tensor
    """int64: the row of each visit."""
    visit_N: Tensor
    """int64: the visits sorted by row, those of one row in their own order."""
    begin_R: Tensor
    """int64: where the visits of each row begin in `visit_N`."""

    @classmethod
    def of(cls, rows_N: Int[Tensor, " N"], rows: int) -> "ByRow":
        """The table of visits to `rows` rows, of which some may have none."""
        visit_N = rows_N.argsort(stable=True)
        every_R = torch.arange(rows, device=rows_N.device)
        return cls(rows_N, visit_N, torch.searchsorted(rows_N[visit_N], every_R))

    def sum(self, y_ND: Float[Tensor, "N D"]) -> Float[Tensor, "R D"]:
        """Each row's sum of its visits, float32 at least inside; 0 for a row without visits."""
        if not (torch.is_grad_enabled() and y_ND.requires_grad):
            return _sum(y_ND, self)
        summed: Tensor = _Sum.apply(y_ND, self)
        return summed


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, by_row: ByRow) -> Tensor:
        ctx.save_for_backward(by_row.rows_N)
        return _sum(y_ND, by_row)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rows_N,) = ctx.saved_tensors
        return grads[0].index_select(0, rows_N), None


def _sum(y_ND: Tensor, by_row: ByRow) -> Tensor:
    return F.embedding_bag(by_row.visit_N, y_ND, by_row.begin_R, mode="sum")


def take_rows(x_LX: Float[Tensor, "L X"], index_N: Int[Tensor, " N"]) -> Float[Tensor, "N X"]:
    """The rows at `index`; slopes of a row that is taken often are added up in a fixed order."""
    if x_LX.device.type == "cpu":
        return x_LX.index_select(0, index_N)
    taken: Tensor = _Take.apply(x_LX, index_N)
    return taken


def add_rows(sum_LX: Tensor, index_N: Int[Tensor, " N"], y_NX: Tensor) -> None:
    """Add `y` to the rows of `sum` at `index`."""
    if sum_LX.device.type == "cpu":
        sum_LX.index_add_(0, index_N, y_NX.to(sum_LX.dtype))
    else:
        sum_LX += ByRow.of(index_N, len(sum_LX)).sum(y_NX.to(sum_LX.dtype))


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_LX: Tensor, index_N: Tensor) -> Tensor:
        ctx.save_for_backward(index_N)
        ctx.rows = len(x_LX)
        return x_LX.index_select(0, index_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (index_N,) = ctx.saved_tensors
        return _sum(grads[0], ByRow.of(index_N, ctx.rows)), None


def inverse(order_N: Int[Tensor, " N"]) -> Int[Tensor, " N"]:
    """The place of each number in a permutation."""
    every_N = torch.arange(len(order_N), device=order_N.device)
    return torch.empty_like(order_N).scatter_(0, order_N, every_N)

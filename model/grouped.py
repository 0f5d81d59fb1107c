"""Routed experts on devices: one product for all of a layer's experts, whatever their number.

Rows are cut into experts by offsets that stay on the device, so that the host neither waits for the
counts nor launches a product for each expert. CPUs have `model.experts_cpu`. `model.swiglu` has the
same computed expert by expert, the twin of both.

| device | product |
|---|---|
| NPU | `npu_grouped_matmul`, which torch_npu brings along; it has no derivative of its own |
| others | `torch.nn.functional.grouped_mm` |

Axes: R rows, N visits of a row to an expert, sorted by expert, D width, I inner width, J = 2 I gate
and up side by side, E experts, A inputs and B outputs of a product.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.dispatch import Dispatched
from model.experts_cpu import serves, swiglu_on_cpu
from model.rows import ByRow
from model.swiglu import activation, activation_backward, grouped_swiglu, halves
from model.weight_gradients import gradients

_STRIDE_BYTES = 16
"""Of what the device's kernels read, every row begins at a multiple of so many bytes."""


def experts_swiglu(
    sent: Dispatched,
    gate_up_EJD: Float[Tensor, "E J D"],
    down_EDI: Float[Tensor, "E D I"],
    limit: float | None,
) -> Float[Tensor, "R D"]:
    """Each row's sum of its visits' SwiGLU, by gate, in the way that suits the device."""
    if serves(sent, gate_up_EJD, down_EDI):
        return swiglu_on_cpu(sent, gate_up_EJD, down_EDI, limit)
    if sent.x_RD.device.type == "cpu" or not _fits(gate_up_EJD, down_EDI):
        return grouped_swiglu(sent, gate_up_EJD, down_EDI, limit)
    return swiglu_by_offsets(sent, gate_up_EJD, down_EDI, limit)


def swiglu_by_offsets(
    sent: Dispatched,
    gate_up_EJD: Float[Tensor, "E J D"],
    down_EDI: Float[Tensor, "E D I"],
    limit: float | None,
) -> Float[Tensor, "R D"]:
    """As `model.swiglu.grouped_swiglu`, in float32, bfloat16 or float16."""
    ends_E = sent.counts_E.cumsum(0).to(torch.int32)
    learning = torch.is_grad_enabled()
    result: Tensor = _ByOffsets.apply(
        sent.x_RD, sent.gates_N, gate_up_EJD, down_EDI, ends_E, sent.by_row(), limit, learning
    )
    return result


def _fits(gate_up_EJD: Tensor, down_EDI: Tensor) -> bool:
    """Whether rows of every operand lie as kernels want them."""
    widths = gate_up_EJD.shape[2], down_EDI.shape[2]
    return all(width * gate_up_EJD.element_size() % _STRIDE_BYTES == 0 for width in widths)


class _ByOffsets(torch.autograd.Function):
    """Keeps what `model.swiglu` keeps: the rows, and gate and up of each visit."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gates_N: Tensor | None,
        gate_up_EJD: Tensor,
        down_EDI: Tensor,
        ends_E: Tensor,
        by_row: ByRow,
        limit: float | None,
        learning: bool,
    ) -> Tensor:
        x_ND = x_RD.index_select(0, by_row.rows_N)
        inner_NJ = each_mm(x_ND, gate_up_EJD.mT, ends_E)
        inner_NI = activation(*halves(inner_NJ), limit)
        if gates_N is not None:
            inner_NI.mul_(gates_N.unsqueeze(1))
        y_ND = each_mm(inner_NI, down_EDI.mT, ends_E)
        if learning:
            ctx.save_for_backward(x_RD, gates_N, gate_up_EJD, down_EDI, ends_E, inner_NJ)
            ctx.by_row, ctx.limit, ctx.weights = by_row, limit, (gate_up_EJD, down_EDI)
        return by_row.sum(y_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_RD, gates_N, gate_up_EJD, down_EDI, ends_E, inner_NJ = ctx.saved_tensors
        by_row: ByRow = ctx.by_row
        dy_ND = grads[0].index_select(0, by_row.rows_N)
        d_inner_NI = each_mm(dy_ND, down_EDI, ends_E)
        found = activation_backward(inner_NJ, d_inner_NI, ctx.limit, gates_N)
        dx_RD = by_row.sum(each_mm(found.d_inner_NJ, gate_up_EJD, ends_E))

        def make() -> list[Tensor]:
            x_ND = x_RD.index_select(0, by_row.rows_N)
            return [
                each_outer(found.d_inner_NJ, x_ND, ends_E),
                each_outer(dy_ND, found.y_NI, ends_E),
            ]

        made = gradients(ctx.weights, make)
        return dx_RD, found.d_weight_N, *made, None, None, None, None


def each_mm(
    x_NA: Float[Tensor, "N A"], w_EAB: Float[Tensor, "E A B"], ends_E: Int[Tensor, " E"]
) -> Float[Tensor, "N B"]:
    """Each expert's rows times its matrix; `ends` says where its rows end."""
    if _is_npu(x_NA):
        (y_NB,) = torch.ops.npu.npu_grouped_matmul(
            [x_NA], [w_EAB], group_list=ends_E.long(), split_item=2, group_type=0
        )
        assert isinstance(y_NB, Tensor)
        return y_NB
    return F.grouped_mm(x_NA, w_EAB, offs=ends_E)


def each_outer(
    x_NA: Float[Tensor, "N A"], y_NB: Float[Tensor, "N B"], ends_E: Int[Tensor, " E"]
) -> Float[Tensor, "E A B"]:
    """Each expert's rows, transposed, times its other rows; 0 for an expert without rows."""
    if _is_npu(x_NA):
        (w_EAB,) = torch.ops.npu.npu_grouped_matmul(
            [x_NA.T], [y_NB], group_list=ends_E.long(), split_item=3, group_type=2
        )
        assert isinstance(w_EAB, Tensor)
        return w_EAB
    return F.grouped_mm(x_NA.T, y_NB, offs=ends_E)


def _is_npu(x: Tensor) -> bool:
    return x.device.type == "npu" and hasattr(torch.ops.npu, "npu_grouped_matmul")

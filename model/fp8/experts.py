"""SwiGLU in FP8, for experts or for one dense block, with its backward pass written out.

An expert computes y = down(silu(gate(x)) * up(x)), three Linears. With `inner` for the outputs of
gate and up side by side and a = silu(gate) * up, times the visit's weight if it has one:

    forward     inner = x W_gu^T             y = a W_d^T
    backward    da = dy W_d                  dW_d = dy^T a
                d_inner = da * slopes        (model.swiglu.activation_backward)
                dx = d_inner W_gu            dW_gu = d_inner^T x

All operands of these products are FP8. Saved for the backward pass are x and `inner`, a byte a
value, and the weights; the activation is computed again from `inner` (DeepSeek-V3, section 3.3.3).

Gate and up are one product where no block of 128 x 128 would straddle the two, else two products: a
scale that they shared would be that of the larger.

Rows are quantised once, however many experts they visit; what is gathered are bytes and scales.

Axes: R rows, N visits of a row to an expert, sorted by expert, D width, I inner width, J = 2 I gate
and up side by side, E experts. A dense block has matrices without E.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.dispatch import Dispatched
from model.fp8.format import TILE
from model.fp8.groups import Groups
from model.fp8.products import dgrad, fprop, wgrad
from model.fp8.quantized import Quantized, from_tensors, to_tensors
from model.fp8.scheme import Fp8
from model.rows import ByRow
from model.swiglu import activation, activation_backward, halves
from model.weight_gradients import gradients


def fp8_grouped_swiglu(
    sent: Dispatched,
    gate_up_EJD: Float[Tensor, "E J D"],
    down_EDI: Float[Tensor, "E D I"],
    limit: float | None,
    scheme: Fp8,
) -> Float[Tensor, "R D"]:
    """For each row, the sum over its visits of gate * y, in the dtype of the rows.

    `limit` is that of `model.swiglu.activation`. A row without visits gives zeros. On a device
    nothing waits for the counts of visits.
    """
    groups = Groups.counted(sent.counts_E, len(sent.rows_N))
    call = _Call(scheme, groups, sent.by_row(), limit, torch.is_grad_enabled(), sent.x8_RD)
    result: Tensor = _Fp8Experts.apply(sent.x_RD, sent.gates_N, call, gate_up_EJD, down_EDI)
    return result


def fp8_swiglu(
    x: Float[Tensor, "*B D"],
    gate_ID: Float[Tensor, "I D"],
    up_ID: Float[Tensor, "I D"],
    down_DI: Float[Tensor, "D I"],
    limit: float | None,
    scheme: Fp8,
) -> Float[Tensor, "*B D"]:
    """y for each last-dim vector: one expert that every row visits, in the dtype of `x`."""
    flat_RD = x.reshape(-1, x.shape[-1])
    call = _Call(scheme, None, None, limit, torch.is_grad_enabled())
    result: Tensor = _Fp8Experts.apply(flat_RD, None, call, gate_ID, up_ID, down_DI)
    return result.view(x.shape)


@dataclass(frozen=True, slots=True)
class _Call:
    """What `_Fp8Experts` is given besides what has a gradient."""

    scheme: Fp8
    groups: Groups | None
    """Visits of each expert; none of a dense block."""
    by_row: ByRow | None
    """The visits of each row; none where visit n is row n."""
    limit: float | None
    learning: bool
    """Whether a backward pass may follow."""
    x8_RD: Quantized | None = None
    """The rows, if they are quantised already."""

    def visited(self, x_RD: Tensor) -> Tensor:
        """The row of each visit."""
        return x_RD if self.by_row is None else x_RD.index_select(0, self.by_row.rows_N)

    def visited8(self, x8_RD: Quantized) -> Quantized:
        """The same of a quantised tensor."""
        return x8_RD if self.by_row is None else x8_RD.rows(self.by_row.rows_N)

    def summed(self, y_ND: Tensor) -> Tensor:
        """The sum of each row's visits."""
        return y_ND if self.by_row is None else self.by_row.sum(y_ND)


class _Fp8Experts(torch.autograd.Function):
    """Weights are (gate and up, down) with a matrix for each expert, or (gate, up, down).

    They come as they are: by them the quantised weights are found again. Without `gates_N`, all
    visits weigh 1.
    """

    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, gates_N: Tensor | None, call: _Call, *weights: Tensor
    ) -> Tensor:
        scheme, groups = call.scheme, call.groups
        backend = scheme.backend(x_RD.device)
        x8_RD = scheme.activations(x_RD) if call.x8_RD is None else call.x8_RD
        *gate_up, down = weights
        gate_up8 = _gate_up_weights(scheme, gate_up, call.learning)
        down8 = scheme.weights(down, learning=call.learning)
        x8_ND = call.visited8(x8_RD)
        inner_NJ = _joined([fprop(backend, x8_ND, w8, groups) for w8 in gate_up8], 1)
        a_NI = activation(*halves(inner_NJ), call.limit)
        if gates_N is not None:
            a_NI.mul_(gates_N.unsqueeze(1))
        y_ND = fprop(backend, scheme.activations(a_NI), down8, groups).to(x_RD.dtype)
        if call.learning:
            # A view in which gate and up are rows of their own: no tile straddles the two.
            inner_XI = inner_NJ.view(-1, a_NI.shape[1])
            inner8_XI = backend.quantize(inner_XI, x8_RD.tile, multiplied=False)
            tensors, ctx.layouts = to_tensors([x8_RD, inner8_XI, down8, *gate_up8])
            ctx.save_for_backward(gates_N, *tensors)
            ctx.call, ctx.weights = call, weights
        return call.summed(y_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        scheme, groups = call.scheme, call.groups
        (dy_RD,) = grads
        backend = scheme.backend(dy_RD.device)
        gates_N, *tensors = ctx.saved_tensors
        x8_RD, inner8_XI, down8, *gate_up8 = from_tensors(tensors, ctx.layouts)
        dy8_ND = call.visited8(scheme.gradients(dy_RD))
        da_NI = dgrad(backend, dy8_ND, down8, groups)
        inner_NJ = backend.dequantize(inner8_XI).view(len(da_NI), 2 * da_NI.shape[1])
        found = activation_backward(inner_NJ.to(da_NI.dtype), da_NI, call.limit, gates_N)
        dx_ND = _input_gradient(call, found.d_inner_NJ, gate_up8)
        dx_RD = call.summed(dx_ND.to(dy_RD.dtype))

        def make() -> list[Tensor]:
            d_down = _weight_gradient(call, call.visited(dy_RD), found.y_NI)
            d_gate_up = _gate_up_gradient(
                call, found.d_inner_NJ, call.visited8(x8_RD), len(gate_up8)
            )
            # The rows of a dense block's gate, then of its up.
            return [*d_gate_up.chunk(len(ctx.weights) - 1), d_down]

        return dx_RD, found.d_weight_N, None, *gradients(ctx.weights, make)


def _gate_up_weights(scheme: Fp8, gate_up: Sequence[Tensor], learning: bool) -> list[Quantized]:
    """Gate and up as one operand [.., J, D] if no block straddles them, else as two [.., I, D]."""
    inner = sum(w.shape[-2] for w in gate_up) // 2
    if inner % TILE == 0:
        return [scheme.weights(*gate_up, learning=learning)]
    if len(gate_up) == 2:
        return [scheme.weights(w, learning=learning) for w in gate_up]
    return [scheme.weights(*gate_up, half=half, learning=learning) for half in (0, 1)]


def _weight_gradient(call: _Call, dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    """dW = dy^T x: float32 [.., O, I]."""
    x_tokens_NI = call.scheme.activations_along_tokens(x_NI, call.groups)
    dy_tokens_NO = call.scheme.gradients_along_tokens(dy_NO, call.groups)
    return wgrad(call.scheme.backend(dy_NO.device), dy_tokens_NO, x_tokens_NI, call.groups)


def _input_gradient(call: _Call, d_inner_NJ: Tensor, gate_up8: Sequence[Quantized]) -> Tensor:
    """dx [N, D] of inner = x W^T, for W as one operand or as two."""
    scheme, groups = call.scheme, call.groups
    backend = scheme.backend(d_inner_NJ.device)
    dx_ND = None
    for w8, columns in zip(gate_up8, d_inner_NJ.chunk(len(gate_up8), 1), strict=True):
        part_ND = dgrad(backend, scheme.gradients(columns.contiguous(), groups), w8, groups)
        dx_ND = part_ND if dx_ND is None else dx_ND.add_(part_ND)
    assert dx_ND is not None
    return dx_ND


def _gate_up_gradient(call: _Call, d_inner_NJ: Tensor, x8_ND: Quantized, operands: int) -> Tensor:
    """dW [.., J, D] of the same, for W as so many operands."""
    scheme, groups = call.scheme, call.groups
    backend = scheme.backend(d_inner_NJ.device)
    x_tokens_ND = scheme.activations_along_tokens(x8_ND, groups)
    parts = [
        wgrad(
            backend,
            scheme.gradients_along_tokens(columns.contiguous(), groups),
            x_tokens_ND,
            groups,
        )
        for columns in d_inner_NJ.chunk(operands, 1)
    ]
    return _joined(parts, -2)


def _joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Gate's part and up's side by side, if they are two."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)

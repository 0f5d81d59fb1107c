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
and up side by side, E experts.
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
from model.fp8.products import dgrad, fprop, wgrad
from model.fp8.quantized import Quantized, from_tensors, to_tensors
from model.fp8.scheme import Fp8
from model.swiglu import activation, activation_backward, halves
from model.widening import widened


def fp8_grouped_swiglu(
    sent: Dispatched,
    gate_up_EJD: Float[Tensor, "E J D"],
    down_EDI: Float[Tensor, "E D I"],
    limit: float | None,
    scheme: Fp8,
) -> Float[Tensor, "R D"]:
    """For each row, the sum over its visits of gate * y, in the dtype of the rows.

    `limit` is that of `model.swiglu.activation`. A row without visits gives zeros.
    """
    call = _Call(scheme, tuple(sent.counts_E.tolist()), limit, torch.is_grad_enabled())
    result: Tensor = _Fp8Experts.apply(
        sent.x_RD, sent.gates_N, gate_up_EJD, down_EDI, sent.rows_N, call
    )
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
    gate_up_EJD = torch.cat([gate_ID, up_ID]).unsqueeze(0)
    call = _Call(scheme, (len(flat_RD),), limit, torch.is_grad_enabled())
    result: Tensor = _Fp8Experts.apply(flat_RD, None, gate_up_EJD, down_DI.unsqueeze(0), None, call)
    return result.view(x.shape)


@dataclass(frozen=True, slots=True)
class _Call:
    """What `_Fp8Experts` is given besides tensors."""

    scheme: Fp8
    counts: tuple[int, ...]
    """Visits of each expert; they sum to N."""
    limit: float | None
    learning: bool
    """Whether a backward pass may follow."""


class _Fp8Experts(torch.autograd.Function):
    """Without `rows_N`, visit n is row n; without `gates_N`, all visits weigh 1."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gates_N: Tensor | None,
        gate_up_EJD: Tensor,
        down_EDI: Tensor,
        rows_N: Tensor | None,
        call: _Call,
    ) -> Tensor:
        scheme, counts = call.scheme, call.counts
        backend = scheme.backend(x_RD.device)
        x8_RD = scheme.activations(x_RD)
        gate_up8 = _gate_up_weights(scheme, gate_up_EJD)
        down8_EDI = scheme.weights(down_EDI)
        x8_ND = _visits(x8_RD, rows_N)
        inner_NJ = _joined([fprop(backend, x8_ND, w8_EJD, counts) for w8_EJD in gate_up8])
        a_NI = activation(*halves(inner_NJ), call.limit)
        if gates_N is not None:
            a_NI.mul_(gates_N.unsqueeze(1))
        y_ND = fprop(backend, scheme.activations(a_NI), down8_EDI, counts).to(x_RD.dtype)
        if call.learning:
            # A view in which gate and up are rows of their own: no tile straddles the two.
            inner_XI = inner_NJ.view(-1, a_NI.shape[1])
            inner8_XI = backend.quantize(inner_XI, x8_RD.tile, multiplied=False)
            tensors, ctx.layouts = to_tensors([x8_RD, inner8_XI, down8_EDI, *gate_up8])
            ctx.save_for_backward(gates_N, rows_N, *tensors)
            ctx.call = call
        return _summed(y_ND, rows_N, x_RD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        scheme, counts = call.scheme, call.counts
        (dy_RD,) = grads
        backend = scheme.backend(dy_RD.device)
        gates_N, rows_N, *tensors = ctx.saved_tensors
        x8_RD, inner8_XI, down8_EDI, *gate_up8 = from_tensors(tensors, ctx.layouts)
        dy8_ND = _visits(scheme.gradients(dy_RD), rows_N)
        da_NI = dgrad(backend, dy8_ND, down8_EDI, counts)
        inner_NJ = backend.dequantize(inner8_XI).view(len(da_NI), 2 * da_NI.shape[1])
        found = activation_backward(inner_NJ.to(da_NI.dtype), da_NI, call.limit, gates_N)
        dy_ND = dy_RD if rows_N is None else dy_RD.index_select(0, rows_N)
        d_down_EDI = _weight_gradient(call, dy_ND, found.y_NI)
        dx_ND, d_gate_up_EJD = _gate_up_gradients(
            call, found.d_inner_NJ, _visits(x8_RD, rows_N), gate_up8
        )
        dx_RD = _summed(dx_ND.to(dy_RD.dtype), rows_N, dy_RD)
        return dx_RD, found.d_weight_N, d_gate_up_EJD, d_down_EDI, None, None


def _gate_up_weights(scheme: Fp8, gate_up_EJD: Tensor) -> list[Quantized]:
    """Gate and up as one operand [E, J, D] if no block straddles them, else as two [E, I, D]."""
    if gate_up_EJD.shape[1] % (2 * TILE) == 0:
        return [scheme.weights(gate_up_EJD)]
    return [scheme.weights(half.contiguous()) for half in gate_up_EJD.chunk(2, dim=1)]


def _weight_gradient(call: _Call, dy_NO: Tensor, x_NI: Tensor) -> Tensor:
    """dW = dy^T x: float32 [E, O, I]."""
    x_tokens_NI = call.scheme.activations_along_tokens(x_NI, call.counts)
    dy_tokens_NO = call.scheme.gradients_along_tokens(dy_NO, call.counts)
    return wgrad(call.scheme.backend(dy_NO.device), dy_tokens_NO, x_tokens_NI, call.counts)


def _gate_up_gradients(
    call: _Call, d_inner_NJ: Tensor, x8_ND: Quantized, gate_up8: Sequence[Quantized]
) -> tuple[Tensor, Tensor]:
    """(dx [N, D], dW [E, J, D]) of inner = x W^T, for W as one operand or as two."""
    scheme, counts = call.scheme, call.counts
    backend = scheme.backend(d_inner_NJ.device)
    x_tokens_ND = scheme.activations_along_tokens(x8_ND, counts)
    dx_ND, dw = None, list[Tensor]()
    for w8, columns in zip(gate_up8, d_inner_NJ.chunk(len(gate_up8), 1), strict=True):
        d_part = columns.contiguous()
        part_ND = dgrad(backend, scheme.gradients(d_part, counts), w8, counts)
        dx_ND = part_ND if dx_ND is None else dx_ND.add_(part_ND)
        d_tokens = scheme.gradients_along_tokens(d_part, counts)
        dw.append(wgrad(backend, d_tokens, x_tokens_ND, counts))
    assert dx_ND is not None
    return dx_ND, _joined(dw)


def _visits(x8_RD: Quantized, rows_N: Tensor | None) -> Quantized:
    """The row of each visit."""
    return x8_RD if rows_N is None else x8_RD.rows(rows_N)


def _summed(y_ND: Tensor, rows_N: Tensor | None, like_RD: Tensor) -> Tensor:
    """The sum of each row's visits, as a tensor [R, D] like `like_RD`."""
    if rows_N is None:
        return y_ND
    sums_RD = torch.zeros_like(widened(like_RD)).index_add_(0, rows_N, widened(y_ND))
    return sums_RD.to(like_RD.dtype)


def _joined(parts: Sequence[Tensor]) -> Tensor:
    """Gate's part and up's side by side in dim 1, if they are two."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim=1)

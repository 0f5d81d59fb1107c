"""SwiGLU in FP8, dense or expert by expert, with derivatives of its own.

down(silu(gate(x)) * up(x)): three products forward and five backward (gate and up are one where
they can be), all of E4M3 operands. Saved for the backward pass are the input and what comes out
of gate and up, a byte a value; the activation between the products is computed again from those
(DeepSeek-V3, section 3.3.3).

Axes: R rows, N visits of a row to an expert, D width, I inner width, J = 2 I gate and up side by
side, E experts.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.dispatch import Dispatched
from model.fp8.format import TILE
from model.fp8.quantized import Quantized
from model.fp8.scheme import Fp8
from model.swiglu import activation, activation_backward, halves


def fp8_grouped_swiglu(
    sent: Dispatched,
    gate_up_EJD: Float[Tensor, "E J D"],
    down_EDI: Float[Tensor, "E D I"],
    limit: float | None,
    scheme: Fp8,
) -> Float[Tensor, "R D"]:
    """Each row's sum of its visits' results, by gate; see `model.swiglu.grouped_swiglu`."""
    result: Tensor = _Fp8Experts.apply(
        sent.x_RD,
        sent.gates_N,
        gate_up_EJD,
        down_EDI,
        sent.rows_N,
        tuple(sent.counts_E.tolist()),
        limit,
        scheme,
        torch.is_grad_enabled(),
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
    """The same for one expert that every row visits."""
    flat_RD = x.reshape(-1, x.shape[-1])
    result: Tensor = _Fp8Experts.apply(
        flat_RD,
        None,
        torch.cat([gate_ID, up_ID]).unsqueeze(0),
        down_DI.unsqueeze(0),
        None,
        (len(flat_RD),),
        limit,
        scheme,
        torch.is_grad_enabled(),
    )
    return result.view(x.shape)


class _Fp8Experts(torch.autograd.Function):
    """Rows are quantised once, however many experts they visit."""

    @staticmethod
    def forward(
        ctx: Any,
        x_RD: Tensor,
        gates_N: Tensor | None,
        gate_up_EJD: Tensor,
        down_EDI: Tensor,
        rows_N: Tensor | None,
        counts: tuple[int, ...],
        limit: float | None,
        scheme: Fp8,
        learning: bool,
    ) -> Tensor:
        backend = scheme.backend(x_RD.device)
        x8_RD = scheme.activations(x_RD)
        gate_up8 = _halves(scheme, gate_up_EJD)
        down8_EDI = scheme.weights(down_EDI)
        x8_ND = x8_RD if rows_N is None else x8_RD.rows(rows_N)
        inner_NJ = _joined([backend.grouped_matmul(x8_ND, w.T, counts) for w in gate_up8])
        inner_NI = activation(*halves(inner_NJ), limit)
        if gates_N is not None:
            inner_NI.mul_(gates_N.unsqueeze(1))
        inner8_NI = scheme.activations(inner_NI)
        y_ND = backend.grouped_matmul(inner8_NI, down8_EDI.T, counts).to(x_RD.dtype)
        if learning:
            # A view by halves: none of the tiles that are saved straddles gate and up.
            apart = inner_NJ.view(-1, inner_NI.shape[1])
            inner8 = backend.quantize(apart, x8_RD.tile, multiplied=False)
            saved = [x8_RD, inner8, down8_EDI, *gate_up8]
            ctx.save_for_backward(
                gates_N, rows_N, *(t for q in saved for t in (q.values, q.scales))
            )
            ctx.tiles = [q.tile for q in saved]
            ctx.counts, ctx.limit, ctx.scheme = counts, limit, scheme
        if rows_N is None:
            return y_ND
        return torch.zeros_like(x_RD).index_add_(0, rows_N, y_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scheme: Fp8 = ctx.scheme
        counts: tuple[int, ...] = ctx.counts
        gates_N, rows_N, *saved = ctx.saved_tensors
        backend = scheme.backend(saved[0].device)
        parts = zip(saved[::2], saved[1::2], ctx.tiles, strict=True)
        x8_RD, inner8, down8_EDI, *gate_up8 = (Quantized(*one) for one in parts)
        dy8_RD = scheme.gradients(grads[0])
        dy_ND, dy8_ND, x8_ND = grads[0], dy8_RD, x8_RD
        if rows_N is not None:
            dy_ND, dy8_ND, x8_ND = (
                dy_ND.index_select(0, rows_N),
                dy8_RD.rows(rows_N),
                x8_RD.rows(rows_N),
            )
        d_inner_NI = backend.grouped_matmul(dy8_ND, down8_EDI, counts)
        inner_NJ = backend.dequantize(inner8).view(len(d_inner_NI), 2 * d_inner_NI.shape[1])
        inner_NJ = inner_NJ.to(d_inner_NI.dtype)
        found = activation_backward(inner_NJ, d_inner_NI, ctx.limit, gates_N)
        inner_tokens_NI = scheme.activations_along_tokens(found.y_NI, counts)
        dy_tokens_ND = scheme.gradients_along_tokens(dy_ND, counts)
        d_down_EDI = backend.grouped_outer(dy_tokens_ND, inner_tokens_NI, counts)
        x_tokens_ND = scheme.activations_along_tokens(x8_ND, counts)
        dx_ND, d_gate_up = None, []
        for w8, part in zip(gate_up8, found.d_inner_NJ.chunk(len(gate_up8), 1), strict=True):
            slope = part.contiguous()
            partial = backend.grouped_matmul(scheme.gradients(slope, counts), w8, counts)
            dx_ND = partial if dx_ND is None else dx_ND.add_(partial)
            slope_tokens = scheme.gradients_along_tokens(slope, counts)
            d_gate_up.append(backend.grouped_outer(slope_tokens, x_tokens_ND, counts))
        assert dx_ND is not None
        dx_RD = dx_ND = dx_ND.to(grads[0].dtype)
        if rows_N is not None:
            dx_RD = torch.zeros_like(grads[0]).index_add_(0, rows_N, dx_ND)
        d_gate_up_EJD = _joined(d_gate_up)
        return dx_RD, found.d_weight_N, d_gate_up_EJD, d_down_EDI, *[None] * 5


def _halves(scheme: Fp8, gate_up_EJD: Tensor) -> list[Quantized]:
    """Gate and up as one operand where no block straddles them, else one by one."""
    if gate_up_EJD.shape[1] % (2 * TILE) == 0:
        return [scheme.weights(gate_up_EJD)]
    return [scheme.weights(half.contiguous()) for half in gate_up_EJD.chunk(2, dim=1)]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

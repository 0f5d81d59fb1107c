"""The Linear seam: one weight, and the scheme of its three products.

In FP8, forward, input gradient and weight gradient all contract E4M3 operands with float32
accumulation (DeepSeek-V3, section 3.3): activations and output gradients in 1 x 128 tiles for the
first two; for the weight gradient the saved activations are dequantised and quantised again along
the tokens, 128 x 1. A byte a value is saved for the backward pass, 12 bits after attention.
Several Linears that read the same activations share one quantisation of them.

Axes: T tokens, I inputs, O outputs.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.fp8.quantized import Quantized
from model.fp8.scheme import Fp8


class Linear(nn.Module):
    """y = x W^T without bias, in FP8 where there is a scheme, else in the tensors' own type."""

    def __init__(self, inputs: int, outputs: int, scheme: Fp8 | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.scheme = scheme

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """The product in this Linear's scheme."""
        return together(x, self)[0]


def together(x: Float[Tensor, "*B I"], *linears: Linear) -> tuple[Tensor, ...]:
    """Each Linear's output for the same `x`, which is quantised once."""
    scheme = linears[0].scheme
    assert all(linear.scheme == scheme for linear in linears), "one quantisation serves one scheme"
    if scheme is None:
        return tuple(F.linear(x, linear.weight) for linear in linears)
    outputs = fp8_linears(x, scheme, *(linear.weight for linear in linears))
    return tuple(outputs)


def fp8_linears(x: Float[Tensor, "*B I"], scheme: Fp8, *weights: Tensor) -> tuple[Tensor, ...]:
    """x W^T for each weight [O, I], by `scheme`."""
    flat_TI = x.reshape(-1, x.shape[-1])
    outputs = _Fp8Linears.apply(flat_TI, scheme, torch.is_grad_enabled(), *weights)
    return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[-1]) for y_TO in outputs)


class _Fp8Linears(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, scheme: Fp8, learning: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        backend = scheme.backend(x_TI.device)
        x8_TI = scheme.activations(x_TI)
        weights8 = [scheme.weights(w_OI) for w_OI in weights]
        ctx.scheme, ctx.columns = scheme, x_TI.shape[1]
        if learning:
            saved = scheme.input_to_save(x_TI, x8_TI)
            ctx.save_for_backward(*saved, *(t for w in weights8 for t in (w.values, w.scales)))
            ctx.tiles = x8_TI.tile, weights8[0].tile
        return tuple(backend.matmul(x8_TI, w8_OI.T).to(x_TI.dtype) for w8_OI in weights8)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scheme: Fp8 = ctx.scheme
        values, scales, *weights = ctx.saved_tensors
        backend = scheme.backend(values.device)
        x_tile, w_tile = ctx.tiles
        saved_TI = scheme.saved_input(values, scales, x_tile, ctx.columns)
        x_tokens_TI = scheme.activations_along_tokens(saved_TI)
        dx_TI = None
        dw: list[Tensor | None] = []
        learns = ctx.needs_input_grad[3:]
        for dy_TO, w_values, w_scales, wanted in zip(
            grads, weights[::2], weights[1::2], learns, strict=True
        ):
            if ctx.needs_input_grad[0]:
                w8_OI = Quantized(w_values, w_scales, w_tile)
                part_TI = backend.matmul(scheme.gradients(dy_TO), w8_OI).to(dy_TO.dtype)
                dx_TI = part_TI if dx_TI is None else dx_TI.add_(part_TI)
            dw_OI = None
            if wanted:
                dw_OI = backend.matmul(scheme.gradients_along_tokens(dy_TO).T, x_tokens_TI)
            dw.append(dw_OI)
        return dx_TI, None, None, *dw

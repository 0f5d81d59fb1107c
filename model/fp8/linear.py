"""The Linear seam: one weight, and the precision its three GEMMs run in.

Forward, input gradient and weight gradient all contract E4M3 operands with float32 accumulation
(DeepSeek-V3, section 3.3): activations and output gradients in 1 x 128 tiles for the first two;
for the weight gradient the cached activation tiles are dequantised and quantised again along the
tokens, 128 x 1. Several Linears that read the same activations share one quantisation of them.

Axes: T tokens, I inputs, O outputs.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from configs.train import Precision
from model.fp8.format import TILE, round_trip

ACTIVATION = (1, TILE)
ALONG_TOKENS = (TILE, 1)
BLOCK = (TILE, TILE)


class Linear(nn.Module):
    """y = x W^T without bias. `precision` is the seam: the mathematics above does not see it."""

    def __init__(self, inputs: int, outputs: int, *, precision: Precision = "high") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.precision = precision

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """The product in this Linear's precision."""
        return together(x, self)[0]


def together(x: Float[Tensor, "*B I"], *linears: Linear) -> tuple[Tensor, ...]:
    """Each Linear's output for the same `x`, which is quantised once."""
    if linears[0].precision == "high":
        return tuple(F.linear(x, linear.weight) for linear in linears)
    flat_TI = x.reshape(-1, x.shape[-1])
    outputs = _Fp8Linears.apply(flat_TI, *(linear.weight for linear in linears))
    return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[-1]) for y_TO in outputs)


class _Fp8Linears(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        x8_TI = round_trip(x_TI, ACTIVATION)
        weights8 = [round_trip(w_OI, BLOCK) for w_OI in weights]
        ctx.save_for_backward(x8_TI, *weights8)
        return tuple(x8_TI @ w8_OI.T for w8_OI in weights8)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x8_TI, *weights8 = ctx.saved_tensors
        x8_tokens_TI = round_trip(x8_TI, ALONG_TOKENS)
        dx_TI = None
        dw = []
        for dy_TO, w8_OI in zip(grads, weights8, strict=True):
            part_TI = round_trip(dy_TO, ACTIVATION) @ w8_OI
            dx_TI = part_TI if dx_TI is None else dx_TI.add_(part_TI)
            dw.append(round_trip(dy_TO, ALONG_TOKENS).T @ x8_tokens_TI)
        return dx_TI, *dw

"""A Linear in FP8, or in the type of its inputs where its part of the model is not FP8.

Forward, x and W are quantised and multiplied. x is saved as it was quantised, a byte a value, or in
12 bits after attention; the float32 activations themselves are not. Backward, dy is quantised once
along its channels for dx and once along its tokens for dW; the saved x is dequantised and quantised
again along its tokens (`model/fp8/products.py` says why). Gradients of weights are float32.

Several Linears that read the same activations, as the projections to queries and keys do, share one
quantisation of them.

Axes: T tokens, I inputs, O outputs.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from model.fp8.products import dgrad, fprop, wgrad
from model.fp8.quantized import from_tensors, to_tensors
from model.fp8.scheme import Fp8
from model.weight_cache import cast
from model.weight_gradients import gradients, is_left


class Linear(nn.Module):
    """y = x W^T without bias, in FP8 where there is a scheme, else in the type of `x`."""

    def __init__(self, inputs: int, outputs: int, scheme: Fp8 | None = None) -> None:
        """A weight [outputs, inputs] that is not yet initialised."""
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.scheme = scheme

    def forward(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """x W^T for each last-dim vector, in the dtype of `x`."""
        return together(x, self)[0]

    def multiply(self, x: Float[Tensor, "*B I"]) -> Float[Tensor, "*B O"]:
        """x W^T where there is no scheme."""
        multiply = _parted if is_left() and torch.is_grad_enabled() else F.linear
        return multiply(x, cast(self.weight, x.dtype))


def together(x: Float[Tensor, "*B I"], *linears: Linear) -> tuple[Tensor, ...]:
    """Each Linear's output [*B, O] for the same `x`, which is quantised once."""
    scheme = linears[0].scheme
    assert all(linear.scheme == scheme for linear in linears), "one quantisation serves one scheme"
    if scheme is None:
        return tuple(linear.multiply(x) for linear in linears)
    outputs = fp8_linears(x, scheme, *(linear.weight for linear in linears))
    return tuple(outputs)


def fp8_linears(x: Float[Tensor, "*B I"], scheme: Fp8, *weights: Tensor) -> tuple[Tensor, ...]:
    """x W^T [*B, O] for each weight [O, I], by `scheme`, in the dtype of `x`."""
    flat_TI = x.reshape(-1, x.shape[-1])
    outputs = _Fp8Linears.apply(flat_TI, scheme, torch.is_grad_enabled(), *weights)
    return tuple(y_TO.view(*x.shape[:-1], y_TO.shape[-1]) for y_TO in outputs)


class _Fp8Linears(torch.autograd.Function):
    """Products of one x with several W; `learning` says whether a backward pass may follow."""

    @staticmethod
    def forward(
        ctx: Any, x_TI: Tensor, scheme: Fp8, learning: bool, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        backend = scheme.backend(x_TI.device)
        x8_TI = scheme.activations(x_TI)
        weights8 = [scheme.weights(w_OI, learning=learning) for w_OI in weights]
        ctx.scheme, ctx.weights = scheme, weights
        if learning:
            saved = [scheme.input_to_save(x_TI, x8_TI), *weights8]
            tensors, ctx.layouts = to_tensors(saved)
            ctx.save_for_backward(*tensors)
        return tuple(fprop(backend, x8_TI, w8_OI).to(x_TI.dtype) for w8_OI in weights8)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scheme: Fp8 = ctx.scheme
        backend = scheme.backend(grads[0].device)
        saved_TI, *weights8 = from_tensors(ctx.saved_tensors, ctx.layouts)
        x_learns, _, _, *weights_learn = ctx.needs_input_grad
        dx_TI = None
        if x_learns:
            for dy_TO, w8_OI in zip(grads, weights8, strict=True):
                part_TI = dgrad(backend, scheme.gradients(dy_TO), w8_OI).to(dy_TO.dtype)
                dx_TI = part_TI if dx_TI is None else dx_TI.add_(part_TI)
        pairs = zip(ctx.weights, grads, weights_learn, strict=True)
        learning = [(w_OI, dy_TO) for w_OI, dy_TO, learns in pairs if learns]

        def make() -> list[Tensor]:
            x_tokens_TI = scheme.activations_along_tokens(saved_TI)
            return [
                wgrad(backend, scheme.gradients_along_tokens(dy_TO), x_tokens_TI)
                for _, dy_TO in learning
            ]

        made = iter(gradients([w_OI for w_OI, _ in learning], make) if learning else ())
        return dx_TI, None, None, *(next(made) if learns else None for learns in weights_learn)


def _parted(x: Float[Tensor, "*B I"], w_OI: Float[Tensor, "O I"]) -> Float[Tensor, "*B O"]:
    """x W^T whose weight gradient can be left."""
    y_TO: Tensor = _Parted.apply(x.reshape(-1, x.shape[-1]), w_OI)
    return y_TO.view(*x.shape[:-1], len(w_OI))


class _Parted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, w_OI: Tensor) -> Tensor:
        ctx.save_for_backward(x_TI, w_OI)
        ctx.weight = w_OI
        return x_TI @ w_OI.T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, w_OI = ctx.saved_tensors
        (dy_TO,) = grads
        dx_TI = dy_TO @ w_OI if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx_TI, None
        return dx_TI, *gradients([ctx.weight], lambda: [dy_TO.T @ x_TI])

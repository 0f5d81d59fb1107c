"""Small pieces that every block uses: RMS norm, SwiGLU, initial values."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from configs.seed import derive
from model.fp8.experts import fp8_swiglu
from model.fp8.linear import Linear
from model.fp8.scheme import Fp8
from model.swiglu import swiglu
from model.weight_cache import cast
from model.widening import widened


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalise each last-dim vector."""
        if torch.is_grad_enabled() and widened(x) is x:
            normed: Tensor = _RMSNorm.apply(x, self.weight, self.epsilon)
            return normed
        # One kernel does it all where the weight has the type of `x`; sums are float32 inside.
        return F.rms_norm(x, self.weight.shape, cast(self.weight, x.dtype), self.epsilon)


class _RMSNorm(torch.autograd.Function):
    """With a derivative in two passes over the slopes; torch has one only for layer norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_D: Tensor, epsilon: float) -> Tensor:
        scale = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square_()
        scale = scale.div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight_D, scale)
        normed: Tensor = (x * scale).mul_(weight_D)
        return normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale = ctx.saved_tensors
        slope = grads[0].contiguous()
        # A layer norm whose mean is said to be 0 differs by the slopes' own mean, which it takes
        # away though no mean was subtracted; it is put back.
        dx, d_weight_D, _ = torch.ops.aten.native_layer_norm_backward(
            slope,
            x,
            weight_D.shape,
            torch.zeros_like(scale),
            scale,
            weight_D,
            None,
            [True, True, False],
        )
        mean = torch.mv(slope.view(-1, len(weight_D)), weight_D).view_as(scale).div_(x.shape[-1])
        return dx.add_(mean.mul_(scale)), d_weight_D, None


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(
        self, width: int, inner: int, scheme: Fp8 | None, limit: float | None = None
    ) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj = Linear(width, inner, scheme)
        self.up_proj = Linear(width, inner, scheme)
        self.down_proj = Linear(inner, width, scheme)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Apply to each last-dim vector."""
        weights = [linear.weight for linear in (self.gate_proj, self.up_proj, self.down_proj)]
        scheme = self.gate_proj.scheme
        if scheme is None:
            gate_ID, up_ID, down_DI = (cast(weight, x.dtype) for weight in weights)
            return swiglu(x, gate_ID, up_ID, down_DI, self.limit)
        gate_ID, up_ID, down_DI = weights
        return fp8_swiglu(x, gate_ID, up_ID, down_DI, self.limit, scheme)


def seeded_normal(shape: tuple[int, ...], std: float, seed: int, *names: str | int) -> Tensor:
    """Float32 draws of N(0, std^2) that depend on the seed and names alone, not on draw order."""
    generator = torch.Generator().manual_seed(derive(seed, "init", *names))
    return torch.randn(shape, generator=generator) * std

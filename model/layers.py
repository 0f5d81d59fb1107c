"""Small pieces that every block uses: RMS norm, SwiGLU, initial values."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from configs.seed import derive
from configs.train import Precision
from model.fp8.linear import Linear, together


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dim."""

    def __init__(self, width: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.epsilon = epsilon

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Normalise each last-dim vector."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.epsilon)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), without biases."""

    def __init__(
        self, width: int, inner: int, precision: Precision, limit: float | None = None
    ) -> None:
        super().__init__()
        self.limit = limit
        self.gate_proj = Linear(width, inner, precision=precision)
        self.up_proj = Linear(width, inner, precision=precision)
        self.down_proj = Linear(inner, width, precision=precision)

    def forward(self, x: Float[Tensor, "*B D"]) -> Float[Tensor, "*B D"]:
        """Apply to each last-dim vector."""
        gate, up = together(x, self.gate_proj, self.up_proj)
        out: Tensor = self.down_proj(gated(gate, up, self.limit))
        return out


def gated(
    gate: Float[Tensor, "*B I"], up: Float[Tensor, "*B I"], limit: float | None
) -> Float[Tensor, "*B I"]:
    """silu(gate) * up, after gate <= limit and |up| <= limit where there is one (V4)."""
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


def seeded_normal(shape: tuple[int, ...], std: float, seed: int, *names: str | int) -> Tensor:
    """Float32 draws of N(0, std^2) that depend on the seed and names alone, not on draw order."""
    generator = torch.Generator().manual_seed(derive(seed, "init", *names))
    return torch.randn(shape, generator=generator) * std

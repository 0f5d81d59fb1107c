"""Rotary positions, interleaved as DeepSeek's MLA has them: pairs are (0, 1), (2, 3), ...

Axes: S positions, R rotary width (even).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def rotary_table(width: int, theta: float, positions: int) -> Float[Tensor, "S R"]:
    """cos for the first R / 2 columns and sin for the rest, float32, for positions 0 .. S - 1."""
    exponent = torch.arange(0, width, 2, dtype=torch.float64) / width
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), theta**-exponent)
    return torch.cat([angle.cos(), angle.sin()], dim=1).float()


def rotate(
    x: Float[Tensor, "*B R"], table_SR: Float[Tensor, "S R"], positions: Int[Tensor, "*P"]
) -> Float[Tensor, "*B R"]:
    """Rotate each pair by its position's angle; `positions` broadcasts against x without R."""
    cos, sin = table_SR[positions].chunk(2, dim=-1)
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)

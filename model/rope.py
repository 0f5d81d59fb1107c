"""Rotary positions, with YaRN; interleaved as DeepSeek's attention has them, or half-split.

Interleaved pairs are (0, 1), (2, 3), ...; half-split pairs are (0, R/2), (1, R/2 + 1), ...

Axes: S positions, R rotary width (even).
"""

import math
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from configs.model import YarnConfig


def rotary_table(
    width: int, theta: float, positions: int, yarn: YarnConfig | None = None
) -> Float[Tensor, "S R"]:
    """cos for the first R / 2 columns and sin for the rest, float32, for positions 0 .. S - 1.

    YaRN may scale both, unless its two magnitudes are equal (as in every released model).
    """
    frequency = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
    magnitude = 1.0
    if yarn is not None:
        frequency = _stretched(frequency, width, theta, yarn)
        magnitude = _table_magnitude(yarn)
    angle = torch.outer(torch.arange(positions, dtype=torch.float64), frequency)
    return (torch.cat([angle.cos(), angle.sin()], dim=1) * magnitude).float()


def shared_rotary_table(
    width: int, theta: float, positions: int, yarn: YarnConfig | None, device: torch.device
) -> Float[Tensor, "S R"]:
    """`rotary_table` of at least `positions` rows, one for all layers that ask for the same.

    Made when first needed and no longer than needed, so that a model of a million positions costs
    nothing to build. Rows are rounded up to a power of two: a growing text seldom asks anew.
    """
    rows = max(1024, 1 << (positions - 1).bit_length())
    return _kept_rotary_table(width, theta, rows, yarn, device)


@lru_cache(maxsize=16)
def _kept_rotary_table(
    width: int, theta: float, rows: int, yarn: YarnConfig | None, device: torch.device
) -> Tensor:
    # Made in inference mode, it could take no part in training later.
    with torch.inference_mode(False), torch.device("cpu"):
        return rotary_table(width, theta, rows, yarn).to(device)


def softmax_factor(yarn: YarnConfig | None) -> float:
    """By how much YaRN widens the softmax's scale: the square of its magnitude."""
    return 1.0 if yarn is None else _magnitude(yarn.factor, yarn.mscale_all_dim) ** 2


def rotate(
    x: Float[Tensor, "*B R"],
    table_SR: Float[Tensor, "S R"],
    positions: Int[Tensor, "*P"],
    *,
    inverse: bool = False,
) -> Float[Tensor, "*B R"]:
    """Rotate each interleaved pair by its position's angle, or back by it.

    `positions` broadcasts against x without R.
    """
    return rotate_tail(x, table_SR, positions, inverse=inverse)


def rotate_tail(
    x: Float[Tensor, "*B W"],
    table_SR: Float[Tensor, "S R"],
    positions: Int[Tensor, "*P"],
    *,
    inverse: bool = False,
) -> Float[Tensor, "*B W"]:
    """As `rotate`, for the last R dims of `x`; the others stay.

    Angles and products are float32 at least, and rounded to the type of `x` once: a cosine in
    bfloat16 would be off by 2^-9, the same for every token at its position.
    """
    cos, sin = _angles(table_SR[positions], x).chunk(2, dim=-1)
    sin = -sin if inverse else sin
    if not torch.is_grad_enabled():
        return _tail_rotated(x, cos, sin)
    rotated: Tensor = _RotateTail.apply(x, cos, sin)
    return rotated


class _RotateTail(torch.autograd.Function):
    """One copy of `x` either way; its derivative is the rotation back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _tail_rotated(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _tail_rotated(grads[0], cos, -sin), None, None


def _tail_rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    rotated = x.clone(memory_format=torch.contiguous_format)
    tail = rotated[..., -2 * cos.shape[-1] :].unflatten(-1, (-1, 2))
    if x.dtype == cos.dtype and x.shape[-1] % 2 == 0:
        # One pass over pairs that lie where complex numbers may.
        torch.view_as_complex(tail).mul_(torch.complex(cos, sin))
        return rotated
    even, odd = x[..., -2 * cos.shape[-1] :].to(cos.dtype).unflatten(-1, (-1, 2)).unbind(-1)
    tail[..., 0] = even * cos - odd * sin
    tail[..., 1] = even * sin + odd * cos
    return rotated


def rotate_halves(
    x: Float[Tensor, "*B R"], table_SR: Float[Tensor, "S R"], positions: Int[Tensor, "*P"]
) -> Float[Tensor, "*B R"]:
    """As `rotate`, for half-split pairs."""
    cos, sin = _angles(table_SR[positions], x).chunk(2, dim=-1)
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return turned.to(x.dtype)


def _angles(table: Tensor, x: Tensor) -> Tensor:
    return table.to(torch.promote_types(table.dtype, x.dtype))


def _stretched(frequency: Tensor, width: int, theta: float, yarn: YarnConfig) -> Tensor:
    """Fast frequencies as they are, slow ones divided by the factor, a ramp between."""

    def dim_of(turns: float) -> float:
        """The dim whose pair turns this often over the original context."""
        radians = yarn.original_max_position_embeddings / (turns * 2 * math.pi)
        return width * math.log(radians) / (2 * math.log(theta))

    low = max(math.floor(dim_of(yarn.beta_fast)), 0)
    high = min(math.ceil(dim_of(yarn.beta_slow)), width - 1)
    span = high - low if high > low else 0.001
    ramp = ((torch.arange(width // 2, dtype=torch.float64) - low) / span).clamp(0, 1)
    return frequency / yarn.factor * ramp + frequency * (1 - ramp)


def _table_magnitude(yarn: YarnConfig) -> float:
    """The quotient of the two magnitudes if both are given, else that of mscale = 1."""
    if yarn.mscale and yarn.mscale_all_dim:
        return _magnitude(yarn.factor, yarn.mscale) / _magnitude(yarn.factor, yarn.mscale_all_dim)
    return _magnitude(yarn.factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    """YaRN's correction of attention's temperature; 1 where mscale is 0."""
    return 0.1 * mscale * math.log(factor) + 1.0

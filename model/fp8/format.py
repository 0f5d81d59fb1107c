"""Block-scaled E4M3: tensors as float8 values and one float32 scale per tile.

DeepSeek-V3 (arXiv 2412.19437, section 3.3.2) quantises activations by tiles of 1 x 128 along the
contracted dim and weights by blocks of 128 x 128, with the scale taken from the tile's own largest
magnitude. This file defines those numbers; every faster path must reproduce them bit for bit.

Axes: R rows, C columns, P stacked matrices, N rows of a batch sorted by expert, E experts.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

E4M3_MAX = 448.0
TILE = 128
SMALLEST_SCALE = 2.0**-126
"""Below the smallest normal float32 a scale has lost bits; such a tile counts as zero."""


@dataclass(frozen=True, slots=True)
class Quantized:
    """`values * scales`, each scale covering one tile of `tile` = (rows, columns)."""

    values: Tensor
    """float8_e4m3fn [..., R, C]."""
    scales: Tensor
    """float32 [..., ceil(R / tile[0]), ceil(C / tile[1])]."""
    tile: tuple[int, int]


def quantize(
    x: Float[Tensor, "*P R C"], tile: tuple[int, int] = (1, TILE), power_of_two: bool = False
) -> Quantized:
    """Round `x` to E4M3 with one scale = amax / 448 per tile; values = x / scale, nearest even.

    Ragged edges behave as if padded with zeros. A tile whose scale would fall below 2^-126 gives
    zeros and scale 1. `power_of_two` rounds the scale up to a power of two (UE8M0), so that
    nothing overflows.
    """
    amax = _tile_amax(x.float(), tile)
    scales = _scale(amax, power_of_two)
    values = x.float() / _spread(scales, tile, x.shape)
    return Quantized(values.to(torch.float8_e4m3fn), scales, tile)


def dequantize(q: Quantized) -> Float[Tensor, "*P R C"]:
    """The float32 tensor that `q` stands for."""
    return q.values.float() * _spread(q.scales, q.tile, q.values.shape)


def round_trip(
    x: Float[Tensor, "*P R C"], tile: tuple[int, int] = (1, TILE)
) -> Float[Tensor, "*P R C"]:
    """`dequantize(quantize(x, tile))`, bit for bit, without the casts that CPUs are slow at."""
    x = x.float()
    spread = _spread(_scale(_tile_amax(x, tile), power_of_two=False), tile, x.shape)
    return round_to_grid(x / spread).mul_(spread)


def round_to_grid(v: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """Round to the nearest E4M3 value, ties to even, in float32 arithmetic; |v| <= 448.

    Zeros come out positive, which no product can tell.

    E4M3 keeps 3 bits below the leading one, and numbers under 2^-6 share the step of 2^-6. Adding
    1.5 * 2^20 times the leading power of two leaves the sum a step of exactly that size, so the
    addition itself does the rounding.
    """
    leading = v.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    magic = leading.clamp_min_(2.0**-6).mul_(1.5 * 2**20)
    return torch.add(v, magic).sub_(magic)


def round_trip_segments(
    x_ND: Float[Tensor, "N D"], counts_E: Int[Tensor, " E"]
) -> Float[Tensor, "N D"]:
    """Tiles of 128 x 1 that restart at each expert's first row, in one pass over the batch.

    Rows are sorted by expert, `counts_E` of each. Equal to `round_trip(segment, (128, 1))` on
    every segment alone: the weight gradient of an expert contracts over its own tokens only.
    """
    if x_ND.shape[0] == 0:
        return x_ND
    amax, rows_of_tile = [], []
    for segment in x_ND.split(counts_E.tolist()):
        for rows in segment.split(TILE) if segment.shape[0] else ():
            amax.append(rows.abs().amax(0))
            rows_of_tile.append(rows.shape[0])
    scales = _scale(torch.stack(amax), power_of_two=False)
    spread_ND = scales.repeat_interleave(torch.tensor(rows_of_tile), 0)
    return round_to_grid(x_ND / spread_ND).mul_(spread_ND)


def _tile_amax(x: Tensor, tile: tuple[int, int]) -> Tensor:
    rows, columns = x.shape[-2:]
    tile_rows, tile_columns = min(tile[0], max(rows, 1)), min(tile[1], columns)
    pad_rows, pad_columns = -rows % tile_rows, -columns % tile_columns
    magnitude = x.abs()
    if pad_rows or pad_columns:
        magnitude = torch.nn.functional.pad(magnitude, (0, pad_columns, 0, pad_rows))
    grid: Tensor = magnitude.unflatten(-2, (-1, tile_rows)).unflatten(-1, (-1, tile_columns))
    if tile_rows == 1:
        return grid.squeeze(-3).amax(-1)
    if tile_columns == 1:
        return grid.squeeze(-1).amax(-2)
    return grid.amax((-3, -1))


def _scale(amax: Tensor, power_of_two: bool) -> Tensor:
    scales = amax / E4M3_MAX
    if power_of_two:
        mantissa, exponent = torch.frexp(scales)
        exponent = exponent - (mantissa == 0.5).to(exponent.dtype)
        scales = torch.ldexp(torch.ones_like(scales), exponent)
    return torch.where(amax / E4M3_MAX < SMALLEST_SCALE, torch.ones_like(scales), scales)


def _spread(scales: Tensor, tile: tuple[int, int], shape: torch.Size) -> Tensor:
    """`scales` broadcast or repeated so that they align with a tensor of `shape`."""
    rows, columns = shape[-2:]
    if tile[0] > 1 and scales.shape[-2] > 1:
        scales = scales.repeat_interleave(tile[0], -2)[..., :rows, :]
    if tile[1] > 1 and scales.shape[-1] > 1:
        scales = scales.repeat_interleave(tile[1], -1)[..., :columns]
    return scales

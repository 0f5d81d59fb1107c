"""The slow twin: quantising and multiplying in plain torch, which defines the numbers.

To quantise: amax of each tile; scale = amax / 448 in float32; values = x / scale, rounded to E4M3.
Two kinds of tile are special. Where the scale would fall below 2^-126, the smallest normal float32,
it is 1 and the values are zero. Where a value is not finite, scale and values are NaN throughout,
so that a training that breaks shows where.

To multiply: dequantise into float64, which represents values times scales exactly, multiply there,
and round to float32 once. So these products are as good as exact.

Every other backend quantises to the same bits. Its float32 products differ by the order of float32
additions: |found - exact| <= (K + 8) * 2^-24 * (|A| |B|) for K contracted values. What a backend
rounds beyond that, as bfloat16 outputs on GPUs, its own docstring says.

Axes: R rows, C columns, P stacked matrices, M K N rows, contraction and columns of a product,
E experts.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from model.fp8.format import (
    E4M3_MAX,
    E5M6_MAX,
    SMALLEST_SCALE,
    from_e5m6,
    pack_e5m6,
    power_of_two_above,
    to_e5m6,
    unpack_e5m6,
)
from model.fp8.quantized import ACTIVATION, Quantized, QuantizedE5M6, Tile, bands, expect_stacked


class Reference:
    """torch's float8 casts and float64 products, on any device."""

    name = "reference"

    def quantize(
        self,
        x: Tensor | Quantized,
        tile: Tile,
        *,
        power_of_two: bool = False,
        counts: Sequence[int] | None = None,
        saved: bool = True,
        multiplied: bool = True,
    ) -> Quantized:
        """`x` [..., R, C] by tiles of any size; always with values, never in float32 as well."""
        x = self.dequantize(x) if isinstance(x, Quantized) else x.float()
        scales = tile_scales(tile_amax(x, tile, counts), power_of_two)
        spread = spread_scales(scales, tile, x.shape, counts)
        values = torch.where(spread.isnan(), torch.nan, x / spread).to(torch.float8_e4m3fn)
        return Quantized(values, scales, tile, None if counts is None else tuple(counts))

    def dequantize(self, q: Quantized) -> Tensor:
        """values * scales: float32 [..., R, C]."""
        return q.values.float() * spread_scales(q.scales, q.tile, q.values.shape, q.counts)

    def matmul(self, a: Quantized, b: Quantized) -> Tensor:
        """a @ b: float32 [M, N]."""
        return (_exact(a) @ _exact(b)).float()

    def grouped_matmul(self, a: Quantized, b: Quantized, counts: Sequence[int]) -> Tensor:
        """Rows of `a` [R, K] times their expert's matrix of `b` [E, K, N]: float32 [R, N]."""
        expect_stacked(b, counts)
        rows, matrices = _exact(a).split(list(counts)), _exact(b)
        return torch.cat([left @ right for left, right in zip(rows, matrices, strict=True)]).float()

    def grouped_outer(self, a: Quantized, b: Quantized, counts: Sequence[int]) -> Tensor:
        """a^T b over each expert's rows: float32 [E, M, N]."""
        pairs = zip(_exact(a).split(list(counts)), _exact(b).split(list(counts)), strict=True)
        return torch.stack([left.T @ right for left, right in pairs]).float()

    def quantize_e5m6(self, x: Tensor) -> QuantizedE5M6:
        """`x` [R, C] in E5M6, by tiles of 1 x 128, scales powers of two."""
        x, columns = x.float(), x.shape[-1]
        scales = tile_scales(tile_amax(x, ACTIVATION, None), power_of_two=True, largest=E5M6_MAX)
        spread = spread_scales(scales, ACTIVATION, x.shape, None)
        codes = to_e5m6(torch.where(spread.isnan(), 0, x / spread))
        return QuantizedE5M6(pack_e5m6(pad(codes, (0, -columns % 8))), scales, columns)

    def dequantize_e5m6(self, q: QuantizedE5M6) -> Tensor:
        """codes * scales: float32 [R, C]."""
        values = from_e5m6(unpack_e5m6(q.words))[..., : q.columns]
        return values * spread_scales(q.scales, ACTIVATION, values.shape, None)


def tile_amax(x: Tensor, tile: Tile, counts: Sequence[int] | None) -> Tensor:
    """The largest magnitude of each tile [..., bands, ceil(C / tile[1])]; NaN if not all finite."""
    magnitude = torch.where(x.isfinite(), x.abs(), torch.nan)
    rows, columns = x.shape[-2:]
    across = [part.amax(-1) for part in magnitude.split(tile[1], -1)] if columns else []
    per_row = torch.stack(across, -1) if across else magnitude
    if tile[0] == 1:
        return per_row
    parts = [per_row[..., first:last, :] for first, last in bands(rows, tile[0], counts)]
    if not parts:
        return per_row
    return torch.stack([part.amax(-2) for part in parts], -2)


def tile_scales(amax: Tensor, power_of_two: bool, largest: float = E4M3_MAX) -> Tensor:
    """amax / largest in float32, up to a power of two if asked; 1 for tiles that count as zero.

    NaN stays NaN.
    """
    scales = amax / largest
    if power_of_two:
        scales = torch.where(scales < SMALLEST_SCALE, scales, power_of_two_above(scales))
    return torch.where(scales < SMALLEST_SCALE, 1.0, scales)


def spread_scales(
    scales: Tensor, tile: Tile, shape: torch.Size, counts: Sequence[int] | None
) -> Tensor:
    """Each entry's scale: float32 [..., R, C], the `shape` of the entries."""
    rows, columns = shape[-2:]
    tall = scales
    if tile[0] > 1:
        heights = [last - first for first, last in bands(rows, tile[0], counts)]
        repeats = torch.tensor(heights, dtype=torch.int64, device=scales.device)
        tall = scales.repeat_interleave(repeats, -2)
    return tall.repeat_interleave(min(tile[1], max(columns, 1)), -1)[..., :columns]


def _exact(q: Quantized) -> Tensor:
    """`q` in float64, exactly: a value has 4 bits, a scale 24, and float64 has 53."""
    spread = spread_scales(q.scales, q.tile, q.values.shape, q.counts)
    return q.values.double() * spread.double()

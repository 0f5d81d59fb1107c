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

from collections.abc import Callable

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
from model.fp8.groups import Groups
from model.fp8.quantized import (
    ACTIVATION,
    Quantized,
    QuantizedE5M6,
    Tile,
    expect_rows,
    expect_stacked,
)


class Reference:
    """torch's float8 casts and float64 products, on any device."""

    name = "reference"
    reads_columns = False

    def quantize(
        self,
        x: Tensor | Quantized,
        tile: Tile,
        *,
        power_of_two: bool = False,
        groups: Groups | None = None,
        saved: bool = True,
        multiplied: bool = True,
        by_column: bool = False,
    ) -> Quantized:
        """`x` [..., R, C] by tiles of any size; always with values, never in float32 as well."""
        x = self.dequantize(x) if isinstance(x, Quantized) else x.float()
        expect_rows(x.shape, groups)
        scales = tile_scales(tile_amax(x, tile, groups), power_of_two)
        spread = spread_scales(scales, tile, x.shape, groups)
        values = torch.where(spread.isnan(), torch.nan, x / spread).to(torch.float8_e4m3fn)
        return Quantized(values, scales, tile, groups)

    def dequantize(self, q: Quantized) -> Tensor:
        """values * scales: float32 [..., R, C]."""
        values = q.unpadded().values
        return values.float() * spread_scales(q.scales, q.tile, values.shape, q.groups)

    def matmul(self, a: Quantized, b: Quantized) -> Tensor:
        """a @ b: float32 [M, N]."""
        return (_exact(a) @ _exact(b)).float()

    def grouped_matmul(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """Rows of `a` [R, K] times their expert's matrix of `b` [E, K, N]: float32 [R, N]."""
        expect_stacked(b, groups)
        rows, matrices = _exact(a).split(list(groups.on_host)), _exact(b)
        return torch.cat([left @ right for left, right in zip(rows, matrices, strict=True)]).float()

    def grouped_outer(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """a^T b over each expert's rows: float32 [E, M, N]."""
        pairs = zip(*(_exact(q).split(list(groups.on_host)) for q in (a, b)), strict=True)
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


def tile_amax(x: Tensor, tile: Tile, groups: Groups | None) -> Tensor:
    """The largest magnitude of each tile [..., bands, ceil(C / tile[1])]; NaN if not all finite."""
    return tile_reduce(torch.where(x.isfinite(), x.abs(), torch.nan), tile, groups, torch.amax)


def tile_reduce(
    x: Tensor, tile: Tile, groups: Groups | None, reduce: Callable[[Tensor, int], Tensor]
) -> Tensor:
    """What `reduce` makes of each tile of `x` [..., R, C] and zeros: [..., bands, across].

    `reduce` is `torch.amax` or `torch.sum`. Nothing is asked of the device.
    """
    rows, columns = x.shape[-2:]
    height, width = min(tile[0], max(rows, 1)), min(tile[1], max(columns, 1))
    if width > 1:
        x = reduce(_filled(x, 0, width).unflatten(-1, (-1, width)), -1)
    if height == 1:
        return x
    if groups is None:
        x = _filled(x, height, 0)
    else:
        filled = x.new_zeros(groups.num_bands(height) * height, x.shape[1])
        x = filled.index_copy_(0, groups.places(height), x)
    return reduce(x.unflatten(-2, (-1, height)), -2)


def _filled(x: Tensor, height: int, width: int) -> Tensor:
    """`x` [..., R, C] with zeros, to a multiple of the height and width that are not 0."""
    down, across = -x.shape[-2] % max(height, 1), -x.shape[-1] % max(width, 1)
    return pad(x, (0, across, 0, down)) if down or across else x


def tile_scales(amax: Tensor, power_of_two: bool, largest: float = E4M3_MAX) -> Tensor:
    """amax / largest in float32, up to a power of two if asked; 1 for tiles that count as zero.

    NaN stays NaN.
    """
    scales = amax / largest
    if power_of_two:
        scales = torch.where(scales < SMALLEST_SCALE, scales, power_of_two_above(scales))
    return torch.where(scales < SMALLEST_SCALE, 1.0, scales)


def spread_scales(scales: Tensor, tile: Tile, shape: torch.Size, groups: Groups | None) -> Tensor:
    """Each entry's scale: float32 [..., R, C], the `shape` of the entries."""
    rows, columns = shape[-2:]
    tall = scales
    if tile[0] > 1:
        tall = scales.index_select(-2, bands_of_rows(rows, tile[0], groups, scales.device))
    return tall.repeat_interleave(min(tile[1], max(columns, 1)), -1)[..., :columns]


def bands_of_rows(rows: int, height: int, groups: Groups | None, device: torch.device) -> Tensor:
    """int64 [rows]: the band of each row, of bands of `height` rows that groups begin anew."""
    height = min(height, max(rows, 1))
    if groups is None:
        return torch.arange(rows, device=device) // height
    return groups.places(height) // height


def _exact(q: Quantized) -> Tensor:
    """`q` in float64, exactly: a value has 4 bits, a scale 24, and float64 has 53."""
    values = q.unpadded().values
    spread = spread_scales(q.scales, q.tile, values.shape, q.groups)
    return values.double() * spread.double()

"""FP8 products on Hopper by cuBLAS, through torch's block-scaled `scaled_mm`.

cuBLAS multiplies and does not quantise: a quantizer is given to the constructor. Most of this file
lays operands out as torch 2.13 and cuBLAS ask for them
(aten/src/ATen/native/cuda/ScaledBlas.cpp; cuBLAS manual, "1D and 128x128 2D block scaling"):

| | |
|---|---|
| device | compute capability 9.x, CUDA 12.9 or later |
| a | float8_e4m3fn [M, K], row-major |
| b | float8_e4m3fn [K, N], column-major; K and N multiples of 16 |
| scales of 1 x 128 | float32 [M or N, K / 128], strides (1, M or N) |
| scales of 128 x 128 | float32 [L, M or N / 128], strides (1, L), L = K / 128 rounded up to 4 |
| pairs | any of the two but 128 x 128 on both sides |
| result | bfloat16, float16 or float32, row-major |

Values are padded with zeros to whole tiles along K and, for blocks, along the rows. torch's checks
of ragged sizes disagree: its kernel rounds up and its shape function down. Rows of 1 x 128 tiles
are padded to a multiple of 16, since cuBLAS wants each column of scales to begin at 16 bytes and
torch's strides allow no gap between columns.

Products of groups are one launch each, and so the host must know their counts. Those of experts are
known on the device alone, and waiting for them would take longer than a product: they go to a
backend whose kernels find the groups themselves.

Here both operands are [rows, K], [M, K] and [N, K], so that one function lays out either side; the
column-major b that torch wants is the transposed view of such rows.

Axes: R rows, K contracted columns, M N rows of either side, E experts, L blocks along K.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from configs.errors import DataError, MachineError
from model.fp8.format import TILE
from model.fp8.groups import Groups
from model.fp8.quantized import (
    ALONG_TOKENS,
    BLOCK,
    Quantized,
    QuantizedE5M6,
    Quantizer,
    Tile,
    expect_same_groups,
    expect_stacked,
)
from model.fp8.reference import bands_of_rows

ROWS = 16
"""Rows of 1 x 128 tiles come in multiples of this."""
_OLDEST_CUDA = (12, 9)


@dataclass(frozen=True, slots=True)
class Operand:
    """One side of a product as cuBLAS reads it, padded with zeros of scale 1."""

    values: Tensor
    """float8_e4m3fn [..., R, K], row-major; K a multiple of 128, R of 16, or of 128 for blocks."""
    scales: Tensor
    """float32 [..., R, K / 128] with strides (1, R); for blocks [..., L, R / 128] with (1, L)."""
    blocks: bool
    """Whether tiles are 128 x 128, not 1 x 128."""

    def part(self, first: int, last: int) -> "Operand":
        """Columns `first` to `last` of K, whole tiles of single rows, as a view."""
        assert not self.blocks, "a part's blocks would need scales padded anew"
        tiles = slice(first // TILE, last // TILE)
        return replace(self, values=self.values[..., first:last], scales=self.scales[..., tiles])


@runtime_checkable
class Grouped(Protocol):
    """Products of rows in groups."""

    def grouped_matmul(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """Rows of `a` times their group's matrix of `b`."""

    def grouped_outer(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """a^T b over each group's rows."""


class Cublas:
    """Products by `scaled_mm`, summed in float32; casts by the quantizer that it is given.

    Outputs and input gradients leave in `output_dtype`, bfloat16 rounding them once more; weight
    gradients leave in float32. Within 128 contracted values Hopper's tensor cores keep about 14
    bits of a sum (DeepSeek-V3, section 3.3.2).
    """

    name = "cublas"
    reads_columns = True

    def __init__(
        self,
        quantizer: Quantizer,
        output_dtype: torch.dtype = torch.bfloat16,
        grouped: Grouped | None = None,
    ) -> None:
        """`quantizer` casts on the same device, to the reference's bits.

        `grouped` multiplies groups whose counts the host does not know; without, it waits for them.
        """
        self._quantizer = quantizer
        self._output_dtype = output_dtype
        self._grouped = grouped

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
        """`x` [..., R, C] as E4M3, always with values: they are what is multiplied."""
        return self._quantizer.quantize(
            x,
            tile,
            power_of_two=power_of_two,
            groups=groups,
            multiplied=False,
            by_column=by_column,
        )

    def dequantize(self, q: Quantized) -> Tensor:
        """values * scales: float32 [..., R, C]."""
        return self._quantizer.dequantize(q)

    def matmul(self, a: Quantized, b: Quantized) -> Float[Tensor, "M N"]:
        """a @ b, in float32 where `b` has tiles of 128 x 1, else in the output dtype.

        Such tiles lie along tokens: the product is a weight gradient, of which many are summed.
        """
        _expect_same_contraction(a.values.shape[-1], b.values.shape[-2])
        dtype = torch.float32 if b.tile == ALONG_TOKENS else self._output_dtype
        rows, columns = a.values.shape[-2], b.values.shape[-1]
        if 0 in (rows, columns, a.values.shape[-1]):
            return torch.zeros(rows, columns, dtype=dtype, device=a.values.device)
        right = operand(b.T)
        left = operand(a, blocks=not right.blocks)
        return multiply(left, right, dtype)[:rows, :columns]

    def grouped_matmul(self, a: Quantized, b: Quantized, groups: Groups) -> Float[Tensor, "R N"]:
        """Rows of `a` [R, K] times their expert's matrix of `b` [E, K, N], in the output dtype.

        One product for each expert that has rows: torch 2.13's `scaled_grouped_mm` takes scales for
        rows and for MX formats, none for these tiles. Layouts are made for all experts at once.
        """
        expect_stacked(b, groups)
        _expect_same_contraction(a.values.shape[-1], b.values.shape[-2])
        _expect_whole(a.values.shape[0], groups)
        if self._grouped is not None and groups.known is None:
            return self._grouped.grouped_matmul(a, b, groups)
        columns = b.values.shape[-1]
        right = operand(b.T)
        padded_columns = right.values.shape[-2]
        lefts, places = expert_rows(a, groups)
        total = sum(padded_counts(groups.on_host, ROWS))
        out = a.values.new_empty(total, padded_columns, dtype=self._output_dtype)
        first = 0
        for expert, left in enumerate(lefts):
            last = first + left.values.shape[0]
            if last > first:
                weight = replace(right, values=right.values[expert], scales=right.scales[expert])
                multiply(left, weight, self._output_dtype, out=out[first:last])
            first = last
        cut = out if places is None else out.index_select(0, places)
        return cut[:, :columns]

    def grouped_outer(self, a: Quantized, b: Quantized, groups: Groups) -> Float[Tensor, "E M N"]:
        """a^T b over each expert's rows, float32; one product for each expert that has rows."""
        if self._grouped is not None and groups.known is None:
            return self._grouped.grouped_outer(a, b, groups)
        _expect_same_contraction(_rows(a), _rows(b))
        rows, columns = a.values.shape[-1], b.values.shape[-1]
        right = operand(whole_tiles(b, groups).T, blocks=False)
        left = operand(whole_tiles(a, groups).T, blocks=False)
        sizes = (len(groups), left.values.shape[0], right.values.shape[0])
        out = torch.empty(sizes, dtype=torch.float32, device=a.values.device)
        first = 0
        for part, count in zip(out, padded_counts(groups.on_host, TILE), strict=True):
            last = first + count
            if count:
                multiply(left.part(first, last), right.part(first, last), out.dtype, out=part)
            else:
                part.zero_()
            first = last
        return out[:, :rows, :columns]

    def quantize_e5m6(self, x: Tensor) -> QuantizedE5M6:
        """`x` [R, C] in E5M6, by tiles of 1 x 128, scales powers of two."""
        return self._quantizer.quantize_e5m6(x)

    def dequantize_e5m6(self, q: QuantizedE5M6) -> Tensor:
        """codes * scales: float32 [R, C]."""
        return self._quantizer.dequantize_e5m6(q)


def lacking(device: torch.device) -> str | None:
    """Why `Cublas` cannot compute on `device`, or None where it can."""
    if device.type != "cuda":
        return f"cuBLAS runs on CUDA devices, not on {device.type}"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA; install a build for CUDA 12.9 on"
    if not hasattr(F, "scaled_mm") or not hasattr(F, "ScalingType"):
        return (
            f"torch {torch.__version__} has no scaled_mm with block scales; install 2.13 or later"
        )
    if not torch.cuda.is_available():
        return "torch finds no CUDA device; check the driver (nvidia-smi)"
    version = tuple(int(part) for part in torch.version.cuda.split(".")[:2])
    if version < _OLDEST_CUDA:
        return (
            f"torch is built for CUDA {torch.version.cuda}, and cuBLAS has block scales from 12.9 "
            "on; install a build for that"
        )
    major, minor = torch.cuda.get_device_capability(device)
    if major != 9:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability {major}.{minor}, and "
            "cuBLAS multiplies these tiles on 9.x (Hopper) alone; use 'triton'"
        )
    return None


def multiply(
    left: Operand, right: Operand, dtype: torch.dtype, out: Tensor | None = None
) -> Float[Tensor, "M N"]:
    """left @ right^T: [M, K] and [N, K] to [M, N] of `dtype`, into `out` if given."""
    device = left.values.device
    if device.type != "cuda":
        raise MachineError(
            f"cuBLAS multiplies on CUDA devices, and these values are on {device.type}; "
            "choose the backend 'auto'"
        )
    recipes = [_recipe(left), _recipe(right)]
    if out is None:
        result: Tensor = F.scaled_mm(
            left.values,
            right.values.mT,
            left.scales,
            recipes[0],
            right.scales,
            recipes[1],
            output_dtype=dtype,
        )
        return result
    # What `scaled_mm` calls, which cannot pass on a result to be filled; copying the experts'
    # products into one tensor would take longer than the products.
    torch.ops.aten._scaled_mm_v2.out(
        left.values,
        right.values.mT,
        [left.scales],
        [recipes[0].value],
        [],
        [right.scales],
        [recipes[1].value],
        [],
        None,
        dtype,
        out=out,
    )
    return out


def operand(q: Quantized, *, blocks: bool = True) -> Operand:
    """`q` [..., R, K], contracted along K, in cuBLAS's layout; nothing is copied that fits already.

    Without `blocks`, a block's scale is repeated for each of its rows, as tiles of 1 x 128 have
    them. DataError if scales change within 128 contracted columns.
    """
    if q.values.numel() == 0 and q.scales.numel() > 0:
        raise DataError(f"{tuple(q.scales.shape)} scales and no values; quantise with saved = True")
    rows, columns = q.values.shape[-2:]
    as_blocks = blocks and q.tile == BLOCK and q.groups is None
    values = aligned(q.contracted(-1), _up(rows, TILE if as_blocks else ROWS), _up(columns, TILE))
    scales = block_scales(q.scales) if as_blocks else row_scales(scales_by_row(q), values.shape[-2])
    return Operand(values, scales, as_blocks)


def aligned(values: Tensor, rows: int, columns: int) -> Tensor:
    """float8 [..., R, K], at any strides, as row-major [..., rows, columns], zeros beyond."""
    same = values.shape[-2:] == (rows, columns)
    # cuBLAS reads 16 bytes at a time.
    at_16 = values.storage_offset() % 16 == 0 and values.stride(-2) % 16 == 0
    if same and values.stride(-1) == 1 and values.stride(-2) >= columns and at_16:
        return values
    shape = (*values.shape[:-2], rows, columns)
    # Bytes are what every device can copy.
    make = torch.empty if same else torch.zeros
    out = make(shape, dtype=torch.uint8, device=values.device)
    out[..., : values.shape[-2], : values.shape[-1]].copy_(values.view(torch.uint8))
    return out.view(values.dtype)


def row_scales(scales: Tensor, rows: int) -> Tensor:
    """float32 [..., R, L] as [..., rows, L] with strides (1, rows), ones beyond R."""
    if scales.shape[-2] == rows and scales.stride()[-2:] == (1, rows):
        return scales
    out = scales.new_ones(*scales.shape[:-2], scales.shape[-1], rows)
    out[..., : scales.shape[-2]].copy_(scales.mT)
    return out.mT


def block_scales(scales: Tensor) -> Tensor:
    """float32 [..., R / 128, L] as [..., L4, R / 128] with strides (1, L4), ones beyond L."""
    blocks = scales.shape[-1]
    padded = _up(blocks, 4)
    if padded == blocks and scales.stride()[-2:] == (padded, 1):
        return scales.mT
    out = scales.new_ones(*scales.shape[:-1], padded)
    out[..., :blocks].copy_(scales)
    return out.mT


def scales_by_row(q: Quantized) -> Tensor:
    """The scale of each row and 128 columns: float32 [..., R, ceil(K / 128)]."""
    rows, columns = q.values.shape[-2:]
    height, width = q.tile
    if width % TILE and width < columns:
        raise DataError(
            f"tiles of {height} x {width} change their scale within {TILE} of {columns} contracted "
            f"columns; quantise by tiles {TILE} long in that dim"
        )
    scales = q.scales
    if height > 1:
        scales = scales.index_select(-2, bands_of_rows(rows, height, q.groups, scales.device))
    across = -(-columns // TILE)
    if width != TILE:
        scales = scales.repeat_interleave(min(-(-width // TILE), across), -1)[..., :across]
    return scales


def padded_counts(counts: Sequence[int], multiple: int) -> list[int]:
    """Each count, raised to a multiple."""
    return [_up(count, multiple) for count in counts]


def expert_rows(q: Quantized, groups: Groups) -> tuple[list[Operand], Tensor | None]:
    """(each expert's rows of `q` [R, K], padded; the new place of each row, or None if all stay).

    cuBLAS reads each expert's scales as a matrix of its own, with its own stride. All of them are
    written into one flat tensor at once.
    """
    rows, columns = q.values.shape
    padded = padded_counts(groups.on_host, ROWS)
    total, blocks = sum(padded), -(-columns // TILE)
    places = None if padded == list(groups.on_host) else groups.places(ROWS)
    values = aligned(_spread(q.values, places, total), total, _up(columns, TILE))
    # Scale k of row r of an expert that begins at row f and has n rows lies at f * blocks + k * n
    # + r - f.
    begins_G = groups.table(ROWS)[1].long() * ROWS
    first_R, height_R = (
        of_G.index_select(0, groups.of_rows) for of_G in (begins_G[:-1], begins_G.diff())
    )
    at_R = torch.arange(rows, device=q.values.device) if places is None else places
    start_R = first_R * (blocks - 1) + at_R
    across_L = torch.arange(blocks, device=q.values.device)
    flat = q.scales.new_ones(total * blocks)
    flat[start_R[:, None] + height_R[:, None] * across_L] = scales_by_row(q)
    found, first = [], 0
    for count in padded:
        last = first + count
        scales = flat[first * blocks : last * blocks].view(blocks, count).mT
        found.append(Operand(values[first:last], scales, blocks=False))
        first = last
    return found, places


def whole_tiles(q: Quantized, groups: Groups) -> Quantized:
    """`q` [R, C], tiles along its rows, with each expert's rows padded to whole tiles of 128."""
    rows, height = _rows(q), q.tile[0]
    _expect_whole(rows, groups)
    if height % TILE:
        raise DataError(
            f"tiles of {height} x {q.tile[1]} change scale within {TILE} of {rows} contracted "
            f"rows; quantise by tiles of {ALONG_TOKENS}"
        )
    expect_same_groups(q, groups)
    if q.padded:
        return Quantized(q.values, q.scales, q.tile)
    padded = padded_counts(groups.on_host, TILE)
    places = None if padded == list(groups.on_host) else groups.places(TILE)
    values, scales = _spread(q.values, places, sum(padded)), q.scales
    if height > TILE:
        band_R = bands_of_rows(rows, height, q.groups, scales.device)
        tile_R = groups.places(TILE) // TILE
        band_of_tile = band_R.new_zeros(sum(padded) // TILE).index_copy_(0, tile_R, band_R)
        scales = scales.index_select(0, band_of_tile)
    return Quantized(values, scales, (TILE, q.tile[1]))


def _rows(q: Quantized) -> int:
    """Of `q` without padding."""
    return q.groups.rows if q.groups is not None and q.padded else q.values.shape[0]


def _spread(values: Tensor, places: Tensor | None, total: int) -> Tensor:
    """Rows of `values` [R, C] at `places` of [total, C], zeros between them."""
    if places is None:
        return values
    out = torch.zeros(total, values.shape[1], dtype=torch.uint8, device=values.device)
    out[places] = values.view(torch.uint8)
    return out.view(values.dtype)


def _recipe(side: Operand) -> F.ScalingType:
    """torch's name for the operand's tiles."""
    return F.ScalingType.BlockWise128x128 if side.blocks else F.ScalingType.BlockWise1x128


def _expect_same_contraction(a: int, b: int) -> None:
    if a != b:
        raise DataError(f"{a} columns of a meet {b} rows of b; they must be as many")


def _expect_whole(rows: int, groups: Groups) -> None:
    if groups.rows != rows:
        raise DataError(
            f"counts add up to {groups.rows} of {rows} rows; give each row to one expert"
        )


def _up(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple

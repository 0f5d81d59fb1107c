"""A tensor as float8 values and one float32 scale per tile.

Axes: R rows, C columns, P stacked matrices.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from configs.errors import DataError
from model.fp8.format import TILE

Tile = tuple[int, int]
"""Rows and columns that share a scale."""

ACTIVATION: Tile = (1, TILE)
ALONG_TOKENS: Tile = (TILE, 1)
BLOCK: Tile = (TILE, TILE)


@dataclass(frozen=True, slots=True)
class Quantized:
    """`values * scales`, each scale covering one tile."""

    values: Tensor
    """float8_e4m3fn [..., R, C]."""
    scales: Tensor
    """float32 [..., ceil(R / tile[0]), ceil(C / tile[1])]; with `counts`, a row for each band."""
    tile: Tile
    counts: tuple[int, ...] | None = None
    """Rows of each expert, where tiles start anew at an expert's first row."""
    float32: Tensor | None = None
    """The same in float32, where a backend has it at hand. Not to be kept for a backward pass."""

    @property
    def T(self) -> "Quantized":
        """Every matrix transposed, as a view."""
        assert self.counts is None, "tiles that start anew along columns have no use"
        return Quantized(
            self.values.mT,
            self.scales.mT,
            (self.tile[1], self.tile[0]),
            float32=None if self.float32 is None else self.float32.mT,
        )

    def rows(self, index: Tensor) -> "Quantized":
        """The rows of `index`, in the form that is at hand, by tiles that are one row high."""
        assert self.counts is None
        tile = 1, self.tile[1]
        scales = self.scales.index_select(0, index // self.tile[0])
        if self.float32 is not None:
            float32 = self.float32.index_select(0, index)
            return replace(self, values=self.values[:0], scales=scales, tile=tile, float32=float32)
        # Bytes are what every device can gather.
        values = self.values.view(torch.uint8).index_select(0, index).view(self.values.dtype)
        return replace(self, values=values, scales=scales, tile=tile)


def bands(rows: int, height: int, counts: Sequence[int] | None) -> Iterator[tuple[int, int]]:
    """First and last row (exclusive) of each band of tiles; bands start anew with each expert."""
    first = 0
    for count in (rows,) if counts is None else counts:
        last = first + count
        for start in range(first, last, height):
            yield start, min(start + height, last)
        first = last


def expect_stacked(b: Quantized, counts: Sequence[int]) -> None:
    """DataError unless `b` has a matrix for each expert."""
    if b.values.shape[0] != len(counts):
        raise DataError(
            f"{len(counts)} counts of rows for {b.values.shape[0]} experts' matrices; give one each"
        )


@dataclass(frozen=True, slots=True)
class QuantizedE5M6:
    """A matrix in E5M6 with a power-of-two scale for each row and 128 columns: 12 bits a value."""

    words: Tensor
    """int32 [R, 3 * ceil(C / 8)], as `format.pack_e5m6` packs."""
    scales: Tensor
    """float32 [R, ceil(C / 128)]."""
    columns: int


@runtime_checkable
class Quantizer(Protocol):
    """The casts of a backend, into bytes and back."""

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
        """`x` [..., R, C] as E4M3 with one scale for each tile.

        What is quantised already is read back first. With `counts`, the rows of each expert of
        [R, C], tiles start anew at an expert's first row. A backend that multiplies another form
        than `values` may leave them empty without `saved`, and the other without `multiplied`.
        """

    def dequantize(self, q: Quantized) -> Tensor:
        """The float32 tensor that `q` stands for; to be read, for it may be `q`'s own."""

    def quantize_e5m6(self, x: Tensor) -> QuantizedE5M6:
        """`x` [R, C] in E5M6, for `dequantize_e5m6`."""

    def dequantize_e5m6(self, q: QuantizedE5M6) -> Tensor:
        """The float32 tensor that `q` stands for."""

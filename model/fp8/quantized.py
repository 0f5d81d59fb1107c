"""A quantised tensor: 8-bit values and a float32 scale for each tile of them.

A tile is a rectangle of values that share a scale. Three shapes of it are enough to train with:

- `ACTIVATION`, 1 x 128: one token, 128 channels. For products that contract channels.
- `ALONG_TOKENS`, 128 x 1: 128 tokens, one channel. For the product that contracts tokens.
- `BLOCK`, 128 x 128: weights. A block transposed is a block, so that one cast serves the products
  that contract inputs and those that contract outputs.

At ragged edges a tile covers what there is. Where rows belong to experts, sorted by expert, tiles
that are several rows high start anew at each expert's first row, since an expert contracts its own
rows alone (`groups.py`). The rows of one tile are called a band.

What training multiplies is E4M3, `Quantized`. The input of the Linear after attention is saved for
the backward pass with more bits, in E5M6: `QuantizedE5M6`.

Axes: R rows, C columns, P stacked matrices.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from configs.errors import DataError
from model.fp8.format import TILE
from model.fp8.groups import Groups

Tile = tuple[int, int]
"""Rows and columns that share a scale."""

ACTIVATION: Tile = (1, TILE)
ALONG_TOKENS: Tile = (TILE, 1)
BLOCK: Tile = (TILE, TILE)


@dataclass(frozen=True, slots=True)
class Quantized:
    """`values * scales`, each scale covering one tile."""

    values: Tensor
    """float8_e4m3fn [..., R, C]; where `padded`, [bands * tile[0], C]."""
    scales: Tensor
    """float32 [..., ceil(R / tile[0]), ceil(C / tile[1])]; with `groups`, a row for each band that
    there can be, and 1 for those that there are not."""
    tile: Tile
    groups: Groups | None = None
    """The rows' experts, where tiles start anew at an expert's first row."""
    float32: Tensor | None = None
    """The same tensor in float32 [..., R, C], if the backend multiplies that; it is not saved."""
    padded: bool = False
    """Whether each group's last band is filled up with rows of zeros. A product that contracts rows
    then takes whole tiles, and every group begins where many values are read at a time."""
    by_column: Tensor | None = None
    """The values of the same shape once more, those of a column side by side, for products that
    contract rows: a weight for its input gradient."""

    @property
    def T(self) -> "Quantized":
        """Every matrix transposed, as a view."""
        assert self.groups is None, "tiles that start anew along columns have no use"
        return Quantized(
            self.values.mT,
            self.scales.mT,
            (self.tile[1], self.tile[0]),
            float32=None if self.float32 is None else self.float32.mT,
            by_column=None if self.by_column is None else self.by_column.mT,
        )

    def contracted(self, dim: int) -> Tensor:
        """The values for a product that contracts `dim`: side by side along it, if they can be.

        Tensor cores read FP8 operands along the contraction alone. Laid out otherwise, they are
        transposed byte by byte within the product.
        """
        other = self.by_column
        return other if other is not None and other.stride(dim) == 1 else self.values

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """(values, scales); a backward pass reads values by column, if there are such."""
        return self.values if self.by_column is None else self.by_column, self.scales

    @property
    def layout(self) -> Callable[[Tensor, Tensor], "Quantized"]:
        """What makes this from its `tensors`, without the float32 form."""
        return partial(Quantized, tile=self.tile, groups=self.groups, padded=self.padded)

    def stacked(self) -> "Quantized":
        """A matrix [R, C] as a stack of one, a view."""
        return replace(
            self,
            values=self.values[None],
            scales=self.scales[None],
            float32=None if self.float32 is None else self.float32[None],
            by_column=None if self.by_column is None else self.by_column[None],
        )

    def unpadded(self) -> "Quantized":
        """The same without rows of padding."""
        if not self.padded:
            return self
        assert self.groups is not None
        return replace(self, values=picked(self.values, self.groups.places(TILE)), padded=False)

    def rows(self, index: Tensor) -> "Quantized":
        """Row `index[i]` as row i, with tiles one row high; the float32 form alone if there is one.

        Without `groups` only: then row r has the scales of band r // tile[0].
        """
        assert self.groups is None
        assert self.by_column is None, "no product picks rows of a weight"
        tile = 1, self.tile[1]
        scales = self.scales.index_select(0, index // self.tile[0])
        if self.float32 is not None:
            float32 = self.float32.index_select(0, index)
            return replace(self, values=self.values[:0], scales=scales, tile=tile, float32=float32)
        return replace(self, values=picked(self.values, index), scales=scales, tile=tile)


@dataclass(frozen=True, slots=True)
class QuantizedE5M6:
    """A matrix in E5M6, 12 bits a value, with a power-of-two scale for each row and 128 columns."""

    words: Tensor
    """int32 [R, 3 * ceil(C / 8)]: codes as `format.pack_e5m6` packs them."""
    scales: Tensor
    """float32 [R, ceil(C / 128)]."""
    columns: int
    """C, which the words round up to a multiple of 8."""

    @property
    def tensors(self) -> tuple[Tensor, Tensor]:
        """(words, scales)."""
        return self.words, self.scales

    @property
    def layout(self) -> Callable[[Tensor, Tensor], "QuantizedE5M6"]:
        """What makes this from its `tensors`."""
        return partial(QuantizedE5M6, columns=self.columns)


Saved = Quantized | QuantizedE5M6
Layout = Callable[[Tensor, Tensor], Any]
"""Makes a quantised tensor from its two. `Any`, for it travels on `ctx`, which has no types."""


def to_tensors(quantized: Sequence[Saved]) -> tuple[list[Tensor], list[Layout]]:
    """(tensors, layouts) of quantised tensors, to be saved for a backward pass.

    `ctx.save_for_backward` takes tensors alone: here values and scales of each, in turn. The
    layouts, one for each, have none but counts of rows in them and go onto `ctx` itself.
    """
    return [tensor for q in quantized for tensor in q.tensors], [q.layout for q in quantized]


def from_tensors(tensors: Sequence[Tensor], layouts: Sequence[Layout]) -> list[Any]:
    """The quantised tensors that `to_tensors` was given, without their float32 forms."""
    parts = zip(layouts, tensors[::2], tensors[1::2], strict=True)
    return [make(values, scales) for make, values, scales in parts]


def picked(values: Tensor, index: Tensor) -> Tensor:
    """Rows of float8 `values` [R, C]: bytes are what every device can gather."""
    return values.view(torch.uint8).index_select(0, index).view(values.dtype)


def expect_stacked(b: Quantized, groups: Groups) -> None:
    """DataError unless `b` has a matrix for each expert."""
    if b.values.shape[0] != len(groups):
        raise DataError(
            f"{len(groups)} counts of rows for {b.values.shape[0]} experts' matrices; give one each"
        )


def expect_rows(shape: torch.Size, groups: Groups | None) -> None:
    """DataError unless groups divide the rows of a matrix of such a shape."""
    if groups is not None and (len(shape) != 2 or groups.rows != shape[0]):
        raise DataError(
            f"groups of {groups.rows} rows in all, for a tensor of shape {tuple(shape)}; give the "
            "rows of each expert of one matrix"
        )


def expect_same_groups(q: Quantized, groups: Groups | None) -> None:
    """DataError unless the tiles of `q` start where a product over `groups` expects them.

    Counts that only the device knows are taken to be the same.
    """
    if q.tile[0] == 1 or q.groups is groups:
        return
    # Without groups, all rows are one.
    both = [g or Groups.even(1, q.values.shape[-2], q.values.device) for g in (q.groups, groups)]
    mine, wanted = (g.known for g in both)
    if len(both[0]) != len(both[1]) or (None not in (mine, wanted) and mine != wanted):
        raise DataError(
            f"tiles of {list(q.values.shape)} by {q.tile} start anew after {mine} rows, and the "
            f"product's groups after {wanted}; quantise with the groups of the product"
        )


@runtime_checkable
class Quantizer(Protocol):
    """The casts of a backend."""

    reads_columns: bool
    """Whether products need the contracted dim's values side by side, and so weights twice."""

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
        """`x` [..., R, C], of any float type, as E4M3: scale = amax / 448 of each tile, in float32.

        What is quantised already is dequantised first. `power_of_two` rounds scales up to powers of
        two. With `groups`, of the rows of a matrix [R, C], tiles start anew at a group's first row.

        `saved`, `multiplied` and `by_column` say what the result is for. A backend that multiplies
        float32 may leave `values` empty [..., 0, C] if not `saved`, and `float32` None if not
        `multiplied`. One that `reads_columns` gives `by_column` if asked to, for blocks alone.
        """

    def dequantize(self, q: Quantized) -> Tensor:
        """values * scales, float32 [..., R, C]; it may be `q.float32`, so do not write to it."""

    def quantize_e5m6(self, x: Tensor) -> QuantizedE5M6:
        """`x` [R, C], of any float type, as E5M6; scale = amax / 65024, up to a power of two."""

    def dequantize_e5m6(self, q: QuantizedE5M6) -> Tensor:
        """codes * scales: float32 [R, C]."""

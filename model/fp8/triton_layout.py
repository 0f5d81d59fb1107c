"""Layouts of operands for Triton's kernels, their arguments, and what they refuse to multiply.

Rows of all stacked matrices, or of all experts, are one long matrix to the casts. A group is one of
them; a table on the device says where each begins (`model.fp8.groups`).

Axes: R rows, C columns.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from configs.errors import DataError
from model.fp8.format import TILE
from model.fp8.groups import Groups, even_table
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized, Tile

_TILES = (ACTIVATION, ALONG_TOKENS, BLOCK)


@dataclass(frozen=True, slots=True)
class Matrix:
    """A quantised matrix, or a stack of them, as kernels read and write it."""

    codes: Tensor
    """uint8, the bytes of E4M3 values, or these values; for a cast, floats are a source too."""
    scales: Tensor
    """float32 of as many dims; any tensor of such where codes are floats, which have none."""

    def arguments(self, name: str, axes: str) -> dict[str, Any]:
        """A kernel's arguments for this matrix: two pointers, and two strides for each axis.

        For "a" and "mk": a, a_scales, a_m, a_k, a_scales_m, a_scales_k.
        """
        found: dict[str, Any] = {name: self.codes, f"{name}_scales": self.scales}
        for axis, stride, scale_stride in zip(
            axes, self.codes.stride(), self.scales.stride(), strict=True
        ):
            found[f"{name}_{axis}"] = stride
            found[f"{name}_scales_{axis}"] = scale_stride
        return found


@dataclass(frozen=True, slots=True)
class Bands:
    """Where bands of so many rows begin, of experts or of the matrices of a stack."""

    table: Tensor
    """`Groups.table`."""
    groups: int
    """How many experts or matrices."""
    number: int
    """The most bands that there can be."""

    @classmethod
    def of(
        cls, shape: torch.Size, groups: Groups | None, height: int, device: torch.device
    ) -> "Bands":
        """Of a tensor [..., R, C] whose rows have groups, or of a stack."""
        if groups is not None:
            return cls(groups.table(height), len(groups), groups.num_bands(height))
        matrices = prod(shape[:-2])
        table = even_table(matrices, shape[-2], height, device)
        return cls(table, matrices, matrices * -(-shape[-2] // height))


def empty(source: Tensor, tile: Tile, bands: int, across: int, *, padded: bool) -> Matrix:
    """Codes [R, C], or [bands * 128, C] if `padded`, and scales [bands, across], not yet filled.

    Their layouts are those that products read quickest: scales of 1 x 128 tiles with rows side by
    side, codes of 128 x 1 tiles too. Without padding the latter need a multiple of 16 rows.
    """
    rows, columns = source.shape
    rows = bands * TILE if padded else rows
    codes = source.new_empty(rows, columns, dtype=torch.uint8)
    scales = source.new_empty(bands, across, dtype=torch.float32)
    if tile == ACTIVATION:
        scales = source.new_empty(across, bands, dtype=torch.float32).T
    if tile == ALONG_TOKENS and rows % 16 == 0:
        codes = source.new_empty(columns, rows, dtype=torch.uint8).T
    return Matrix(codes, scales)


def flat(x: Tensor) -> Tensor:
    """The rows of all stacked matrices [..., R, C] as one matrix, a view where that can be."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def expect_tile(tile: Tile) -> None:
    """DataError unless kernels quantise by such tiles."""
    if tile not in _TILES:
        raise DataError(f"no kernel quantises by tiles of {tile}; choose one of {list(_TILES)}")


def expect_product(a: Quantized, b: Quantized) -> None:
    """DataError unless `a` [.., K] times `b` [K, ..] has tiles that match along K."""
    if a.values.shape[-1] != b.values.shape[-2]:
        raise DataError(
            f"{described(a)} times {described(b)}: the contracted dims differ; transpose one"
        )
    if a.tile not in (ACTIVATION, BLOCK) or b.tile not in (ALONG_TOKENS, BLOCK):
        raise DataError(
            f"{described(a)} times {described(b)}: tiles must be {TILE} wide along the "
            f"contraction, columns of the left and rows of the right; quantise along that dim"
        )


def described(q: Quantized) -> str:
    """Shape and tile, for messages."""
    return f"{list(q.values.shape)} with tiles {q.tile}"

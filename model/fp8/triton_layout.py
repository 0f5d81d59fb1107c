"""Layouts of operands for Triton's kernels, their arguments, and what they refuse to multiply.

Rows of all stacked matrices, or of all experts, are one long matrix to the casts. A group is one of
them, its height its number of rows; `group_table` says where each begins.

Axes: R rows, C columns.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from math import prod
from typing import Any

import torch
from torch import Tensor

from configs.errors import DataError
from model.fp8.format import TILE
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized, Tile, bands

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


@lru_cache(256)
def group_table(heights: tuple[int, ...], height: int, device: torch.device) -> Tensor:
    """int32 [2, groups + 1]: first rows and first bands of groups, then the totals.

    The same counts come back for every product of a layer, so one copy to the device serves all.
    """
    rows = accumulate(heights, initial=0)
    tiles = accumulate((-(-rows // height) for rows in heights), initial=0)
    return torch.tensor([list(rows), list(tiles)], dtype=torch.int32, device=device)


def group_heights(shape: torch.Size, counts: Sequence[int] | None) -> tuple[int, ...]:
    """Rows of each group: an expert, or a matrix of a stack."""
    if counts is None:
        return (shape[-2],) * prod(shape[:-2])
    if len(shape) != 2 or sum(counts) != shape[0] or min(counts, default=0) < 0:
        raise DataError(
            f"counts {list(counts)} sum to {sum(counts)}, for a tensor of shape {tuple(shape)}; "
            f"give the rows of each expert of one matrix"
        )
    return tuple(counts)


def aligned(heights: tuple[int, ...]) -> bool:
    """Whether every group begins at a multiple of 16 rows."""
    return all(height % 16 == 0 for height in heights)


def empty(source: Tensor, tile: Tile, heights: tuple[int, ...], bands: int, across: int) -> Matrix:
    """Codes [R, C] and scales [bands, across] of `source` [R, C], not yet filled.

    Their layouts are those that products read quickest: scales of 1 x 128 tiles with rows side by
    side, codes of 128 x 1 tiles too where every group begins at a multiple of 16 rows.
    """
    rows, columns = source.shape
    codes = source.new_empty(rows, columns, dtype=torch.uint8)
    scales = source.new_empty(bands, across, dtype=torch.float32)
    if tile == ACTIVATION:
        scales = source.new_empty(across, bands, dtype=torch.float32).T
    if tile == ALONG_TOKENS and aligned(heights):
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


def expect_bands(q: Quantized, counts: Sequence[int] | None) -> None:
    """DataError unless the tiles of `q` start where a product over `counts` expects them."""
    if q.tile[0] == 1 or q.counts == (None if counts is None else tuple(counts)):
        return
    rows = q.values.shape[-2]
    if list(bands(rows, q.tile[0], q.counts)) != list(bands(rows, q.tile[0], counts)):
        raise DataError(
            f"tiles of {described(q)} start anew at counts {q.counts}, and the product wants "
            f"{counts}; quantise with the same counts"
        )


def described(q: Quantized) -> str:
    """Shape and tile, for messages."""
    return f"{list(q.values.shape)} with tiles {q.tile}"

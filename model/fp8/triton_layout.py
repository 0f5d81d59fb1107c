"""How operands lie for Triton's kernels, and what they refuse to multiply.

Axes: R rows, C columns.
"""

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import prod

import torch
from torch import Tensor

from configs.errors import DataError
from model.fp8.format import TILE
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized, Tile, bands

_TILES = (ACTIVATION, ALONG_TOKENS, BLOCK)


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
    return all(height % 16 == 0 for height in heights)


def room(
    matrix: Tensor, tile: Tile, heights: tuple[int, ...], number: int, across: int
) -> tuple[Tensor, Tensor]:
    """Empty codes [R, C] and scales [bands, across], in the layouts that products like."""
    rows, columns = matrix.shape
    codes = matrix.new_empty(rows, columns, dtype=torch.uint8)
    scales = matrix.new_empty(number, across, dtype=torch.float32)
    if tile == ACTIVATION:
        scales = matrix.new_empty(across, number, dtype=torch.float32).T
    if tile == ALONG_TOKENS and aligned(heights):
        codes = matrix.new_empty(columns, rows, dtype=torch.uint8).T
    return codes, scales


def flat(x: Tensor) -> Tensor:
    """The rows of all stacked matrices as one matrix, a view where that can be."""
    return x.reshape(prod(x.shape[:-1]), x.shape[-1])


def expect_tile(tile: Tile) -> None:
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
    return f"{list(q.values.shape)} with tiles {q.tile}"

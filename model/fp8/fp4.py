"""MXFP4 weights that FP8 holds without loss, for training that knows of its own rounding.

V4's routed experts are served in FP4: groups of 32 inputs share a power-of-two scale (OCP MX).
While it trains, a float32 master weight is rounded to FP4 and at once written as E4M3 with blocks
of 128 x 128, so that products run in FP8; gradients pass to the master as if nothing had been
rounded (arXiv 2606.19348, section 5; the lossless step is that of the released `convert.py`).

Axes: O outputs, I inputs, G groups of 32 inputs, P stacked matrices.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from model.fp8.format import E2M1_MAX, TILE, from_e2m1, power_of_two_above, to_e2m1
from model.fp8.quantized import BLOCK, Quantized

GROUP = 32
_FLOOR = 2.0**-120
"""A group's smallest scale: 2^6 below it lies the smallest that a block may have."""
_HEADROOM = 6
"""6 * 2^6 = 384 is the largest FP4 magnitude that E4M3 holds: so high lies a block's largest."""
_REACH = 14
"""0.5 * 2^(6 - 14) = 2^-9 is E4M3's smallest step: a group's scale may be so many powers below."""


def to_fp4(
    w: Float[Tensor, "*P O I"],
) -> tuple[UInt8[Tensor, "*P O I"], Float[Tensor, "*P O G"]]:
    """(codes, scales): the nearest FP4 values under 2^ceil(log2(amax / 6)), at least 2^-120.

    A scale that lies more than 2^14 below the largest of its 128 x 128 block is raised to that,
    which flushes what is a millionth of its neighbours: the price of `as_e4m3` being lossless.
    """
    groups = pad(w.float(), (0, -w.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))
    amax = groups.abs().amax(-1)
    scales = power_of_two_above((amax / E2M1_MAX).clamp_min(_FLOOR))
    largest = _spread(_blocks(scales), scales.shape, TILE // GROUP)
    scales = torch.maximum(scales, largest * 2.0**-_REACH)
    codes = to_e2m1(groups / scales.unsqueeze(-1)).flatten(-2)[..., : w.shape[-1]]
    return codes, scales


def from_fp4(
    codes: UInt8[Tensor, "*P O I"], scales: Float[Tensor, "*P O G"]
) -> Float[Tensor, "*P O I"]:
    """What codes and scales stand for."""
    spread = scales.repeat_interleave(GROUP, -1)[..., : codes.shape[-1]]
    return from_e2m1(codes) * spread


def as_e4m3(
    codes: UInt8[Tensor, "*P O I"], scales: Float[Tensor, "*P O G"]
) -> tuple[Tensor, Tensor]:
    """(values, block scales) of the same numbers in E4M3: scale = the block's largest / 2^6."""
    blocks = _blocks(scales) * 2.0**-_HEADROOM
    spread = _spread(blocks, codes.shape, TILE)
    return (from_fp4(codes, scales) / spread).to(torch.float8_e4m3fn), blocks


def through_fp4(w: Float[Tensor, "*P O I"]) -> Quantized:
    """`w` rounded to FP4, as the E4M3 operand that stands for it exactly."""
    return Quantized(*as_e4m3(*to_fp4(w)), BLOCK)


def _blocks(scales: Tensor) -> Tensor:
    """[..., ceil(O / 128), ceil(I / 128)]: the largest of each block's groups."""
    across = TILE // GROUP
    filled = pad(scales, (0, -scales.shape[-1] % across, 0, -scales.shape[-2] % TILE))
    grid: Tensor = filled.unflatten(-2, (-1, TILE)).unflatten(-1, (-1, across))
    return grid.amax((-3, -1))


def _spread(blocks: Tensor, shape: torch.Size, width: int) -> Tensor:
    """Of each entry of a tensor of `shape`, `width` columns to a block, its block's."""
    tall = blocks.repeat_interleave(TILE, -2)[..., : shape[-2], :]
    return tall.repeat_interleave(width, -1)[..., : shape[-1]]

"""FP4 weights in FP8 products: quantisation-aware training for models that are served in FP4.

V4's routed experts are served in MXFP4 (OCP MX): values in E2M1, and one power-of-two scale for
each 32 inputs. For a model to be good at that, it trains with the same rounding: at every forward
pass a float32 weight is rounded to FP4, and gradients pass to it as if it had not been
(arXiv 2606.19348, section 5).

No tensor core of Hopper multiplies FP4. So the rounded weight is written as E4M3 with one scale for
each block of 128 x 128, and multiplied as any other. That step is without loss: within a block, the
ratio of a group's scale to the block's is a power of two that E4M3's exponent can hold, and the 8
magnitudes of E2M1 fit its mantissa (as the released `convert.py` does it).

Axes: O outputs, I inputs, G groups of 32 inputs, P stacked matrices.
"""

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn.functional import pad

from model.fp8.format import E2M1_MAX, TILE, from_e2m1, power_of_two_above, to_e2m1
from model.fp8.quantized import BLOCK, Quantized

GROUP = 32
"""Inputs that share a scale."""
_FLOOR = 2.0**-120
"""The smallest scale of a group. A block's may be 2^6 smaller: 2^-126, the smallest normal one."""
_HEADROOM = 6
"""A block's scale is its largest group's / 2^6. That group's values then reach 6 * 2^6 = 384 of
E4M3's 448; with 2^7 they would not fit."""
_REACH = 14
"""A group's scale may be 2^14 smaller than its block's largest: 0.5 * 2^(6 - 14) = 2^-9 is the
smallest step of E4M3."""


def to_fp4(
    w: Float[Tensor, "*P O I"],
) -> tuple[UInt8[Tensor, "*P O I"], Float[Tensor, "*P O G"]]:
    """(codes, scales) of the nearest FP4 values; scale = 2^ceil(log2(amax / 6)), at least 2^-120.

    A scale more than 2^14 smaller than the largest of its 128 x 128 block is raised to that, so
    that `as_e4m3` is without loss. Values that are a millionth of their neighbours become zero.
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
    """codes * scales, float32."""
    spread = scales.repeat_interleave(GROUP, -1)[..., : codes.shape[-1]]
    return from_e2m1(codes) * spread


def as_e4m3(
    codes: UInt8[Tensor, "*P O I"], scales: Float[Tensor, "*P O G"]
) -> tuple[Tensor, Tensor]:
    """The same numbers in E4M3: (values float8_e4m3fn [*P, O, I], scales float32 of each block)."""
    blocks = _blocks(scales) * 2.0**-_HEADROOM
    spread = _spread(blocks, codes.shape, TILE)
    return (from_fp4(codes, scales) / spread).to(torch.float8_e4m3fn), blocks


def through_fp4(w: Float[Tensor, "*P O I"]) -> Quantized:
    """`w` rounded to FP4, as an E4M3 operand by blocks that stands for exactly that."""
    return Quantized(*as_e4m3(*to_fp4(w)), BLOCK)


def _blocks(scales: Tensor) -> Tensor:
    """[..., ceil(O / 128), ceil(I / 128)]: the largest of each block's groups."""
    across = TILE // GROUP
    filled = pad(scales, (0, -scales.shape[-1] % across, 0, -scales.shape[-2] % TILE))
    grid: Tensor = filled.unflatten(-2, (-1, TILE)).unflatten(-1, (-1, across))
    return grid.amax((-3, -1))


def _spread(blocks: Tensor, shape: torch.Size, width: int) -> Tensor:
    """Each entry's block, for a tensor of `shape` with 128 rows and `width` columns to a block."""
    tall = blocks.repeat_interleave(TILE, -2)[..., : shape[-2], :]
    return tall.repeat_interleave(width, -1)[..., : shape[-1]]

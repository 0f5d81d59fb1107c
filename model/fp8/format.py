"""The number formats of FP8 training, as casts: E4M3, UE8M0, E5M6, E2M1.

A name like E4M3 counts bits: 4 of exponent, 3 of mantissa, and one of sign. (U: without a sign.)

| format | bits | values | used for |
|---|---|---|---|
| E4M3 | 8 | to ±448; steps of 2^-9 below 2^-6; no infinity, one NaN of each sign | operands |
| UE8M0 | 8 | 2^(code - 127); code 255 is NaN | scales that are powers of two |
| E5M6 | 12 | float16 less its last 4 bits, to ±65024 | saved inputs of the Linear after attention |
| E2M1 | 4 | ±{0, 0.5, 1, 1.5, 2, 3, 4, 6} | FP4 weights, two to a byte |

A value below the smallest power of two of its format is subnormal: it has no leading one, and its
step is that of the smallest power. Every rounding is to nearest, ties to even.

`to_x` casts float32 to codes of format x, `from_x` codes to float32, without any scale. `pack_x`
puts codes that fill no byte, or several at once, into words; `unpack_x` takes them out. E4M3 needs
neither: torch has it as a dtype, and `round_to_grid` rounds to it where that dtype is slow.

Axes: A any dims, C codes, P packed words.
"""

from itertools import pairwise

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

E4M3_MAX = 448.0
E5M6_MAX = 65024.0
E2M1_MAX = 6.0
TILE = 128
"""Values under one scale in the dim that a product contracts."""
SMALLEST_SCALE = 2.0**-126
"""Below the smallest normal float32 a scale has lost bits; such a tile counts as zero."""

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Magnitudes by code; the fourth bit is the sign."""


def round_to_grid(v: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """The nearest E4M3 value of each float32 value, as float32; |v| <= 448, NaN stays NaN.

    Zeros come out positive, which makes no difference to a product.

    E4M3 keeps 3 bits below the leading one, and numbers under 2^-6 share the step of 2^-9. Adding
    1.5 * 2^20 times the leading power of two leaves the sum a last bit of exactly that size, so the
    addition itself does the rounding.
    """
    leading = v.view(torch.int32).bitwise_and(0x7F800000).view(torch.float32)
    magic = leading.clamp_min_(2.0**-6).mul_(1.5 * 2**20)
    return torch.add(v, magic).sub_(magic)


def power_of_two_above(x: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """The smallest power of two >= x, for positive normal float32; NaN stays."""
    raised = (x.view(torch.int32) + 0x7FFFFF).bitwise_and(0x7F800000).view(torch.float32)
    return torch.where(x.isnan(), x, raised)


def to_e8m0(scales: Float[Tensor, "*A"]) -> UInt8[Tensor, "*A"]:
    """The codes of scales that are powers of two from 2^-126 on; NaN is 255."""
    exponent = scales.view(torch.int32) >> 23
    return torch.where(scales.isnan(), 255, exponent).to(torch.uint8)


def from_e8m0(codes: UInt8[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """2^(code - 127), float32; code 255 is NaN."""
    return codes.view(torch.float8_e8m0fnu).float()


def pack_e8m0(codes: UInt8[Tensor, "*A C"]) -> Int[Tensor, "*A P"]:
    """Four codes to an int32, the first in the lowest byte: P = ceil(C / 4).

    The last dim is filled up with code 127, the scale 1. Products on Blackwell GPUs read scales so;
    no backend here is for them yet.
    """
    filled = torch.nn.functional.pad(codes, (0, -codes.shape[-1] % 4), value=127)
    return filled.contiguous().view(torch.int32)


def unpack_e8m0(packed: Int[Tensor, "*A P"], count: int) -> UInt8[Tensor, "*A C"]:
    """The first `count` codes of each last-dim vector."""
    return packed.contiguous().view(torch.uint8)[..., :count]


def to_e5m6(v: Float[Tensor, "*A"]) -> Int[Tensor, "*A"]:
    """12-bit codes as int32; what rounds beyond 65024 gets infinity's code, with its sign."""
    bits = v.float().view(torch.int32)
    sign, magnitude = (bits >> 20) & 0x800, bits & 0x7FFFFFFF
    # One rounding, from float32: by way of float16 there would be two.
    exponent = magnitude >> 23
    step = (exponent - 6).clamp_min(127 - 14 - 6)
    step_size = (step << 23).view(torch.float32)
    # `round` takes ties to even. Steps are 2^-20 for subnormals, below 2^-14.
    steps = (magnitude.view(torch.float32) / step_size).round()
    rounded = (steps * step_size).view(torch.int32)
    normal = (rounded >> 17) - ((127 - 15) << 6)
    subnormal = (rounded.view(torch.float32) * 2.0**20).nan_to_num(0, 0, 0).to(torch.int32)
    code = torch.where(rounded < (127 - 14) << 23, subnormal, normal).clamp_max(0x7C0)
    code = torch.where(magnitude > 0x7F800000, 0x7E0, code)
    return sign | code


def from_e5m6(codes: Int[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """What 12-bit codes stand for, in float32."""
    return (codes << 4).to(torch.int16).view(torch.float16).float()


def pack_e5m6(codes: Int[Tensor, "*A C"]) -> Int[Tensor, "*A P"]:
    """Eight 12-bit codes to three int32 words, lowest bits first; P = 3 C / 8, 8 divides C."""
    c = codes.unflatten(-1, (-1, 8)).to(torch.int64)
    low = c[..., 0] | c[..., 1] << 12 | c[..., 2] << 24
    middle = c[..., 2] >> 8 | c[..., 3] << 4 | c[..., 4] << 16 | c[..., 5] << 28
    high = c[..., 5] >> 4 | c[..., 6] << 8 | c[..., 7] << 20
    words = torch.stack([low, middle, high], dim=-1) & 0xFFFFFFFF
    return words.flatten(-2).to(torch.int32)


def unpack_e5m6(words: Int[Tensor, "*A P"]) -> Int[Tensor, "*A C"]:
    """The codes, int32, that `pack_e5m6` packed: C = 8 P / 3."""
    low, middle, high = (words.unflatten(-1, (-1, 3)).to(torch.int64) & 0xFFFFFFFF).unbind(-1)
    codes = [
        low,
        low >> 12,
        low >> 24 | middle << 8,
        middle >> 4,
        middle >> 16,
        middle >> 28 | high << 4,
        high >> 8,
        high >> 20,
    ]
    unpacked: Tensor = (torch.stack(codes, dim=-1) & 0xFFF).flatten(-2).to(torch.int32)
    return unpacked


def to_e2m1(v: Float[Tensor, "*A"]) -> UInt8[Tensor, "*A"]:
    """4-bit codes of the nearest FP4 values; |v| beyond 6 counts as 6."""
    magnitude = v.abs()
    # Half way between neighbours the even code is taken: 0.25 is 0, 0.75 is 1.0, 1.25 is 1.0.
    code = torch.zeros(v.shape, dtype=torch.uint8, device=v.device)
    for lower, (a, b) in enumerate(pairwise(_E2M1)):
        half = (a + b) / 2
        code += (magnitude >= half) if lower % 2 else (magnitude > half)
    return code | (v.signbit().to(torch.uint8) << 3)


def from_e2m1(codes: UInt8[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """What 4-bit codes stand for, in float32."""
    table = torch.tensor([*_E2M1, *(-value for value in _E2M1)], device=codes.device)
    return table[codes.long()]


def pack_e2m1(codes: UInt8[Tensor, "*A C"]) -> UInt8[Tensor, "*A P"]:
    """Two 4-bit codes to a byte, the first in the low half; C is even, P = C / 2."""
    low, high = codes.unflatten(-1, (-1, 2)).unbind(-1)
    packed: Tensor = low | high << 4
    return packed


def unpack_e2m1(packed: UInt8[Tensor, "*A P"]) -> UInt8[Tensor, "*A C"]:
    """The codes that `pack_e2m1` packed: C = 2 P."""
    codes: Tensor = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2)
    return codes

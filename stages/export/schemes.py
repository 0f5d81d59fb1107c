"""ModelSlim's integer schemes: the tensors that stand for one Linear weight, and what they mean.

| in the description | weight | beside it | activations |
|---|---|---|---|
| W8A8 | int8 [R, C] | `quant_bias` int32 [R], `input_scale` and `input_offset` float32 [1], \
`deq_scale` float32 [R] | one scale and offset, fixed here |
| W8A8_DYNAMIC | int8 [R, C] | `weight_scale` float32 [R, 1], `weight_offset` zeros | a scale for \
each token, as they come |
| W4A8_DYNAMIC | int8 [R / 2, C], two rows a byte, the even one in the low bits | the same, and \
`scale_bias` float32 [R, 1] or [R, 16] | the same |

A server holds scales of weights and activations in the model's own type, bfloat16. So every scale
here is a bfloat16 number, rounded up: what is proved of a weight holds of the server's too.
`stages/export/emulator.py` computes as the server does.

Axes: R rows (outputs of a Linear), C columns (inputs).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from stages.export.formats import ARITHMETIC_SLACK, VANISHING

INT8_MAX, INT4_MAX = 127, 7
_ON_GRID = 1 + 2.0**-7
"""A scale rounded up to bfloat16 is at most so many times as large."""
_CANDIDATES = 8
"""Neighbouring input scales of which the one with the best reciprocal is taken."""


@runtime_checkable
class Scheme(Protocol):
    """How one weight is stored."""

    @property
    def kind(self) -> str:
        """What the description calls it."""

    @property
    def beside(self) -> tuple[str, ...]:
        """Last parts of the names of the tensors beside `weight`."""

    def encode(self, x: Float[Tensor, "R C"]) -> tuple[Tensor, ...]:
        """The stored weight, and the tensors beside it in the order of `beside`."""

    def decode(self, stored: Sequence[Tensor]) -> Float[Tensor, "R C"]:
        """The float32 weight that they stand for."""

    def error_bound(self, x: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """float64: the most by which each decoded value may differ from `x`."""


@dataclass(frozen=True, slots=True)
class Dynamic8:
    """A scale for each row, absmax / 127."""

    kind: str = "W8A8_DYNAMIC"
    beside: tuple[str, ...] = ("weight_scale", "weight_offset")

    def encode(self, x: Float[Tensor, "R C"]) -> tuple[Tensor, ...]:
        """Symmetric per row; a row that vanishes gives zeros and scale 1."""
        weight, scale = quantize_rows(x, INT8_MAX)
        return weight, scale, torch.zeros_like(scale)

    def decode(self, stored: Sequence[Tensor]) -> Float[Tensor, "R C"]:
        """(weight - offset) * scale."""
        weight, scale, offset = stored
        return (weight.float() - offset) * scale

    def error_bound(self, x: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """Half of each row's scale."""
        return _half_scale(x, INT8_MAX)


@dataclass(frozen=True, slots=True)
class Static8:
    """One scale and offset for all activations, by the range that calibration saw them in."""

    low: float
    high: float
    kind: str = "W8A8"
    beside: tuple[str, ...] = ("quant_bias", "input_scale", "input_offset", "deq_scale")

    def encode(self, x: Float[Tensor, "R C"]) -> tuple[Tensor, ...]:
        """y = (q_x q_w^T + quant_bias) deq_scale, with q_x = round(x / input_scale + offset)."""
        weight, scale_R1 = quantize_rows(x, INT8_MAX)
        input_scale, input_offset = self.of_inputs()
        sums_R = weight.long().sum(1)
        return (
            weight,
            (-sums_R * int(input_offset)).to(torch.int32),
            input_scale,
            input_offset,
            (input_scale * scale_R1).flatten(),
        )

    def of_inputs(self) -> tuple[Float[Tensor, "1"], Float[Tensor, "1"]]:
        """(scale, offset) by which the range, and 0, lie within -128 .. 127.

        A server multiplies by the scale's reciprocal in bfloat16. Of a few neighbouring scales the
        one is taken whose reciprocal is most nearly a bfloat16 number.
        """
        low, high = min(self.low, 0.0), max(self.high, 0.0)
        smallest = on_grid(torch.tensor([(high - low) / 255]))
        smallest = torch.where(smallest < 2.0**-100, torch.ones(1), smallest)
        near = (
            smallest.view(torch.int32) + 2**16 * torch.arange(_CANDIDATES, dtype=torch.int32)
        ).view(torch.float32)
        missed = ((1 / near).bfloat16().float() * near - 1).abs()
        scale = near[missed.argmin()].reshape(1)
        return scale, (-128 - low / scale).round().clamp(-128, 127)

    def decode(self, stored: Sequence[Tensor]) -> Float[Tensor, "R C"]:
        """weight * deq_scale / input_scale."""
        weight, _, input_scale, _, deq_scale = stored
        return weight.float() * (deq_scale / input_scale).unsqueeze(1)

    def error_bound(self, x: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """Half of each row's scale."""
        return _half_scale(x, INT8_MAX)


@dataclass(frozen=True, slots=True)
class Dynamic4:
    """A scale for each row, absmax / 7; `chunks` of columns that `scale_bias` is summed over."""

    chunks: int
    kind: str = "W4A8_DYNAMIC"
    beside: tuple[str, ...] = ("weight_scale", "weight_offset", "scale_bias")

    def encode(self, x: Float[Tensor, "R C"]) -> tuple[Tensor, ...]:
        """`scale_bias` is 8 times the sum of the weights of each row, by chunk of columns.

        The operator multiplies the high and low four bits of an activation apart, the low ones
        shifted by 8 to be signed.
        """
        weight, scale = quantize_rows(x, INT4_MAX)
        bias = 8 * (weight * scale).unflatten(1, (self.chunks, -1)).sum(-1)
        return pack(weight), scale, torch.zeros_like(scale), bias

    def decode(self, stored: Sequence[Tensor]) -> Float[Tensor, "R C"]:
        """(weight - offset) * scale, of unpacked weights."""
        packed, scale, offset, _ = stored
        low, high = (packed << 4) >> 4, packed >> 4
        return (torch.stack([low, high], 1).flatten(0, 1).float() - offset) * scale

    def error_bound(self, x: Float[Tensor, "R C"]) -> Float[Tensor, "R C"]:
        """Half of each row's scale."""
        return _half_scale(x, INT4_MAX)


def quantize_rows(x: Float[Tensor, "R C"], largest: int) -> tuple[Tensor, Float[Tensor, "R 1"]]:
    """(int8 values of magnitude `largest` at the most, scales); a row that vanishes has scale 1."""
    scale_R1 = on_grid(x.abs().amax(1, keepdim=True) / largest)
    scale_R1 = torch.where(scale_R1 < 2.0**-100, torch.ones_like(scale_R1), scale_R1)
    return (x / scale_R1).round().clamp(-largest, largest).to(torch.int8), scale_R1


def on_grid(scale: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """Positive float32 numbers rounded up to the next of bfloat16."""
    bits = scale.float().contiguous().view(torch.int32)
    return ((bits + 0xFFFF) & ~0xFFFF).view(torch.float32)


def pack(weight: Tensor) -> Tensor:
    """int8 values [R, C] of four bits, two rows a byte: [R / 2, C]."""
    even, odd = weight[::2], weight[1::2]
    return (odd << 4) | (even & 15)


def _half_scale(x: Float[Tensor, "R C"], largest: int) -> Float[Tensor, "R C"]:
    absmax_R1 = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)).double()
    step = 0.5 * absmax_R1 / largest * _ON_GRID
    return step + x.abs() * ARITHMETIC_SLACK + VANISHING

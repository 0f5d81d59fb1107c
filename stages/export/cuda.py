"""Variants for CUDA servers: Hugging Face layout, in bfloat16, in DeepSeek's block FP8, and FP4.

In `fp8`, every Linear weight [R, C] is float8_e4m3fn beside its scales [ceil(R / 128),
ceil(C / 128)]: the multiplier that undoes each 128 x 128 block's scaling. Blocks at the edge count
as padded with zeros. This is the layout of the released weights, which transformers, vLLM and
SGLang read. It differs by family:

| family | scales | which are | dtype |
|---|---|---|---|
| V3 | `<name>_scale_inv` | amax / 448 | float32 |
| V3.2 | `<name>_scale_inv` | the power of two above | float32 |
| V4 | `<module>.scale` | the power of two above | float32 |

`export.fp8_scales = "ue8m0"` gives V3 the powers of two of V3.2.

The released V4 has its routed experts in FP4, its base models in FP8. `fp4` is the first: two E2M1
values a byte [R, C / 2], the even column in the low bits, beside `<module>.scale` float8_e8m0fnu
[R, ceil(C / 32)]; all else is as in `fp8`, which is the second, with scales in float8_e8m0fnu too.
So the two released kinds have them: vLLM takes what lies in a byte beside FP8 experts for codes of
FP4, and llama.cpp what lies in float32 beside FP4 ones for bytes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from configs.delivery import Variant
from configs.model import ModelConfig
from model.fp8.format import E2M1_MAX, E4M3_MAX, TILE, from_e2m1, pack_e2m1, unpack_e2m1
from model.fp8.fp4 import GROUP, to_fp4
from model.weights.config import quantized_fields, table_of
from model.weights.families import narrowest
from model.weights.scaled import narrow
from model.weights.table import ScaleType
from stages.export.formats import (
    ARITHMETIC_SLACK,
    INDEX,
    VANISHING,
    Bf16,
    Read,
    half_step,
)


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """Linear weights in E4M3 by blocks of 128 x 128; the rest as in `Bf16`."""

    model: ModelConfig
    variant: Variant = "fp8"
    scales: ScaleType | None = None
    """Of the blocks; none are those of the family's released models."""
    stem: str = "model"
    index_names: tuple[str, ...] = (INDEX,)

    @property
    def scale_type(self) -> ScaleType:
        """How the scales of the blocks are written."""
        return self.scales or table_of(self.model).SCALES

    @property
    def config_entries(self) -> Mapping[str, Any]:
        """The released weights' own description of this scheme."""
        scheme = table_of(self.model).quantization()
        scheme.pop("scale_fmt", None)
        if self.scale_type != "float32":
            scheme["scale_fmt"] = "ue8m0"
        if "expert_dtype" in scheme:
            scheme["expert_dtype"] = self.expert_type
        return quantized_fields(scheme)

    @property
    def expert_type(self) -> str:
        """What the config says of the experts' type, if the family has a choice."""
        return "fp8"

    def side_files(self, names: Sequence[str]) -> Mapping[str, Any]:
        """None."""
        return {}

    def parts(self, name: str) -> tuple[str, ...]:
        """A Linear weight and its scales, or the tensor itself."""
        if not self._is_quantised(name):
            return self._kept.parts(name)
        return (name, table_of(self.model).scale_name(name))

    def encode(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """Quantise by the training format's own definition."""
        if not self._is_quantised(name):
            return self._kept.encode(name, x)
        return dict(zip(self.parts(name), narrow(x, self.scale_type), strict=True))

    def decode(self, name: str, read: Read) -> Tensor:
        """Block times scale, as a server reads it: no code in common with the encoder."""
        if not self._is_quantised(name):
            return self._kept.decode(name, read)
        weight, scales = (read(part).float() for part in self.parts(name))
        return weight * _over_blocks(scales, weight.shape)

    def error_bound(self, name: str, x: Tensor) -> Float[Tensor, "..."]:
        """Half a step of E4M3 (4 significant bits, down to 2^-6) under each block's scale."""
        if not self._is_quantised(name):
            return self._kept.error_bound(name, x)
        rows, columns = x.shape
        padded = torch.zeros(-(-rows // TILE) * TILE, -(-columns // TILE) * TILE)
        padded[:rows, :columns] = x.abs()
        amax = padded.view(padded.shape[0] // TILE, TILE, -1, TILE).amax((1, 3)).double()
        scale = (amax / E4M3_MAX).clamp_min(2.0**-126)
        if self.scale_type != "float32":
            mantissa, exponent = torch.frexp(scale)
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = _over_blocks(scale, x.shape)
        step = half_step(x.double() / scale, bits=4, smallest_exponent=-6)
        return step * scale + x.abs() * ARITHMETIC_SLACK + VANISHING

    @property
    def _kept(self) -> Bf16:
        """How this variant stores what it does not quantise."""
        return Bf16(self.model)

    def in_blocks(self, name: str) -> bool:
        """Whether the tensor `name` has a scale for each block of 128 x 128."""
        return self._is_quantised(name)

    def _is_quantised(self, name: str) -> bool:
        return narrowest(self.model, name) == "float8"


@dataclass(frozen=True, slots=True)
class Fp4Experts(Fp8Blocks):
    """The routed experts of a V4 in FP4, in groups of 32 inputs; the rest as in `Fp8Blocks`."""

    variant: Variant = "fp4"
    scales: ScaleType | None = "e8m0"
    """As released: a byte each, of blocks and of groups."""

    @property
    def expert_type(self) -> str:
        """What the config says of the experts' type."""
        return "fp4"

    def encode(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """Quantise by the training format's own definition."""
        if not self._is_fp4(name):
            return Fp8Blocks.encode(self, name, x)
        codes, scales = to_fp4(x)
        stored = (pack_e2m1(codes).view(torch.int8), scales.to(torch.float8_e8m0fnu))
        return dict(zip(self.parts(name), stored, strict=True))

    def decode(self, name: str, read: Read) -> Tensor:
        """Group times scale, as a server reads it: no code in common with the encoder."""
        if not self._is_fp4(name):
            return Fp8Blocks.decode(self, name, read)
        packed, scales = (read(part) for part in self.parts(name))
        values = from_e2m1(unpack_e2m1(packed.view(torch.uint8)))
        return values * scales.float().repeat_interleave(GROUP, 1)[:, : values.shape[1]]

    def error_bound(self, name: str, x: Tensor) -> Float[Tensor, "..."]:
        """Half a step of E2M1 (2 significant bits, down to 1) under each group's scale.

        A group far smaller than the largest of its 128 x 128 block has a larger scale, at which its
        values may vanish; that scale is the largest one's / 2^14.
        """
        if not self._is_fp4(name):
            return Fp8Blocks.error_bound(self, name, x)
        rows, columns = x.shape
        padded = torch.zeros(-(-rows // TILE) * TILE, -(-columns // TILE) * TILE)
        padded[:rows, :columns] = x.abs()
        amax = padded.unflatten(1, (-1, GROUP)).amax(2).double()
        mantissa, exponent = torch.frexp((amax / E2M1_MAX).clamp_min(2.0**-120))
        exponent = exponent - (mantissa == 0.5).int()
        blocks = exponent.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE // GROUP)).amax((1, 3))
        floor = blocks.repeat_interleave(TILE, 0).repeat_interleave(TILE // GROUP, 1) - 14
        scale = torch.ldexp(torch.ones_like(amax), torch.maximum(exponent, floor))
        scale = scale[:rows].repeat_interleave(GROUP, 1)[:, :columns]
        step = half_step(x.double() / scale, bits=2, smallest_exponent=0)
        return step * scale + x.abs() * ARITHMETIC_SLACK + VANISHING

    def in_blocks(self, name: str) -> bool:
        """All that is quantised, but for the experts."""
        return self._is_quantised(name) and not self._is_fp4(name)

    def _is_fp4(self, name: str) -> bool:
        return ".experts." in name and self._is_quantised(name)


def _over_blocks(grid: Tensor, shape: torch.Size) -> Tensor:
    """One value per block, repeated over the block's elements, cut to `shape`."""
    rows, columns = shape
    return grid.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]

"""Variants for CUDA servers: Hugging Face layout, in bfloat16 and in DeepSeek's block FP8.

In `fp8`, every Linear weight [R, C] is float8_e4m3fn beside `<name>_scale_inv`, float32
[ceil(R / 128), ceil(C / 128)]: the multiplier that undoes each 128 x 128 block's scaling. Blocks at
the edge count as padded with zeros. This is the layout of the released DeepSeek-V3 weights, which
transformers, vLLM and SGLang read.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from model.fp8.format import E4M3_MAX, TILE, quantize
from stages.export.formats import (
    ARITHMETIC_SLACK,
    INDEX,
    KEPT_AS,
    LINEARS,
    VANISHING,
    Read,
    half_step,
    parse,
)


@dataclass(frozen=True, slots=True)
class Fp8Blocks:
    """Linear weights in E4M3 by blocks of 128 x 128; the rest as in `Bf16`."""

    variant: str = "fp8"
    stem: str = "model"
    index_names: tuple[str, ...] = (INDEX,)

    @property
    def config_entries(self) -> Mapping[str, Any]:
        """The released weights' own description of this scheme."""
        scheme = {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "quant_method": "fp8",
            "weight_block_size": [TILE, TILE],
        }
        return {"quantization_config": scheme}

    def side_files(self, names: Sequence[str]) -> Mapping[str, Any]:
        """None."""
        return {}

    def parts(self, name: str) -> tuple[str, ...]:
        """A Linear weight and its scales, or the tensor itself."""
        return (name, f"{name}_scale_inv") if _is_quantised(name) else KEPT_AS.parts(name)

    def encode(self, name: str, x: Float[Tensor, "..."]) -> dict[str, Tensor]:
        """Quantise by the training format's own definition."""
        if not _is_quantised(name):
            return KEPT_AS.encode(name, x)
        quantized = quantize(x, tile=(TILE, TILE))
        return dict(zip(self.parts(name), (quantized.values, quantized.scales), strict=True))

    def decode(self, name: str, read: Read) -> Float[Tensor, "..."]:
        """Block times scale, as a server reads it: no code in common with the encoder."""
        if not _is_quantised(name):
            return KEPT_AS.decode(name, read)
        weight, scale_inv = (read(part) for part in self.parts(name))
        return weight.float() * _over_blocks(scale_inv, weight.shape)

    def error_bound(self, name: str, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Half a step of E4M3 (4 significant bits, down to 2^-6) under each block's amax / 448."""
        if not _is_quantised(name):
            return KEPT_AS.error_bound(name, x)
        rows, columns = x.shape
        padded = torch.zeros(-(-rows // TILE) * TILE, -(-columns // TILE) * TILE)
        padded[:rows, :columns] = x.abs()
        amax = padded.view(padded.shape[0] // TILE, TILE, -1, TILE).amax((1, 3))
        scale = (_over_blocks(amax, x.shape).double() / E4M3_MAX).clamp_min(2.0**-126)
        step = half_step(x.double() / scale, bits=4, smallest_exponent=-6)
        return step * scale + x.abs() * ARITHMETIC_SLACK + VANISHING


def _is_quantised(name: str) -> bool:
    return parse(name).module in LINEARS


def _over_blocks(grid: Tensor, shape: torch.Size) -> Tensor:
    """One value per block, repeated over the block's elements, cut to `shape`."""
    rows, columns = shape
    return grid.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]

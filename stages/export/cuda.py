"""Variants for CUDA servers: Hugging Face layout, in bfloat16 and in DeepSeek's block FP8.

In `fp8`, every Linear weight [R, C] is float8_e4m3fn beside its scales [ceil(R / 128),
ceil(C / 128)]: the multiplier that undoes each 128 x 128 block's scaling. Blocks at the edge count
as padded with zeros. This is the layout of the released weights, which transformers, vLLM and
SGLang read. It differs by family:

| family | scales | which are | dtype |
|---|---|---|---|
| V3 | `<name>_scale_inv` | amax / 448 | float32 |
| V3.2 | `<name>_scale_inv` | the power of two above | float32 |
| V4 | `<module>.scale` | the power of two above | float8_e8m0fnu |

The released V4 has its routed experts in FP4; here they are in FP8, as in its base models.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from configs.model import ModelConfig
from model.fp8.format import E4M3_MAX, TILE
from model.weights.config import table_of
from model.weights.families import narrowest
from model.weights.scaled import narrow
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
    variant: str = "fp8"
    stem: str = "model"
    index_names: tuple[str, ...] = (INDEX,)

    @property
    def config_entries(self) -> Mapping[str, Any]:
        """The released weights' own description of this scheme."""
        scheme = table_of(self.model).quantization()
        # Of V4, transformers reads the experts' type in the scheme and servers read it beside it.
        beside = {key: scheme[key] for key in ("expert_dtype",) if key in scheme}
        return {"quantization_config": scheme, **beside}

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
        return dict(zip(self.parts(name), narrow(x, table_of(self.model).SCALES), strict=True))

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
        if table_of(self.model).SCALES != "float32":
            mantissa, exponent = torch.frexp(scale)
            scale = torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int())
        scale = _over_blocks(scale, x.shape)
        step = half_step(x.double() / scale, bits=4, smallest_exponent=-6)
        return step * scale + x.abs() * ARITHMETIC_SLACK + VANISHING

    @property
    def _kept(self) -> Bf16:
        """How this variant stores what it does not quantise."""
        return Bf16(self.model)

    def _is_quantised(self, name: str) -> bool:
        return narrowest(self.model, name) == "float8"


def _over_blocks(grid: Tensor, shape: torch.Size) -> Tensor:
    """One value per block, repeated over the block's elements, cut to `shape`."""
    rows, columns = shape
    return grid.repeat_interleave(TILE, 0)[:rows].repeat_interleave(TILE, 1)[:, :columns]

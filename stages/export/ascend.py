"""Variants for Ascend NPUs (910B, 910C): bfloat16, and INT8 as ModelSlim describes it.

Neither chip computes in FP8, so nothing here holds any. `w8a8` is the W8A8_DYNAMIC scheme: int8
weight [R, C], `weight_scale` float32 [R, 1] = absmax / 127 of each row, `weight_offset` zeros; the
server scales activations per token as they come, so no calibration text is needed.

Quantised is what ModelSlim's recipe for the family quantises, out of what the released models hold
in FP8. Float stay, beside embeddings, head, norms and routers:

| family | also float | why |
|---|---|---|
| V3, V3.2 | `kv_b_proj` | vllm-ascend folds it into the attention operator |
| V3.2 | the indexer | the recipe leaves it out: it decides which tokens are seen |
| V4 | `wo_a`, `wo_b` and compressors | the recipe leaves them out |
| all | the MTP layer | vllm-ascend's loader takes it to be unquantised |

The recipes rotate and smooth weights first, which needs calibration; nothing here does.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from configs.model import ModelConfig, V4Config
from model.weights.config import table_of
from model.weights.families import narrowest
from stages.export.formats import (
    ARITHMETIC_SLACK,
    INDEX,
    VANISHING,
    Bf16,
    Read,
)

DESCRIPTION = "quant_model_description.json"
INT8_MAX = 127
_FLOAT = frozenset({"kv_b_proj", "wo_a", "wo_b"})
"""Modules that the released models quantise and ModelSlim's recipes do not."""


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Linear weights of the layers before the MTP layer in int8; the rest as in `Bf16`."""

    model: ModelConfig
    variant: str = "w8a8"
    stem: str = "quant_model_weights"
    index_names: tuple[str, ...] = (INDEX, "quant_model_weights.safetensors.index.json")
    """ModelSlim's documents disagree on the name; vLLM's loader reads the first."""

    @property
    def config_entries(self) -> Mapping[str, Any]:
        """Nothing: with a `quantization_config` the server would not look for the description."""
        return {}

    def side_files(self, names: Sequence[str]) -> Mapping[str, Any]:
        """The description by which vllm-ascend knows the scheme.

        One row for each stored tensor, all tensors of one Linear alike, then the global rows.
        """
        rows: dict[str, Any] = {}
        for name in names:
            kind = "W8A8_DYNAMIC" if self._is_quantised(name) else "FLOAT"
            rows |= dict.fromkeys(self.parts(name), kind)
        rows |= {
            "model_quant_type": "W8A8_DYNAMIC",
            "version": "1.0.0",
            "group_size": 0,
            "metadata": {},
            "optional": {},
        }
        return {DESCRIPTION: rows}

    def parts(self, name: str) -> tuple[str, ...]:
        """A Linear weight, its scale and its offset, or the tensor itself."""
        if not self._is_quantised(name):
            return self._kept.parts(name)
        return (name, f"{name}_scale", f"{name}_offset")

    def encode(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """Symmetric per row; a row that vanishes gives zeros and scale 1."""
        if not self._is_quantised(name):
            return self._kept.encode(name, x)
        scale = x.abs().amax(1, keepdim=True) / INT8_MAX
        scale = torch.where(scale < 2.0**-126, torch.ones_like(scale), scale)
        weight = (x / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
        values = (weight, scale, torch.zeros_like(scale))
        return dict(zip(self.parts(name), values, strict=True))

    def decode(self, name: str, read: Read) -> Tensor:
        """(weight - offset) * scale."""
        if not self._is_quantised(name):
            return self._kept.decode(name, read)
        weight, scale, offset = (read(part) for part in self.parts(name))
        return (weight.float() - offset) * scale

    def error_bound(self, name: str, x: Tensor) -> Float[Tensor, "..."]:
        """Half of each row's absmax / 127."""
        if not self._is_quantised(name):
            return self._kept.error_bound(name, x)
        largest = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)).double()
        return 0.5 * largest / INT8_MAX + x.abs() * ARITHMETIC_SLACK + VANISHING

    @property
    def _kept(self) -> Bf16:
        """How this variant stores what it does not quantise."""
        return Bf16(self.model)

    def _is_quantised(self, name: str) -> bool:
        if narrowest(self.model, name) != "float8":
            return False
        *path, module, _ = name.split(".")
        if "indexer" in path and not isinstance(self.model, V4Config):
            return False
        is_mtp = name.startswith(table_of(self.model).mtp_prefix(self.model))
        return module not in _FLOAT and not is_mtp

"""Variants for Ascend NPUs (910B, 910C): bfloat16, and INT8 as ModelSlim describes it.

Neither chip computes in FP8, so nothing here holds any. `w8a8` is the W8A8_DYNAMIC scheme: int8
weight [R, C], `weight_scale` float32 [R, 1] = absmax / 127 of each row, `weight_offset` zeros; the
server scales activations per token as they come, so no calibration text is needed. The key-value
up-projection stays float because vllm-ascend folds it into the attention operator, and so does the
whole MTP layer, which its loader takes to be unquantised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from stages.export.formats import (
    ARITHMETIC_SLACK,
    INDEX,
    KEPT_AS,
    LINEARS,
    VANISHING,
    Read,
    parse,
)

DESCRIPTION = "quant_model_description.json"
INT8_MAX = 127
QUANTISED = LINEARS - {"kv_b_proj"}


@dataclass(frozen=True, slots=True)
class Int8Rows:
    """Linear weights of the layers below `num_hidden_layers` in int8; the rest as in `Bf16`."""

    num_hidden_layers: int
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
            return KEPT_AS.parts(name)
        return (name, f"{name}_scale", f"{name}_offset")

    def encode(self, name: str, x: Float[Tensor, "..."]) -> dict[str, Tensor]:
        """Symmetric per row; a row that vanishes gives zeros and scale 1."""
        if not self._is_quantised(name):
            return KEPT_AS.encode(name, x)
        scale = x.abs().amax(1, keepdim=True) / INT8_MAX
        scale = torch.where(scale < 2.0**-126, torch.ones_like(scale), scale)
        weight = (x / scale).round().clamp(-INT8_MAX, INT8_MAX).to(torch.int8)
        values = (weight, scale, torch.zeros_like(scale))
        return dict(zip(self.parts(name), values, strict=True))

    def decode(self, name: str, read: Read) -> Float[Tensor, "..."]:
        """(weight - offset) * scale."""
        if not self._is_quantised(name):
            return KEPT_AS.decode(name, read)
        weight, scale, offset = (read(part) for part in self.parts(name))
        return (weight.float() - offset) * scale

    def error_bound(self, name: str, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Half of each row's absmax / 127."""
        if not self._is_quantised(name):
            return KEPT_AS.error_bound(name, x)
        largest = torch.maximum(x.amax(1, keepdim=True), -x.amin(1, keepdim=True)).double()
        return 0.5 * largest / INT8_MAX + x.abs() * ARITHMETIC_SLACK + VANISHING

    def _is_quantised(self, name: str) -> bool:
        tensor = parse(name)
        below = tensor.layer is not None and tensor.layer < self.num_hidden_layers
        return below and tensor.module in QUANTISED

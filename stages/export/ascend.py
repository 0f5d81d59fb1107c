"""Variants for Ascend NPUs (910B, 910C): bfloat16, and integers as ModelSlim describes them.

Neither chip computes in FP8, so nothing here holds any. Quantised is what ModelSlim's recipe for
the family quantises, out of what the released models hold in FP8:

| variant | V3, V3.2: attention's projections | experts | all else |
|---|---|---|---|
| `w8a8` | W8A8, by calibration | W8A8_DYNAMIC | W8A8_DYNAMIC |
| `w4a8` | W8A8, by calibration | W4A8_DYNAMIC | W8A8_DYNAMIC |

Without calibration attention is W8A8_DYNAMIC too, as it is in V4 always. Float stay, beside
embeddings, head, norms and routers:

| family | also float | why |
|---|---|---|
| V3, V3.2 | `kv_b_proj` | vllm-ascend folds it into the attention operator |
| V3.2 | the indexer | the recipe leaves it out: it decides which tokens are seen |
| V4 | `wo_a`, `wo_b` and compressors | the recipe leaves them out |
| all | the MTP layer | vllm-ascend's loader takes it to be unquantised |

`stages/export/schemes.py` says what each scheme stores.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float
from torch import Tensor

from configs.delivery import Variant
from configs.model import ModelConfig, V4Config
from model.weights.config import table_of
from model.weights.families import narrowest
from stages.export.formats import INDEX, Bf16, Read
from stages.export.layouts import CHUNKS
from stages.export.schemes import Dynamic4, Dynamic8, Scheme, Static8

DESCRIPTION = "quant_model_description.json"
KINDS = ("FLOAT", "W8A8_DYNAMIC", "W8A8", "W4A8_DYNAMIC")
"""Of tensors. The last one that a model has is what the model is said to be."""
_FLOAT = frozenset({"kv_b_proj", "wo_a", "wo_b"})
"""Modules that the released models quantise and ModelSlim's recipes do not."""
_STATIC = frozenset({"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"})
"""Modules of attention whose activations ModelSlim's recipes calibrate."""
_DOWN = frozenset({"down_proj", "w2"})


@dataclass(frozen=True, slots=True)
class Integers:
    """Linear weights of the layers before the MTP layer in integers; the rest as in `Bf16`."""

    model: ModelConfig
    variant: Variant = "w8a8"
    ranges: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Of weights by their released names: between what their inputs were seen to lie."""
    mindie: bool = False
    """Whether the config has MindIE's keys too."""
    stem: str = "quant_model_weights"
    index_names: tuple[str, ...] = (INDEX, "quant_model_weights.safetensors.index.json")
    """ModelSlim's documents disagree on the name; vLLM's loader reads the first."""

    @property
    def config_entries(self) -> Mapping[str, Any]:
        """No `quantization_config`, with which the server would not look for the description."""
        if not self.mindie:
            return {}
        attention = "w8a8" if self.ranges else "w8a8_dynamic"
        return {"quantize": f"{self.variant}_dynamic", "mla_quantize": attention}

    def side_files(self, names: Sequence[str]) -> Mapping[str, Any]:
        """The description by which vllm-ascend knows the schemes.

        One row for each stored tensor, all tensors of one Linear alike, then the global rows.
        """
        rows: dict[str, Any] = {}
        for name in names:
            rows |= dict.fromkeys(self.parts(name), self.kind(name))
        rows |= {
            "model_quant_type": max(rows.values(), key=KINDS.index),
            "version": "1.0.0",
            "group_size": 0,
            "metadata": {},
            "optional": {},
        }
        return {DESCRIPTION: rows}

    def kind(self, name: str) -> str:
        """What the description says of the source tensor `name`."""
        scheme = self.scheme(name)
        return "FLOAT" if scheme is None else scheme.kind

    def parts(self, name: str) -> tuple[str, ...]:
        """A Linear weight and what its scheme puts beside it, or the tensor itself."""
        scheme = self.scheme(name)
        if scheme is None:
            return self._kept.parts(name)
        stem = name.removesuffix("weight")
        return (name, *(f"{stem}{leaf}" for leaf in scheme.beside))

    def encode(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """As the scheme says."""
        scheme = self.scheme(name)
        if scheme is None:
            return self._kept.encode(name, x)
        return dict(zip(self.parts(name), scheme.encode(x), strict=True))

    def decode(self, name: str, read: Read) -> Tensor:
        """As the scheme says."""
        scheme = self.scheme(name)
        if scheme is None:
            return self._kept.decode(name, read)
        return scheme.decode([read(part) for part in self.parts(name)])

    def error_bound(self, name: str, x: Tensor) -> Float[Tensor, "..."]:
        """As the scheme says."""
        scheme = self.scheme(name)
        return self._kept.error_bound(name, x) if scheme is None else scheme.error_bound(x)

    def scheme(self, name: str) -> Scheme | None:
        """How the source tensor `name` is quantised; none if it is not."""
        if narrowest(self.model, name) != "float8":
            return None
        *path, module, _ = name.split(".")
        if "indexer" in path and not isinstance(self.model, V4Config):
            return None
        is_mtp = name.startswith(table_of(self.model).mtp_prefix(self.model))
        if module in _FLOAT or is_mtp:
            return None
        if name in self.ranges:
            return Static8(*self.ranges[name])
        if self.variant == "w4a8" and "experts" in path:
            return Dynamic4(CHUNKS if module in _DOWN else 1)
        return Dynamic8()

    def calibrated(self, names: Sequence[str]) -> tuple[str, ...]:
        """Of the source tensors `names`, the weights whose activations are to be measured."""
        if isinstance(self.model, V4Config):
            return ()
        return tuple(
            name
            for name in names
            if name.split(".")[-2] in _STATIC and self.scheme(name) is not None
        )

    @property
    def _kept(self) -> Bf16:
        """How these variants store what they do not quantise."""
        return Bf16(self.model)

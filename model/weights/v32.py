"""DeepSeek-V3.2: V3 and its lightning indexer, whose tensors bear the same names on both sides.

They are `model.layers.{n}.self_attn.indexer.{wq_b,wk,weights_proj}.weight` and
`...indexer.k_norm.{weight,bias}`.
"""

from collections.abc import Mapping
from typing import Any

from configs.model import ModelConfig, V32Config
from model.weights import v3
from model.weights.fields import agreed, build, require
from model.weights.table import Narrowest, ScaleType

MODEL_TYPE = "deepseek_v32"
SCALES: ScaleType = "powers"
_ARCHITECTURE = "DeepseekV32ForCausalLM"
_COPIED = ("index_n_heads", "index_head_dim", "index_topk")
_LAYER_TYPE = "indexed_attention"

FUSED = v3.FUSED

parts = v3.parts
copies = v3.copies
mtp_prefix = v3.mtp_prefix
scale_name = v3.scale_name


def narrowest(name: str) -> Narrowest:
    """As in V3; of the indexer, its two projections of queries and keys are quantised as well."""
    module = name.split(".")[-2]
    quantised = ".indexer." in name and module in ("wq_b", "wk")
    return "float8" if quantised else v3.narrowest(name)


def quantization() -> dict[str, Any]:
    """`quantization_config` of the released model: as V3's, with scales that are powers of two."""
    return v3.quantization() | {"scale_fmt": "ue8m0"}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a float32 folder."""
    assert isinstance(config, V32Config)
    dense = config.first_k_dense_replace
    return v3.to_hf_config(config) | {
        "architectures": [_ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "layer_types": [_LAYER_TYPE] * config.depth,
        "mlp_layer_types": ["dense"] * dense + ["sparse"] * (config.depth - dense),
        **{name: getattr(config, name) for name in _COPIED},
    }


def from_hf_config(raw: Mapping[str, Any]) -> V32Config:
    """The reverse; ArtifactError names the field that this family does not have."""
    fields = v3.common_fields(raw) | require(raw, _COPIED)
    config = build(V32Config, fields | {"family": "v32"})
    written = to_hf_config(config)
    for name in ("layer_types", "mlp_layer_types"):
        agreed({name: raw.get(name), f"{name} by first_k_dense_replace": written[name]})
    return config

"""DeepSeek-V3: Ingot's tensors and configuration <-> Hugging Face's.

Ingot's module names are the released ones. Three things differ, and only these:

| Ingot | Hugging Face |
|---|---|
| `...mlp.experts.gate_up_proj` [E, 2I, D] | `...mlp.experts.{e}.{gate,up}_proj.weight` [I, D] |
| `...mlp.experts.down_proj` [E, D, I] | `...mlp.experts.{e}.down_proj.weight` [D, I] |
| (shared with the main model) | MTP layer N: `embed_tokens.weight`, `shared_head.head.weight` |
"""

from collections.abc import Mapping
from typing import Any

from configs.model import ModelConfig, V3Config
from configs.shape import FP8_BLOCK
from model.weights.fields import (
    agreed,
    agreed_yarn,
    build,
    check_fixed,
    check_flat,
    read_base,
    read_table,
    require,
    write_engram,
    write_yarn,
)
from model.weights.table import (
    ENGRAM,
    ENGRAM_INTEGERS,
    EXPERTS,
    ROUTING_BIAS,
    ExpertNames,
    Narrowest,
    Part,
    ScaleType,
    expert_parts,
)

MODEL_TYPE = "deepseek_v3"
SCALES: ScaleType = "float32"
ARCHITECTURE = "DeepseekV3ForCausalLM"
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
LINEARS = frozenset(
    {
        *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
)
"""Modules whose weights the released files quantise (arXiv 2412.19437, section 3.3.1)."""
FUSED: tuple[tuple[str, ...], ...] = (
    ("q_a_proj", "kv_a_proj_with_mqa"),
    ("gate_proj", "up_proj"),
)
"""Modules that vLLM and SGLang load into one matrix, first rows first."""
COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "first_k_dense_replace",
    "num_attention_heads",
    "q_lora_rank",
    "kv_lora_rank",
    "qk_nope_head_dim",
    "qk_rope_head_dim",
    "v_head_dim",
    "intermediate_size",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "n_group",
    "topk_group",
    "routed_scaling_factor",
    "norm_topk_prob",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
)
"""Fields that have one name and one meaning on both sides."""
FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
"""Fields in which this family has no choice; another value would be another model."""
DEFAULT_THETA = 10000.0
"""What the released code and transformers take where a config has no `rope_theta`."""


def parts(config: ModelConfig, name: str) -> tuple[Part, ...]:
    """Where the Ingot tensor `name` lies on disk; the parts cover it."""
    prefix, found, leaf = name.partition(EXPERTS)
    if not found:
        return (Part(name),)
    names = ExpertNames((f"{prefix}{EXPERTS}",), gate="gate_proj", up="up_proj", down="down_proj")
    return expert_parts(config, leaf, names)


def copies(config: ModelConfig) -> dict[str, str]:
    """Released names of the MTP layer's copies -> the tensor that each repeats."""
    if not config.num_nextn_predict_layers:
        return {}
    prefix = mtp_prefix(config)
    return {f"{prefix}embed_tokens.weight": EMBEDDING, f"{prefix}shared_head.head.weight": HEAD}


def mtp_prefix(config: ModelConfig) -> str:
    """The MTP layer is the one after the last."""
    return f"model.layers.{config.num_hidden_layers}."


def narrowest(name: str) -> Narrowest:
    """The narrowest type in which the stored tensor `name` may be written."""
    _, _, remembered = name.partition(f".{ENGRAM}")
    if remembered:
        return "int64" if remembered in ENGRAM_INTEGERS else "bfloat16"
    if name.endswith(ROUTING_BIAS):
        return "float32"
    return "float8" if name.split(".")[-2] in LINEARS else "bfloat16"


def scale_name(name: str) -> str:
    """The stored name of the scales of a quantised tensor."""
    return f"{name}_scale_inv"


def quantization() -> dict[str, Any]:
    """`quantization_config` of the released models."""
    return {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
    }


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a float32 folder, for transformers 5 and for what reads released files."""
    assert isinstance(config, V3Config)
    rope: dict[str, Any] = {"rope_theta": config.rope_theta, "rope_type": "default"}
    scaling: dict[str, Any] = {}
    if config.rope_scaling is not None:
        stretched = write_yarn(config.rope_scaling, scales_magnitudes=True)
        rope |= {name: value for name, value in stretched.items() if name != "type"}
        scaling = {"rope_scaling": stretched}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "dtype": "float32",
        "head_dim": config.qk_rope_head_dim,
        "num_key_value_heads": config.num_attention_heads,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "qk_head_dim": config.qk_head_dim,
        "rope_parameters": rope,
        "rope_theta": config.rope_theta,
        "use_cache": True,
        **scaling,
        **write_engram(config),
        **FIXED,
        **{name: getattr(config, name) for name in COPIED},
    }


def from_hf_config(raw: Mapping[str, Any]) -> V3Config:
    """The reverse; ArtifactError names the field that this family does not have."""
    return build(V3Config, common_fields(raw))


def common_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The fields that V3 and V3.2 share."""
    check_fixed(raw, FIXED)
    fields = require(raw, COPIED)
    agreed(
        {
            "num_attention_heads": raw["num_attention_heads"],
            "num_key_value_heads": raw.get("num_key_value_heads"),
        }
    )
    rotary = {name: read_table(raw, name) for name in ("rope_scaling", "rope_parameters")}
    for where, table in rotary.items():
        check_flat(table, where, known=())
    for table in (raw, *rotary.values()):
        if table.get("partial_rotary_factor") is not None:
            check_fixed(table, {"partial_rotary_factor": 1})
    theta = read_base(raw, "rope_theta")
    original = raw.get("original_max_position_embeddings") or raw["max_position_embeddings"]
    yarn = agreed_yarn(raw, rotary, original=original, scales_magnitudes=True)
    return fields | {
        "num_nextn_predict_layers": raw.get("num_nextn_predict_layers") or 0,
        "rope_theta": DEFAULT_THETA if theta is None else theta,
        "rope_scaling": yarn,
        "engram": raw.get("engram"),
    }

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

import torch
from pydantic import ValidationError
from torch import Tensor

from configs.errors import ArtifactError
from configs.model import V3Config

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
_ARCHITECTURE = "DeepseekV3ForCausalLM"
_MODEL_TYPE = "deepseek_v3"
_COPIED = (
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
    "num_nextn_predict_layers",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
)
"""Fields that have one name and one meaning on both sides."""
_FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "moe_layer_freq": 1,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
"""Fields in which this family has no choice; another value would be another model."""


def mtp_copies(config: V3Config) -> dict[str, str]:
    """Released names of the MTP layer's copies -> the tensor that each repeats."""
    if not config.num_nextn_predict_layers:
        return {}
    prefix = f"model.layers.{config.num_hidden_layers}"
    return {f"{prefix}.embed_tokens.weight": EMBEDDING, f"{prefix}.shared_head.head.weight": HEAD}


def to_hf(config: V3Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a whole model's state; tensors are views of the originals where possible."""
    renamed: dict[str, Tensor] = {}
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            renamed[name] = tensor
            continue
        for expert, weight in enumerate(tensor):
            if leaf == "gate_up_proj":
                gate, up = weight.chunk(2)
                renamed[f"{prefix}.{expert}.gate_proj.weight"] = gate
                renamed[f"{prefix}.{expert}.up_proj.weight"] = up
            else:
                renamed[f"{prefix}.{expert}.{leaf}.weight"] = weight
    for copy, original in mtp_copies(config).items():
        renamed[copy] = renamed[original]
    return renamed


def from_hf(config: V3Config, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_hf`; ArtifactError names a tensor that is missing or unexpected."""
    state = dict(state)
    result: dict[str, Tensor] = {}
    for copy, original in mtp_copies(config).items():
        repeated = state.pop(copy, None)
        if repeated is not None and not torch.equal(repeated, _find(state, original)):
            raise ArtifactError(
                f"{copy} differs from {original}, but this family shares them; "
                "the checkpoint is not one that can be represented"
            )
    wide = config.moe_intermediate_size, config.hidden_size
    for index in range(config.first_k_dense_replace, _layers(config)):
        prefix = f"model.layers.{index}.mlp.experts"
        gate_up, down = [], []
        for expert in range(config.n_routed_experts):
            name = f"{prefix}.{expert}.{{}}_proj.weight"
            halves = [_take(state, name.format(leaf), wide) for leaf in ("gate", "up")]
            gate_up.append(torch.cat(halves))
            down.append(_take(state, name.format("down"), wide[::-1]))
        result[f"{prefix}.gate_up_proj"] = torch.stack(gate_up)
        result[f"{prefix}.down_proj"] = torch.stack(down)
    return result | state


def to_hf_config(config: V3Config) -> dict[str, Any]:
    """`config.json` as transformers 5 writes it for a float32 model."""
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": _MODEL_TYPE,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 1,
        "dtype": "float32",
        "head_dim": config.qk_rope_head_dim,
        "num_key_value_heads": config.num_attention_heads,
        "qk_head_dim": config.qk_head_dim,
        "rope_parameters": {"rope_theta": config.rope_theta, "rope_type": "default"},
        "rope_theta": config.rope_theta,
        "use_cache": True,
        **_FIXED,
        **{name: getattr(config, name) for name in _COPIED},
    }


def from_hf_config(raw: Mapping[str, Any]) -> V3Config:
    """The reverse; ArtifactError names the field that this family does not have."""
    if raw.get("model_type") != _MODEL_TYPE:
        raise ArtifactError(
            f"config.json: model_type = {raw.get('model_type')!r}, expected {_MODEL_TYPE!r}"
        )
    for name, value in _FIXED.items():
        if raw.get(name, value) != value:
            raise ArtifactError(f"config.json: {name} = {raw[name]!r}, but only {value!r} is read")
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ArtifactError(f"config.json: rope_type = {kind!r}, but only 'default' is read")
    missing = [name for name in _COPIED if name not in raw]
    if missing:
        raise ArtifactError(f"config.json: {missing[0]} is missing")
    theta = rope.get("rope_theta", raw.get("rope_theta", 10000.0))
    try:
        return V3Config(rope_theta=theta, **{name: raw[name] for name in _COPIED})
    except ValidationError as error:
        raise ArtifactError(f"config.json: {error.errors()[0]['msg']}") from error


def _layers(config: V3Config) -> int:
    return config.num_hidden_layers + config.num_nextn_predict_layers


def _find(state: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in state:
        raise ArtifactError(f"{name} is missing from the checkpoint")
    return state[name]


def _take(state: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Remove a tensor of an expert from `state`."""
    tensor = _find(state, name)
    if tuple(tensor.shape) != shape:
        raise ArtifactError(
            f"{name} has shape {list(tensor.shape)} in the checkpoint, {list(shape)} in the model"
        )
    return state.pop(name)

"""DeepSeek-V4: Ingot's configuration <-> `config.json`, as released and as transformers writes it.

| Ingot | released | transformers 5 |
|---|---|---|
| `compress_ratios` | `compress_ratios`, with a 0 for the MTP layer | `layer_types` |
| `csa_ratio`, `hca_ratio` | always 4 and 128 | `compress_rates` |
| `num_hash_layers` | `num_hash_layers` | `mlp_layer_types` |
| `qk_rope_head_dim` | `qk_rope_head_dim` | `partial_rotary_factor` of `head_dim` |
| `rope_theta` | `rope_theta` | `rope_parameters.main` |
| `compress_rope_theta`, `rope_scaling` | the same | `rope_parameters.compress` |

Both are written; where both are read, they must agree.
"""

import math
from collections.abc import Mapping
from typing import Any

from configs.errors import ArtifactError
from configs.model import ModelConfig, V4Config
from model.weights.fields import (
    agreed,
    agreed_yarn,
    build,
    check_fixed,
    read_table,
    require,
    write_engram,
    write_yarn,
)

MODEL_TYPE = "deepseek_v4"
_ARCHITECTURE = "DeepseekV4ForCausalLM"
_COPIED = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "head_dim",
    "q_lora_rank",
    "o_groups",
    "o_lora_rank",
    "sliding_window",
    "index_n_heads",
    "index_head_dim",
    "index_topk",
    "moe_intermediate_size",
    "n_routed_experts",
    "n_shared_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "routed_scaling_factor",
    "swiglu_limit",
    "hc_mult",
    "hc_sinkhorn_iters",
    "hc_eps",
    "max_position_embeddings",
    "rms_norm_eps",
    "initializer_range",
)
"""Fields that have one name and one meaning on both sides."""
_FIXED = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
    "num_key_value_heads": 1,
    "scoring_func": "sqrtsoftplus",
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
}
_WINDOW, _CSA, _HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
_RELEASED_RATIOS = {_CSA: 4, _HCA: 128}


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` of a float32 folder: the released fields, and transformers' beside them."""
    assert isinstance(config, V4Config)
    window_only = [0] * config.num_nextn_predict_layers
    share = _share(config)
    plain = {"partial_rotary_factor": share, "rope_type": "default"}
    main = plain | {"rope_theta": config.rope_theta}
    compress = plain | {"rope_theta": config.compress_rope_theta}
    scaling: dict[str, Any] = {}
    if config.rope_scaling is not None:
        stretched = write_yarn(config.rope_scaling, scales_magnitudes=False)
        scaling = {"rope_scaling": stretched}
        compress |= {name: value for name, value in stretched.items() if name != "type"}
        compress |= {"attention_factor": 1.0}
    hashed = config.num_hash_layers
    return {
        "architectures": [_ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "float32",
        "compress_rates": {_CSA: config.csa_ratio, _HCA: config.hca_ratio},
        "compress_ratios": [*config.compress_ratios, *window_only],
        "compress_rope_theta": config.compress_rope_theta,
        "layer_types": [_layer_type(config, layer) for layer in range(config.depth)],
        "mlp_layer_types": ["hash_moe"] * hashed + ["moe"] * (config.depth - hashed),
        "num_hash_layers": hashed,
        "num_nextn_predict_layers": config.num_nextn_predict_layers,
        "partial_rotary_factor": share,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "rope_parameters": {"main": main, "compress": compress},
        "rope_theta": config.rope_theta,
        "use_cache": True,
        **scaling,
        **write_engram(config),
        **_FIXED,
        **{name: getattr(config, name) for name in _COPIED},
    }


def from_hf_config(raw: Mapping[str, Any]) -> V4Config:
    """The reverse, of released files and of transformers'; ArtifactError names the field."""
    check_fixed(raw, _FIXED)
    fields = require(raw, _COPIED) | _rope(raw) | _ratios(raw)
    fields["num_hash_layers"] = _hash_layers(raw)
    fields["num_nextn_predict_layers"] = raw.get("num_nextn_predict_layers") or 0
    fields["engram"] = raw.get("engram")
    return build(V4Config, fields | {"family": "v4"})


def _layer_type(config: V4Config, layer: int) -> str:
    return {"window": _WINDOW, "csa": _CSA, "hca": _HCA}[config.attention_kind(layer)]


def _share(config: V4Config) -> float:
    """The rotating share of a head, such that transformers' rounding down gives its width back."""
    share = config.qk_rope_head_dim / config.head_dim
    return (
        share
        if int(config.head_dim * share) == config.qk_rope_head_dim
        else math.nextafter(share, 1.0)
    )


def _rope(raw: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary width, both bases, and the stretching of the compressing layers."""
    nested = read_table(raw, "rope_parameters")
    main, compress = read_table(nested, "main"), read_table(nested, "compress")
    theta = agreed(
        {"rope_theta": raw.get("rope_theta"), "rope_parameters.main": main.get("rope_theta")}
    )
    compressed = agreed(
        {
            "compress_rope_theta": raw.get("compress_rope_theta"),
            "rope_parameters.compress": compress.get("rope_theta"),
        }
    )
    if main.get("rope_type", "default") != "default":
        raise ArtifactError(
            f"config.json: rope_parameters.main.rope_type = {main['rope_type']!r}, but window "
            "layers are never stretched; only 'default' is read"
        )
    fields = {"rope_theta": theta, "compress_rope_theta": compressed}
    if missing := [name for name, value in fields.items() if value is None]:
        raise ArtifactError(f"config.json: {missing[0]} is missing")
    positions = require(raw, ["max_position_embeddings"])["max_position_embeddings"]
    stretching = {
        "rope_scaling": read_table(raw, "rope_scaling"),
        "rope_parameters.compress": compress,
        "rope_parameters": nested,
    }
    return fields | {
        "qk_rope_head_dim": _rotary_width(raw),
        "rope_scaling": agreed_yarn(stretching, positions, scales_magnitudes=False),
    }


def _rotary_width(raw: Mapping[str, Any]) -> Any:
    share, head = raw.get("partial_rotary_factor"), raw["head_dim"]
    by_share = None
    if isinstance(share, int | float) and isinstance(head, int):
        by_share = int(head * share)
    width = agreed(
        {
            "qk_rope_head_dim": raw.get("qk_rope_head_dim"),
            f"partial_rotary_factor * head_dim = {share} * {head}": by_share,
        }
    )
    if width is None:
        raise ArtifactError("config.json: qk_rope_head_dim is missing")
    return width


def _ratios(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`compress_ratios` without the MTP layer's, and which ratio is of which kind."""
    rates = read_table(raw, "compress_rates") or _RELEASED_RATIOS
    rates = {
        kind: agreed({"compress_rates": rates.get(kind), short: raw.get(short)})
        for kind, short in ((_CSA, "compress_rate_csa"), (_HCA, "compress_rate_hca"))
    }
    by_type = {_WINDOW: 0, **rates}
    listed = kinds = None
    if (ratios := raw.get("compress_ratios")) is not None:
        listed = _without_mtp(ratios, raw)
    if (types := raw.get("layer_types")) is not None:
        if unknown := [kind for kind in types if kind not in by_type]:
            raise ArtifactError(
                f"config.json: layer_types holds {unknown[0]!r}; known: {', '.join(by_type)}"
            )
        kinds = [by_type[kind] for kind in types]
    found = agreed({"compress_ratios": listed, "layer_types with compress_rates": kinds})
    if found is None:
        raise ArtifactError("config.json: compress_ratios is missing")
    return {"compress_ratios": tuple(found), "csa_ratio": rates[_CSA], "hca_ratio": rates[_HCA]}


def _without_mtp(ratios: Any, raw: Mapping[str, Any]) -> list[Any]:
    """Released lists end with a 0 for each MTP layer."""
    layers, mtp = raw["num_hidden_layers"], raw.get("num_nextn_predict_layers") or 0
    if not isinstance(ratios, list) or len(ratios) not in (layers, layers + mtp):
        count = len(ratios) if isinstance(ratios, list) else repr(ratios)
        raise ArtifactError(
            f"config.json: compress_ratios has {count} entries, but num_hidden_layers = {layers} "
            f"and num_nextn_predict_layers = {mtp}; give one for each layer"
        )
    if any(ratios[layers:]):
        raise ArtifactError(
            f"config.json: compress_ratios ends with {ratios[-1]!r} for the MTP layer, which has "
            "a window only; expected 0"
        )
    return ratios[:layers]


def _hash_layers(raw: Mapping[str, Any]) -> Any:
    by_type, types = None, raw.get("mlp_layer_types")
    if types is not None:
        by_type = list(types).count("hash_moe")
        expected = ["hash_moe"] * by_type + ["moe"] * (len(types) - by_type)
        agreed({"mlp_layer_types": list(types), "its hash layers first": expected})
    counted = agreed({"num_hash_layers": raw.get("num_hash_layers"), "mlp_layer_types": by_type})
    if counted is None:
        raise ArtifactError("config.json: num_hash_layers is missing")
    return counted

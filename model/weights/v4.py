"""DeepSeek-V4: Ingot's tensors and configuration <-> the released ones.

Ingot's module names are those of transformers; the released files have names of their own, which
this writes and transformers reads. transformers itself writes the released names but for a few,
which are read as aliases: it puts `model.` in front, keeps `embed_tokens` and `hc_head.hc_*`, and
calls the norm of keys `attn.norm`.

The MTP layer is `model.layers.{N}` in Ingot, with N the number of layers, and `mtp.0` on disk.
`tid2eid` is int32 on disk and int64 in Ingot.
"""

import math
from collections.abc import Mapping
from typing import Any

from configs.errors import ArtifactError
from configs.model import ModelConfig, V4Config
from model.weights import v3
from model.weights.fields import (
    agreed,
    build,
    check_fixed,
    read_table,
    read_yarn,
    require,
    write_engram,
    write_yarn,
)
from model.weights.table import ENGRAM, ExpertNames, Narrowest, Part, ScaleType, expert_parts

MODEL_TYPE = "deepseek_v4"
SCALES: ScaleType = "e8m0"
_ARCHITECTURE = "DeepseekV4ForCausalLM"
_MTP = "mtp.0."

_OUTER = {
    "model.embed_tokens.weight": Part("embed.weight", aliases=("model.embed_tokens.weight",)),
    "model.norm.weight": Part("norm.weight", aliases=("model.norm.weight",)),
    "lm_head.weight": Part("head.weight"),
}
"""Tensors outside the layers."""
_HEAD = {f"hc_head.hc_{leaf}": f"hc_head_{leaf}" for leaf in ("fn", "base", "scale")}
"""Mixing of the streams in front of a final norm: the main model's and the MTP layer's."""
_LAYER = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "self_attn.sinks": "attn.attn_sink",
    "self_attn.q_a_proj.weight": "attn.wq_a.weight",
    "self_attn.q_a_norm.weight": "attn.q_norm.weight",
    "self_attn.q_b_proj.weight": "attn.wq_b.weight",
    "self_attn.kv_proj.weight": "attn.wkv.weight",
    "self_attn.kv_norm.weight": "attn.kv_norm.weight",
    "self_attn.o_a_proj.weight": "attn.wo_a.weight",
    "self_attn.o_b_proj.weight": "attn.wo_b.weight",
    "self_attn.compressor.indexer.q_b_proj.weight": "attn.indexer.wq_b.weight",
    "self_attn.compressor.indexer.scorer.weights_proj.weight": "attn.indexer.weights_proj.weight",
    "mlp.gate.weight": "ffn.gate.weight",
    "mlp.gate.e_score_correction_bias": "ffn.gate.bias",
    "mlp.gate.tid2eid": "ffn.gate.tid2eid",
    "mlp.shared_experts.gate_proj.weight": "ffn.shared_experts.w1.weight",
    "mlp.shared_experts.down_proj.weight": "ffn.shared_experts.w2.weight",
    "mlp.shared_experts.up_proj.weight": "ffn.shared_experts.w3.weight",
    **{
        f"{block}_hc.{leaf}": f"hc_{block}_{leaf}"
        for block in ("attn", "ffn")
        for leaf in ("fn", "base", "scale")
    },
    **{
        f"{ours}.{one}": f"{released}.{other}"
        for ours, released in (
            ("self_attn.compressor", "attn.compressor"),
            ("self_attn.compressor.indexer", "attn.indexer.compressor"),
        )
        for one, other in (
            ("kv_proj.weight", "wkv.weight"),
            ("gate_proj.weight", "wgate.weight"),
            ("position_bias", "ape"),
            ("kv_norm.weight", "norm.weight"),
        )
    },
    **{
        f"{name}.weight": f"{name}.weight"
        for name in ("e_proj", "h_proj", "enorm", "hnorm", "norm")
    },
    **_HEAD,
}
"""Tensors of a layer, in Ingot and on disk, without what says which layer. The last two lines are
the MTP layer's own."""
_ALIASES = {"attn.kv_norm.weight": "attn.norm.weight"}

_FLOAT32 = frozenset({"attn_sink", "ape", "bias"})
_LINEARS = frozenset({"wq_a", "wq_b", "wkv", "wo_a", "wo_b", "w1", "w2", "w3", "e_proj", "h_proj"})
"""Modules whose weights the released files quantise, unless a compressor holds them."""

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


def parts(config: ModelConfig, name: str) -> tuple[Part, ...]:
    """Where the Ingot tensor `name` lies on disk; the parts cover it."""
    if name in _OUTER:
        return (_OUTER[name],)
    inner = name.removeprefix("model.")
    if inner in _HEAD:
        return (Part(_HEAD[inner], aliases=(name,)),)
    _, number, leaf = inner.split(".", 2)
    is_mtp = int(number) == config.num_hidden_layers
    prefixes = (_MTP,) if is_mtp else (f"layers.{number}.", f"model.layers.{number}.")
    if leaf.startswith("mlp.experts."):
        at = tuple(f"{prefix}ffn.experts." for prefix in prefixes)
        names = ExpertNames(at, gate="w1", up="w3", down="w2")
        return expert_parts(config, leaf.removeprefix("mlp.experts."), names)
    released = leaf if leaf.startswith(ENGRAM) else _LAYER[leaf]
    leaves = (released, _ALIASES[released]) if released in _ALIASES else (released,)
    first, *aliases = (f"{prefix}{one}" for prefix in prefixes for one in leaves)
    return (Part(first, aliases=tuple(aliases)),)


def copies(config: ModelConfig) -> dict[str, str]:
    """None: the MTP layer's embedding and head are stored once, with the main model's."""
    return {}


def mtp_prefix(config: ModelConfig) -> str:
    """What begins the stored name of every tensor of the MTP layer, and of no other."""
    return _MTP


def narrowest(name: str) -> Narrowest:
    """The narrowest type in which the stored tensor `name` may be written."""
    if f".{ENGRAM}" in name:
        return v3.narrowest(name)
    *path, module, leaf = ("", *name.split("."))
    if leaf == "tid2eid":
        return "int32"
    if leaf in _FLOAT32 or leaf.startswith("hc_"):
        return "float32"
    return "float8" if module in _LINEARS and "compressor" not in path else "bfloat16"


def scale_name(name: str) -> str:
    """The stored name of the scales of a quantised tensor."""
    return f"{name.removesuffix('.weight')}.scale"


def quantization() -> dict[str, Any]:
    """`quantization_config` of the released models; their experts are FP4, these are FP8."""
    return v3.quantization() | {"scale_fmt": "ue8m0", "expert_dtype": "fp8"}


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
    where, rope = "rope_scaling", read_table(raw, "rope_scaling")
    if not rope:
        where, rope = (
            ("rope_parameters.compress", compress)
            if compress
            else (
                "rope_parameters",
                nested,
            )
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
    return fields | {
        "qk_rope_head_dim": _rotary_width(raw),
        "rope_scaling": read_yarn(rope, positions, where=where, scales_magnitudes=False),
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

"""DeepSeek-V4: Ingot's configuration <-> `config.json`, as released and as transformers writes it.

| Ingot | released | transformers 5 |
|---|---|---|
| `compress_ratios` | `compress_ratios`, with a 0 for the MTP layer | `layer_types` |
| `csa_ratio`, `hca_ratio` | always 4 and 128 | `compress_rates` |
| `num_hash_layers` | `num_hash_layers` | `mlp_layer_types` |
| `qk_rope_head_dim` | `qk_rope_head_dim` | `partial_rotary_factor` of `head_dim` |
| `rope_theta` | `rope_theta` | `rope_parameters.main` |
| `compress_rope_theta`, `rope_scaling` | the same | `rope_parameters.compress` |

Both are written, but for `mlp_layer_types`: vLLM 0.32 and vllm-ascend 0.23 hold it to transformers'
general kinds of layer, `sparse` and `dense`, and refuse V4's, which transformers derives from
`num_hash_layers` by itself. Where both are read, they must agree.
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
    check_flat,
    missing_field,
    read_base,
    read_kind,
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
_SHARE = "partial_rotary_factor"
_LABELS = ("main", "compress")
"""Tables within `rope_parameters` for the layers with a window only, and for the others."""
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
        "num_hash_layers": config.num_hash_layers,
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
    tables: dict[str, Mapping[str, Any]] = {}
    for where in ("rope_scaling", "rope_parameters"):
        table = read_table(raw, where)
        check_flat(table, where, known=_LABELS)
        tables[where] = {name: value for name, value in table.items() if name not in _LABELS}
        tables |= _nested(raw, where)
    fields = {
        "rope_theta": read_base(raw, "rope_theta", "main"),
        "compress_rope_theta": read_base(raw, "compress_rope_theta", "compress"),
    }
    if missing := [name for name, value in fields.items() if value is None]:
        raise missing_field(missing[0])
    stretching = {where: table for where, table in tables.items() if not where.endswith(".main")}
    original = require(raw, ["max_position_embeddings"])["max_position_embeddings"]
    yarn = agreed_yarn(raw, stretching, original=original, scales_magnitudes=False)
    return fields | {"qk_rope_head_dim": _rotary_width(raw, tables), "rope_scaling": yarn}


def _nested(raw: Mapping[str, Any], outer: str) -> dict[str, Mapping[str, Any]]:
    """The two tables within the table `outer`, by their paths; none if it is flat.

    ArtifactError where transformers would pass one over, or fill in what is not meant.
    """
    tables = {f"{outer}.{label}": read_table(raw, outer, label) for label in _LABELS}
    (where, main), (other, compress) = tables.items()
    if (kind := read_kind(main, where)) not in (None, "default"):
        raise ArtifactError(
            f"config.json: {where}.rope_type = {kind!r}, but window layers are never stretched; "
            f"write 'default', and the stretching in {other}"
        )
    there = [label for label in _LABELS if read_table(raw, outer).get(label) is not None]
    if not there:
        return {}
    if len(there) == 1:
        raise ArtifactError(
            f"config.json: {outer} has {there[0]} alone, but transformers reads it only beside the "
            f"other of {' and '.join(_LABELS)}; give both"
        )
    filled = {(other, "rope_theta"): "rope_theta, the base of window layers"}
    if read_kind(compress, other) == "yarn":
        filled[other, "attention_factor"] = "YaRN's, which is not 1.0 as this family's is"
    if raw.get(_SHARE) is None:
        filled |= dict.fromkeys([(where, _SHARE), (other, _SHARE)], "1.0")
    for (table, name), taken in filled.items():
        if tables[table].get(name) is None:
            raise ArtifactError(
                f"config.json: {table}.{name} is missing, for which transformers would take "
                f"{taken}; add it"
            )
    return tables


def _rotary_width(raw: Mapping[str, Any], tables: Mapping[str, Mapping[str, Any]]) -> Any:
    """By its own field, and by the share of a head that the config and its tables give."""
    head, by_share = raw["head_dim"], {}
    for where, table in {"": raw, **tables}.items():
        name, share = f"{where}.{_SHARE}".removeprefix("."), table.get(_SHARE)
        if share is None or not isinstance(head, int):
            continue
        if not isinstance(share, int | float) or not 0 < share <= 1:
            raise ArtifactError(
                f"config.json: {name} = {share!r}, expected a share of a head between 0 and 1; "
                "correct it"
            )
        by_share[f"{name} * head_dim = {share} * {head}"] = int(head * share)
    width = agreed({"qk_rope_head_dim": raw.get("qk_rope_head_dim"), **by_share})
    if width is None:
        raise missing_field("qk_rope_head_dim")
    return width


def _ratios(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`compress_ratios` without the MTP layer's, and which ratio is of which kind."""
    rates = read_table(raw, "compress_rates") or _RELEASED_RATIOS
    rates = {
        kind: agreed({f"compress_rates.{kind}": rates.get(kind), short: raw.get(short)})
        for kind, short in ((_CSA, "compress_rate_csa"), (_HCA, "compress_rate_hca"))
    }
    by_type = {_WINDOW: 0, **rates}
    kinds, types = None, _read_list(raw, "layer_types")
    if types is not None:
        if unknown := [kind for kind in types if kind not in [*by_type]]:
            raise ArtifactError(
                f"config.json: layer_types holds {unknown[0]!r}; known: {', '.join(by_type)}; "
                "correct it"
            )
        kinds = [by_type[kind] for kind in types]
    listed = _without_mtp(raw)
    found = agreed({"compress_ratios": listed, "layer_types with compress_rates": kinds})
    if found is None:
        raise missing_field("compress_ratios")
    return {"compress_ratios": tuple(found), "csa_ratio": rates[_CSA], "hca_ratio": rates[_HCA]}


def _without_mtp(raw: Mapping[str, Any]) -> list[Any] | None:
    """`compress_ratios`, of which released lists end with a 0 for each MTP layer."""
    ratios = _read_list(raw, "compress_ratios")
    if ratios is None:
        return None
    layers, mtp = raw["num_hidden_layers"], raw.get("num_nextn_predict_layers") or 0
    beyond = len(ratios) - layers if isinstance(layers, int) else None
    if beyond not in (0, mtp):
        raise ArtifactError(
            f"config.json: compress_ratios has {len(ratios)} entries, but num_hidden_layers = "
            f"{layers!r} and num_nextn_predict_layers = {mtp!r}; give one for each layer"
        )
    if any(ratios[layers:]):
        raise ArtifactError(
            f"config.json: compress_ratios ends with {ratios[-1]!r} for the MTP layer, which has "
            "a window only; expected 0, so correct it"
        )
    return ratios[:layers]


def _hash_layers(raw: Mapping[str, Any]) -> Any:
    by_type, types = None, _read_list(raw, "mlp_layer_types")
    if types is not None:
        by_type = types.count("hash_moe")
        expected = ["hash_moe"] * by_type + ["moe"] * (len(types) - by_type)
        agreed({"mlp_layer_types": types, "its hash layers first": expected})
    counted = agreed({"num_hash_layers": raw.get("num_hash_layers"), "mlp_layer_types": by_type})
    if counted is None:
        raise missing_field("num_hash_layers")
    return counted


def _read_list(raw: Mapping[str, Any], name: str) -> list[Any] | None:
    """The list at `name`; none if it is absent or null."""
    found = raw.get(name)
    if found is not None and not isinstance(found, list):
        raise ArtifactError(
            f"config.json: {name} = {found!r}, expected a list with one entry for each layer; "
            "correct it"
        )
    return found

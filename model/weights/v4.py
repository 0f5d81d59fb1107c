"""DeepSeek-V4: Ingot's tensors <-> the released ones.

Ingot's module names are those of transformers; the released files have names of their own, which
this writes and transformers reads. transformers itself writes the released names but for a few,
which are read as aliases: it puts `model.` in front, keeps `embed_tokens` and `hc_head.hc_*`, and
calls the norm of keys `attn.norm`.

The MTP layer is `model.layers.{N}` in Ingot, with N the number of layers, and `mtp.0` on disk.
`tid2eid` is int32 on disk and int64 in Ingot.
"""

from typing import Any

from configs.model import ModelConfig
from model.weights import v3, v4_fields
from model.weights.table import ENGRAM, ExpertNames, Narrowest, Part, ScaleType, expert_parts

MODEL_TYPE = v4_fields.MODEL_TYPE
SCALES: ScaleType = "powers"
"""In float32, as beside the FP8 experts of DeepSeek-V4-Flash-Base: vLLM 0.32 takes the scales of
experts in E8M0 for the codes that FP4 has, and multiplies by exponents."""
_MTP = "mtp.0."

to_hf_config = v4_fields.to_hf_config
from_hf_config = v4_fields.from_hf_config

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

FUSED: tuple[tuple[str, ...], ...] = (("wq_a", "wkv"), ("w1", "w3"))
"""Modules that vLLM and SGLang load into one matrix, first rows first."""


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

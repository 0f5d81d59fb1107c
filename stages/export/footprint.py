"""How many bytes a variant takes: on disk by part, and in the memory of those who serve it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from configs.model import ModelConfig
from configs.v3 import V3Config, V32Config
from configs.v4 import V4Config
from model.weights.config import table_of
from stages.export.stored import Stored

CACHE_BYTES = 2
"""Of one cached value: servers keep bfloat16 unless they are told otherwise."""
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128)
MEMORY_BYTES: Mapping[str, Mapping[str, float]] = {
    "cuda": {"H100": 80e9, "H200": 141e9},
    "ascend": {"910B": 64e9},
}
"""Of one device, by target. Each of the two dies of a 910C is a device with a 910B's memory."""


@dataclass(frozen=True, slots=True)
class Part:
    """The tensors of one part of a model, together."""

    name: str
    tensors: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Spread:
    """One device's weights, where so many devices share the routed experts evenly.

    Everything else is whole on each, as it is with data-parallel attention.
    """

    devices: int
    bytes: int


def parts(config: ModelConfig, stored: Mapping[str, Stored]) -> list[Part]:
    """The parts of a model, the largest first."""
    prefix = table_of(config).mtp_prefix(config)
    found: dict[str, list[int]] = {}
    for name, one in stored.items():
        found.setdefault(_part(name, prefix), []).append(one.bytes)
    made = [Part(name, len(sizes), sum(sizes)) for name, sizes in found.items()]
    return sorted(made, key=lambda part: -part.bytes)


def spread(config: ModelConfig, stored: Mapping[str, Stored]) -> list[Spread]:
    """One device's weights for each of `DEVICES` that divides the experts."""
    split = sum(one.bytes for name, one in stored.items() if ".experts." in name)
    whole = sum(one.bytes for one in stored.values()) - split
    return [
        Spread(devices, whole + split // devices)
        for devices in DEVICES
        if config.n_routed_experts % devices == 0
    ]


def fewest(spreads: Iterable[Spread], needed_bytes: int, memory_bytes: float) -> int | None:
    """The fewest devices that hold their weights and `needed_bytes` beside them, if any do."""
    fitting = (one.devices for one in spreads if one.bytes + needed_bytes <= memory_bytes)
    return next(fitting, None)


def cache_bytes(config: ModelConfig, tokens: int) -> int:
    """What is kept of a sequence of `tokens`, all layers together, without the MTP layer's.

    V3: a latent and the rotated key, by token. V3.2: the indexer's key as well. V4: a window, and
    an entry for each group of tokens that a layer compresses, with the indexer's key where it
    chooses among entries.
    """
    return CACHE_BYTES * sum(
        _cached_values(config, layer, tokens) for layer in range(config.num_hidden_layers)
    )


def _cached_values(config: ModelConfig, layer: int, tokens: int) -> int:
    if isinstance(config, V4Config):
        window = min(tokens, config.sliding_window) * config.head_dim
        match config.attention_kind(layer):
            case "window":
                return window
            case "hca":
                return window + tokens // config.hca_ratio * config.head_dim
            case "csa":
                width = config.head_dim + config.index_head_dim
                return window + tokens // config.csa_ratio * width
    assert isinstance(config, V3Config)
    return tokens * sum(_by_token(config))


def _by_token(config: V3Config) -> Iterable[int]:
    """Widths of what a layer of V3 or V3.2 keeps of each token."""
    yield config.kv_lora_rank
    yield config.qk_rope_head_dim
    if isinstance(config, V32Config):
        yield config.index_head_dim


def _part(name: str, mtp_prefix: str) -> str:
    """What people call the part of a model that a stored tensor belongs to."""
    words = name.split(".")
    if name.startswith(mtp_prefix):
        return "MTP layer"
    for word, part in (
        ("engram", "memory (Engram)"),
        ("experts", "routed experts"),
        ("shared_experts", "shared experts"),
        ("indexer", "indexer"),
        ("compressor", "compressors"),
        ("self_attn", "attention"),
        ("attn", "attention"),
        ("gate", "router"),
        ("mlp", "dense feed-forward"),
        ("embed_tokens", "embeddings and output head"),
        ("embed", "embeddings and output head"),
        ("lm_head", "embeddings and output head"),
        ("head", "embeddings and output head"),
    ):
        if word in words:
            return part
    if any(word.startswith("hc_") for word in words):
        return "hyper-connections"
    return "norms and the rest"

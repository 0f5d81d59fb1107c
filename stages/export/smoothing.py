"""Outlying channels of activations, carried over into the weights that read them.

One channel far larger than the others takes the steps of an integer scale from all of them. What a
norm gives is divided channel by channel, and the columns of everything that reads it are multiplied
by the same: the model computes what it did, and both sides can be rounded (SmoothQuant, arXiv
2211.10438, eq. 3 and 4, at alpha = 1/2). ModelSlim does so between norms and Linears, and between
values and attention's output; so does this.

Factors are powers of two, so that the division itself rounds nothing, in bfloat16 either.

Axes: R rows (outputs of a Linear), C columns (inputs), H heads, V values of a head.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from configs.model import ModelConfig, V3Config, V4Config
from model.weights.config import table_of
from stages.export.ascend import Integers
from stages.export.calibration import OUTPUT, Range
from stages.export.tensors import TensorFolder

_LARGEST_EXPONENT = 8
"""Of a factor, in either direction: a channel that calibration hardly saw is not without use."""
_EXPERTS = (
    *("mlp.gate.weight", "mlp.experts.gate_up_proj"),
    *("mlp.shared_experts.gate_proj.weight", "mlp.shared_experts.up_proj.weight"),
)
_DENSE = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
_V3_READERS: Mapping[str, tuple[str, ...]] = {
    "post_attention_layernorm": (*_DENSE, *_EXPERTS),
    "input_layernorm": tuple(
        f"self_attn.{module}.weight"
        for module in (
            *("q_proj", "q_a_proj", "kv_a_proj_with_mqa"),
            *("indexer.wk", "indexer.weights_proj"),
        )
    ),
    "self_attn.q_a_layernorm": ("self_attn.q_b_proj.weight", "self_attn.indexer.wq_b.weight"),
}
_V4_READERS: Mapping[str, tuple[str, ...]] = {
    "post_attention_layernorm": _EXPERTS,
    "input_layernorm": tuple(
        f"self_attn.{module}.weight"
        for module in (
            *("q_a_proj", "kv_proj", "compressor.kv_proj", "compressor.gate_proj"),
            *("compressor.indexer.kv_proj", "compressor.indexer.gate_proj"),
            "compressor.indexer.scorer.weights_proj",
        )
    ),
    "self_attn.q_a_norm": (
        "self_attn.q_b_proj.weight",
        "self_attn.compressor.indexer.q_b_proj.weight",
    ),
}
"""Of each norm of a layer, all tensors that read what it gives."""


@dataclass(frozen=True, slots=True)
class Group:
    """What is divided and all that reads it, by the names of stored tensors."""

    seen: str
    """The module at which calibration saw the activations."""
    divided: str
    readers: tuple[str, ...]


class SmoothedFolder(TensorFolder):
    """A folder whose tensors are read times their factors."""

    def __init__(self, source: TensorFolder, factors: Mapping[str, Tensor]) -> None:
        """`factors` by tensor, in a shape that multiplies it."""
        super().__init__(source.folder)
        self.file_of = dict(source.file_of)
        self._source, self._factors = source, factors

    def read(self, name: str) -> Tensor:
        """One tensor times its factor, in the type in which the source gives it."""
        tensor = self._source.read(name)
        return tensor * self._factors[name] if name in self._factors else tensor


def smoothed(
    source: TensorFolder, form: Integers, ranges: Mapping[str, Range]
) -> tuple[SmoothedFolder, dict[str, Range]]:
    """The source with its outlying channels carried over, and the ranges that are seen then."""
    factors: dict[str, Tensor] = {}
    after = dict(ranges)
    for group in groups_of(form.model, source.names):
        divisor_C = _divisor(source, form, group, ranges[group.seen])
        after[group.seen] = ranges[group.seen].over(divisor_C)
        factors |= dict.fromkeys(group.readers, divisor_C)
        if group.seen.endswith(OUTPUT):
            factors[group.divided] = _over_heads(form.model, 1 / divisor_C)
        else:
            factors[group.divided] = 1 / divisor_C
    return SmoothedFolder(source, factors), after


def groups_of(config: ModelConfig, names: list[str]) -> Iterator[Group]:
    """All groups of the layers before the MTP layer, whose tensors are among `names`."""
    known = frozenset(names)
    table = table_of(config)
    for layer in range(config.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        for norm, leaves in readers_of(config).items():
            parts = [part for leaf in leaves for part in table.parts(config, f"{prefix}{leaf}")]
            readers = tuple(part.name for part in parts if part.name in known)
            (divided,) = table.parts(config, f"{prefix}{norm}.weight")
            if divided.name in known:
                yield Group(f"{prefix}{norm}", divided.name, readers)
        if isinstance(config, V3Config):
            output = f"{prefix}{OUTPUT}"
            yield Group(output, f"{prefix}self_attn.kv_b_proj.weight", (f"{output}.weight",))


def readers_of(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """Of each norm of a layer, all of the layer's tensors that read what it gives."""
    return _V4_READERS if isinstance(config, V4Config) else _V3_READERS


def _divisor(
    source: TensorFolder, form: Integers, group: Group, seen: Range
) -> Float[Tensor, " C"]:
    """sqrt(activation / weight) of each channel, about 1 on the whole, as powers of two.

    Channels that never speak, or that no quantised weight reads, stay as they are.
    """
    weight_C = torch.zeros_like(seen.absmax_C)
    for reader in group.readers:
        if form.scheme(reader) is not None:
            weight_C = torch.maximum(weight_C, source.read(reader).float().abs().amax(0))
    spoken_C = (seen.absmax_C > 0) & (weight_C > 0)
    if not spoken_C.any():
        return torch.ones_like(weight_C)
    exponent_C = (seen.absmax_C.log2() - weight_C.log2()) / 2
    exponent_C = (exponent_C - exponent_C[spoken_C].median()).round()
    exponent_C = torch.where(spoken_C, exponent_C, 0.0)
    return exponent_C.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT).exp2()


def _over_heads(config: ModelConfig, factor_C: Float[Tensor, " C"]) -> Float[Tensor, "R 1"]:
    """Of `kv_b_proj`, whose heads have rows for keys and then rows for values, C = H V."""
    assert isinstance(config, V3Config)
    factor_HV = factor_C.unflatten(0, (config.num_attention_heads, -1))
    return pad(factor_HV, (config.qk_nope_head_dim, 0), value=1.0).reshape(-1, 1)

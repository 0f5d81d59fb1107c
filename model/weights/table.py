"""What the table of a family says of each tensor: where it lies on disk, and how narrow it may be.

Axes: E routed experts, I inner width, D model width.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from configs.model import ModelConfig

Narrowest = Literal["float8", "bfloat16", "float32", "int32", "int64"]
"""The narrowest type in which released models store a tensor."""

ScaleType = Literal["float32", "powers", "e8m0"]
"""Of scales: any float32, float32 that are powers of two, or powers of two in one byte."""

EXPERTS = ".mlp.experts."
"""Precedes the leaf of a stacked tensor of routed experts."""
ENGRAM = "engram."
"""Precedes the tensors of a memory, in its layer; they bear the same names on disk."""
ENGRAM_INTEGERS = frozenset({"canonical_ids", "multipliers"})
ROUTING_BIAS = "e_score_correction_bias"
"""Added to scores that differ by less than bfloat16 resolves, so it stays float32 everywhere."""


@dataclass(frozen=True, slots=True)
class Part:
    """One stored tensor, and the part of an Ingot tensor that it is."""

    name: str
    index: tuple[int | slice, ...] = ()
    aliases: tuple[str, ...] = ()
    """Other names under which transformers writes it."""

    @property
    def names(self) -> tuple[str, ...]:
        """All names, that of the released models first."""
        return (self.name, *self.aliases)


@runtime_checkable
class Table(Protocol):
    """What each family's file has."""

    MODEL_TYPE: str
    SCALES: ScaleType
    """How the scales of FP8 weights are written."""
    FUSED: tuple[tuple[str, ...], ...]
    """Modules that servers load into one matrix, first rows first."""

    def parts(self, config: ModelConfig, name: str) -> tuple[Part, ...]:
        """Where the Ingot tensor `name` lies on disk; the parts cover it."""

    def copies(self, config: ModelConfig) -> Mapping[str, str]:
        """Stored names that repeat another stored tensor -> that tensor; they may be absent."""

    def mtp_prefix(self, config: ModelConfig) -> str:
        """What begins the stored name of every tensor of the MTP layer, and of no other."""

    def narrowest(self, name: str) -> Narrowest:
        """The narrowest type in which the stored tensor `name` may be written."""

    def scale_name(self, name: str) -> str:
        """The stored name of the scales of a quantised tensor."""

    def quantization(self) -> dict[str, Any]:
        """`quantization_config` of a folder that `save_pretrained` wrote as float8."""

    def to_hf_config(self, config: ModelConfig) -> dict[str, Any]:
        """`config.json` of a float32 folder."""

    def from_hf_config(self, raw: Mapping[str, Any]) -> ModelConfig:
        """The reverse."""


def expert_parts(config: ModelConfig, leaf: str, names: "ExpertNames") -> tuple[Part, ...]:
    """The parts of the stacked tensor `leaf`: gate_up_proj [E, 2I, D] or down_proj [E, D, I]."""
    return tuple(_expert_parts(config, leaf, names))


@dataclass(frozen=True, slots=True)
class ExpertNames:
    """How the three matrices of one expert are called on disk."""

    prefixes: tuple[str, ...]
    """In front of the expert's number; further ones are aliases."""
    gate: str
    up: str
    down: str

    def part(self, expert: int, leaf: str, index: tuple[int | slice, ...]) -> Part:
        """One matrix of one expert."""
        name, *aliases = (f"{prefix}{expert}.{leaf}.weight" for prefix in self.prefixes)
        return Part(name, index, tuple(aliases))


def _expert_parts(config: ModelConfig, leaf: str, names: ExpertNames) -> Iterator[Part]:
    inner = config.moe_intermediate_size
    for expert in range(config.n_routed_experts):
        if leaf == "gate_up_proj":
            yield names.part(expert, names.gate, (expert, slice(0, inner)))
            yield names.part(expert, names.up, (expert, slice(inner, 2 * inner)))
        else:
            yield names.part(expert, names.down, (expert,))

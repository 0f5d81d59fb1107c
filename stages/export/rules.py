"""What a rule about a bundle is, and how a model's sizes are held to it. Loads no torch.

The rules themselves are in `gpu_rules` and `npu_rules`; `servers` says who loads what by them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

from configs.model import ModelConfig, V3Config, V4Config
from configs.shape import FP8_BLOCK, Family

Program = Literal[
    "transformers", "vllm", "vllm-cpu", "sglang", "llama.cpp", "vllm-ascend", "mindie"
]
Effect = Literal["refuses", "misreads", "changes", "omits", "needs"]
"""What comes of a rule that is broken:

| effect | the program |
|---|---|
| `refuses` | has no code for it: it stops, when it loads or at the first request |
| `misreads` | answers wrongly, and says nothing |
| `changes` | leaves out what answers depend on, and says so in a warning |
| `omits` | leaves out what answers do not depend on |
| `needs` | serves the bundle on some machines only, or after some help |
"""
Found = Callable[[ModelConfig], Iterator[str]]
"""What a model has where a rule wants something else, as `name = value`; nothing if it is met."""

ALL: tuple[Family, ...] = ("v3", "v32", "v4")
BLOCKS = ("fp8", "fp4")
"""Variants whose Linear weights are FP8 in blocks."""
INT8 = ("w8a8", "w4a8")


@dataclass(frozen=True, slots=True)
class Rule:
    """One thing that one program wants of bundles of these families and variants."""

    program: Program
    wants: str
    """In place of what is found; where the effect is `omits` or `needs`, a clause of its own."""
    found: Found
    source: str
    """The file of the program, or of a library that it calls, that says so; or the trial."""
    effect: Effect = "refuses"
    families: tuple[Family, ...] = ALL
    variants: tuple[str, ...] | None = None
    """None means all."""
    by_size: bool = True
    """Whether a model of other sizes would do."""

    def breaches(self, model: ModelConfig, variant: str) -> Iterator[str]:
        """What the bundle has in place of what is wanted; nothing if the rule is met."""
        if model.family in self.families and (self.variants is None or variant in self.variants):
            yield from self.found(model)


def unless(fits: Callable[[int], bool], *names: str) -> Found:
    """Those of the sizes `names` that do not fit."""

    def found(model: ModelConfig) -> Iterator[str]:
        for name in names:
            if not fits(size := getattr(model, name)):
                yield f"{name} = {size}"

    return found


def is_not(wanted: int, *names: str) -> Found:
    """Those of the sizes `names` that differ from the one wanted."""
    return unless(lambda size: size == wanted, *names)


def always(what: str) -> Found:
    """The same of every model: what the program has no code for, whatever the sizes."""

    def found(model: ModelConfig) -> Iterator[str]:
        yield what

    return found


def latent(model: ModelConfig) -> Iterator[str]:
    """A latent, its rotary part included, of another width than the released models'."""
    assert isinstance(model, V3Config)
    if (width := model.kv_lora_rank + model.qk_rope_head_dim) != 576:
        yield f"kv_lora_rank + qk_rope_head_dim = {width}"


def broken_latent(model: ModelConfig) -> Iterator[str]:
    """A latent, its rotary part included, of more than one block that does not fill its last."""
    assert isinstance(model, V3Config)
    width = model.kv_lora_rank + model.qk_rope_head_dim
    if width > FP8_BLOCK and width % FP8_BLOCK:
        yield f"kv_lora_rank + qk_rope_head_dim = {width}"


def latent_parts(model: ModelConfig) -> Iterator[str]:
    """A latent or a rotary part of another width than the released models'."""
    assert isinstance(model, V3Config)
    if (model.kv_lora_rank, model.qk_rope_head_dim) != (512, 64):
        yield f"kv_lora_rank, qk_rope_head_dim = {model.kv_lora_rank}, {model.qk_rope_head_dim}"


def odd_ratio(model: ModelConfig) -> Iterator[str]:
    """A compress ratio that no released model has."""
    assert isinstance(model, V4Config)
    for ratio in sorted(set(model.compress_ratios) - {0, 4, 128})[:1]:
        yield f"{ratio} in compress_ratios"


def no_yarn(model: ModelConfig) -> Iterator[str]:
    """Frequencies that nothing stretches."""
    if model.rope_scaling is None:
        yield "rope_scaling = none"


def memory(model: ModelConfig) -> Iterator[str]:
    """Engram."""
    if model.engram is not None:
        yield "a memory of n-grams"


def mtp(model: ModelConfig) -> Iterator[str]:
    """MTP layers."""
    if count := model.num_nextn_predict_layers:
        yield f"num_nextn_predict_layers = {count}"


def mtp_depth(model: ModelConfig) -> Iterator[str]:
    """More than one MTP layer."""
    if (count := model.num_nextn_predict_layers) > 1:
        yield f"num_nextn_predict_layers = {count}"


def ragged(model: ModelConfig) -> Iterator[str]:
    """Matrices whose last block of scales is not whole, where others are put below them."""
    for name, rows in model.ragged_rows.items():
        yield f"{name} = {rows}"

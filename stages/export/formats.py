"""What a variant of a bundle is: for each source tensor, its parts on disk and how to read them.

A format encodes one tensor at a time, so that a model is never whole in memory. It also states how
far a decoded element may lie from its source; that bound is computed apart from the encoder, and
`parity.prove_weights` holds every element to it.

Axes: R rows (outputs of a Linear), C columns (inputs).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from configs.errors import ExportError

MLP_LINEARS = frozenset({"gate_proj", "up_proj", "down_proj"})
"""Dense, shared and routed feed-forwards alike."""
ATTENTION_LINEARS = frozenset(
    {"q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"}
)
LINEARS = MLP_LINEARS | ATTENTION_LINEARS
"""Modules whose GEMM runs in low precision in DeepSeek-V3 (arXiv 2412.19437, section 3.3.1)."""
KEPT = frozenset(
    {
        *("embed_tokens", "lm_head", "norm", "input_layernorm", "post_attention_layernorm"),
        *("q_a_layernorm", "kv_a_layernorm", "gate", "enorm", "hnorm", "eh_proj", "head"),
    }
)
"""Modules that no format quantises: embeddings, heads, norms, router, the MTP layer's joint."""
ROUTING_BIAS = "e_score_correction_bias"
"""Added to scores that differ by less than bfloat16 resolves, so it stays float32 everywhere."""

ARITHMETIC_SLACK = 2.0**-21
"""Relative error of the few float32 operations around a rounding."""
VANISHING = 448 * 2.0**-126
"""Below this magnitude a scale would not be a normal float32; such values count as zero."""

INDEX = "model.safetensors.index.json"
"""The file that maps tensors to weight files, under the name every loader looks for."""

Read = Callable[[str], Tensor]
"""A stored tensor by its name."""


@runtime_checkable
class Format(Protocol):
    """One variant's rules. Names are the source's, Hugging Face style."""

    @property
    def variant(self) -> str:
        """The variant's name, and its folder in the bundle."""

    @property
    def stem(self) -> str:
        """Weight files are called `<stem>-00001-of-0000N.safetensors`."""

    @property
    def index_names(self) -> tuple[str, ...]:
        """Names under which the index of the weight files is written."""

    @property
    def config_entries(self) -> Mapping[str, Any]:
        """What this variant adds to `config.json`."""

    def side_files(self, names: Sequence[str]) -> Mapping[str, Any]:
        """JSON files, by name, that go beside the weights of the source tensors `names`."""

    def parts(self, name: str) -> tuple[str, ...]:
        """Names of the stored tensors that together are the source tensor `name`."""

    def encode(self, name: str, x: Float[Tensor, "..."]) -> dict[str, Tensor]:
        """The stored tensors for the float32 `x`, by name; exactly `parts(name)`."""

    def decode(self, name: str, read: Read) -> Float[Tensor, "..."]:
        """The float32 tensor that the stored parts stand for."""

    def error_bound(self, name: str, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """float64: the most by which each decoded element may differ from the source `x`."""


@dataclass(frozen=True, slots=True)
class TensorName:
    """A Hugging Face tensor name, taken apart."""

    layer: int | None
    module: str
    """The innermost module, e.g. `q_a_proj`."""
    parameter: str

    @property
    def is_routing_bias(self) -> bool:
        """Whether this is the router's bias rather than a weight."""
        return self.parameter == ROUTING_BIAS


def parse(name: str) -> TensorName:
    """Take `name` apart; ExportError for a tensor that no rule here covers.

    A tensor of an unknown module might have to be quantised or be left alone; guessing would give
    a bundle that loads and is wrong.
    """
    *path, parameter = name.split(".")
    module = path[-1] if path else ""
    known = module in LINEARS | KEPT and parameter == "weight"
    if not known and (module, parameter) != ("gate", ROUTING_BIAS):
        raise ExportError(
            f"tensor {name}: no export rule covers module {module!r} with parameter "
            f"{parameter!r}; add it to stages/export/formats.py"
        )
    layer = int(path[2]) if path[:2] == ["model", "layers"] else None
    return TensorName(layer=layer, module=module, parameter=parameter)


@dataclass(frozen=True, slots=True)
class Bf16:
    """Everything in bfloat16, the routing bias in float32."""

    variant: str = "bf16"
    stem: str = "model"
    index_names: tuple[str, ...] = (INDEX,)

    @property
    def config_entries(self) -> Mapping[str, Any]:
        """Nothing: plain weights need no word in the config."""
        return {}

    def side_files(self, names: Sequence[str]) -> Mapping[str, Any]:
        """None."""
        return {}

    def parts(self, name: str) -> tuple[str, ...]:
        """The tensor itself."""
        return (name,)

    def encode(self, name: str, x: Float[Tensor, "..."]) -> dict[str, Tensor]:
        """Round to the nearest bfloat16, ties to even."""
        return {name: x.contiguous() if parse(name).is_routing_bias else x.to(torch.bfloat16)}

    def decode(self, name: str, read: Read) -> Float[Tensor, "..."]:
        """Widen to float32."""
        return read(name).float()

    def error_bound(self, name: str, x: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
        """Half a step of a number with 8 significant bits; nothing for the routing bias."""
        if parse(name).is_routing_bias:
            return torch.zeros_like(x, dtype=torch.float64)
        return half_step(x.double(), bits=8, smallest_exponent=-126)


KEPT_AS = Bf16()
"""How every variant stores what it does not quantise."""


def half_step(
    x: Float[Tensor, "..."], *, bits: int, smallest_exponent: int
) -> Float[Tensor, "..."]:
    """Half the distance between neighbours around each `x` (float64) in a binary float format.

    `bits` counts the leading one; from `smallest_exponent` downwards the distance stays the same.
    """
    _, exponent = torch.frexp(x)
    leading = torch.where(x == 0, smallest_exponent, exponent - 1).clamp_min(smallest_exponent)
    return torch.ldexp(torch.ones_like(x), leading - bits)

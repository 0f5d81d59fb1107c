"""What a variant of a bundle is: for each source tensor, its parts on disk and how to read them.

Which tensors may be narrowed, and how far, is the family's to say (`model/weights`); a format says
into what. It encodes one tensor at a time, so that a model is never whole in memory. It also states
how far a decoded element may lie from its source; that bound is computed apart from the encoder,
and `parity.prove_weights` holds every element to it.

Axes: R rows (outputs of a Linear), C columns (inputs).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from configs.model import ModelConfig
from model.weights.families import narrowest

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
    """One variant's rules, for one model. Names are the source's, those of released files."""

    @property
    def model(self) -> ModelConfig:
        """The model that the variant holds."""

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

    def encode(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """The stored tensors for `x`, float32 or integers, by name; exactly `parts(name)`."""

    def decode(self, name: str, read: Read) -> Tensor:
        """The float32 or integer tensor that the stored parts stand for."""

    def error_bound(self, name: str, x: Tensor) -> Float[Tensor, "..."]:
        """float64: the most by which each decoded element may differ from the source `x`."""


@dataclass(frozen=True, slots=True)
class Bf16:
    """Everything in bfloat16 but for what the family keeps wider, such as routing biases."""

    model: ModelConfig
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

    def encode(self, name: str, x: Tensor) -> dict[str, Tensor]:
        """Round to the nearest bfloat16, ties to even; float32 and integers stay as they are."""
        return {name: x.contiguous() if self._is_exact(name, x) else x.to(torch.bfloat16)}

    def decode(self, name: str, read: Read) -> Tensor:
        """Widen to float32; integers stay as they are."""
        x = read(name)
        return x.float() if x.is_floating_point() else x

    def error_bound(self, name: str, x: Tensor) -> Float[Tensor, "..."]:
        """Half a step of a number with 8 significant bits; nothing for what stays as it is."""
        if self._is_exact(name, x):
            return torch.zeros(x.shape, dtype=torch.float64)
        return half_step(x.double(), bits=8, smallest_exponent=-126)

    def _is_exact(self, name: str, x: Tensor) -> bool:
        """Whether the values are not to be rounded: indices, and what is too fine for bfloat16."""
        return not x.is_floating_point() or narrowest(self.model, name) == "float32"


def half_step(
    x: Float[Tensor, "..."], *, bits: int, smallest_exponent: int
) -> Float[Tensor, "..."]:
    """Half the distance between neighbours around each `x` (float64) in a binary float format.

    `bits` counts the leading one; from `smallest_exponent` downwards the distance stays the same.
    """
    _, exponent = torch.frexp(x)
    leading = torch.where(x == 0, smallest_exponent, exponent - 1).clamp_min(smallest_exponent)
    return torch.ldexp(torch.ones_like(x), leading - bits)

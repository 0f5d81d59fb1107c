"""How each part of a model computes its products: which are FP8, by which tiles, and who is told.

A model is built with one `Numerics`; each of its Linears and experts asks it for the scheme of its
part, and none means high precision. The mathematics above them does not see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor, nn

from configs.errors import MachineError
from configs.train import Fp8Backend, Fp8Config, Precision
from model.fp8.backends import Backend, backend_for, choose
from model.fp8.fp4 import through_fp4
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized, QuantizedE5M6, Tile
from model.fp8.recorder import Recorder

Part = Literal[
    "attention",
    "indexer",
    "dense_ffn",
    "shared_experts",
    "routed_experts",
    "gate",
    "head",
    "mtp_projection",
    "compressor",
    "engram",
]
_WHOLE: Tile = (2**62, 2**62)
_DEFAULTS = Fp8Config()


@dataclass(frozen=True, slots=True)
class Fp8:
    """The products of one part, in block-scaled E4M3 (DeepSeek-V3, section 3.3.2)."""

    part: Part
    config: Fp8Config = _DEFAULTS
    backend_name: Fp8Backend = "auto"
    recorder: Recorder = field(default_factory=Recorder, compare=False)
    saves_e5m6: bool = False
    """Whether inputs are saved in E5M6, as those of the Linear after attention are."""

    def backend(self, device: torch.device) -> Backend:
        """Who computes for tensors on `device`."""
        return backend_for(device, self.backend_name)

    def activations(self, x: Tensor) -> Quantized:
        """The input of the forward product, by tiles of 1 x 128; to be saved."""
        return self._quantize("activations", x, ACTIVATION)

    def weights(self, w: Tensor) -> Quantized:
        """Blocks of 128 x 128, which serve forward and backward products."""
        if self.config.fp4_experts and self.part == "routed_experts":
            return self._noted("weights", w, through_fp4(w))
        return self._quantize("weights", w, BLOCK)

    def gradients(self, dy: Tensor, counts: Sequence[int] | None = None) -> Quantized:
        """The gradient that the input's gradient is made of, by tiles of 1 x 128."""
        if self.config.gradient_scaling == "block":
            return self._quantize("gradients", dy, BLOCK, counts, saved=False)
        return self._quantize("gradients", dy, ACTIVATION, saved=False)

    def gradients_along_tokens(self, dy: Tensor, counts: Sequence[int] | None = None) -> Quantized:
        """The gradient that the weight's is made of, by tiles of 128 x 1; of each expert apart."""
        tile = BLOCK if self.config.gradient_scaling == "block" else ALONG_TOKENS
        return self._quantize("gradients_along_tokens", dy, tile, counts, saved=False)

    def activations_along_tokens(
        self, x: Tensor | Quantized, counts: Sequence[int] | None = None
    ) -> Quantized:
        """The input that the weight's gradient is made of, quantised again from what was saved."""
        return self._quantize("activations_along_tokens", x, ALONG_TOKENS, counts, saved=False)

    def input_to_save(self, x: Tensor, x8: Quantized) -> tuple[Tensor, Tensor]:
        """What of the input [T, I] is saved for the backward pass."""
        if not self.saves_e5m6:
            return x8.values, x8.scales
        packed = self.backend(x.device).quantize_e5m6(x)
        return packed.words, packed.scales

    def saved_input(
        self, values: Tensor, scales: Tensor, tile: Tile, columns: int
    ) -> Tensor | Quantized:
        """What `input_to_save` gave, for `activations_along_tokens`."""
        if not self.saves_e5m6:
            return Quantized(values, scales, tile)
        return self.backend(values.device).dequantize_e5m6(QuantizedE5M6(values, scales, columns))

    def _quantize(
        self,
        kind: str,
        x: Tensor | Quantized,
        tile: Tile,
        counts: Sequence[int] | None = None,
        *,
        saved: bool = True,
    ) -> Quantized:
        if self.config.scaling == "tensor":
            # An expert's rows have a scale of their own even so, where their sums are apart.
            tile = _WHOLE
        device = x.values.device if isinstance(x, Quantized) else x.device
        q = self.backend(device).quantize(x, tile, counts=counts, saved=saved)
        return self._noted(kind, x, q)

    def _noted(self, kind: str, x: Tensor | Quantized, q: Quantized) -> Quantized:
        if self.recorder.watching:
            self.recorder.note(f"{self.part}_{kind}", x, q)
        return q


@dataclass(frozen=True, slots=True)
class Numerics:
    """What a whole model computes in."""

    precision: Precision = "high"
    config: Fp8Config = _DEFAULTS
    backend: Fp8Backend = "auto"
    recorder: Recorder = field(default_factory=Recorder, compare=False)

    def of(self, part: Part, *, saves_e5m6: bool = False) -> Fp8 | None:
        """The scheme of one part; none for high precision."""
        if self.precision == "high" or getattr(self.config, part) == "high":
            return None
        return Fp8(part, self.config, self.backend, self.recorder, saves_e5m6)

    def counts_at(self, step: int) -> bool:
        """Whether what FP8 does to tensors is counted at `step`."""
        return self.precision == "fp8" and self.config.counts_at(step)


def settle(numerics: Numerics, device: torch.device) -> tuple[Numerics, str]:
    """(what can be computed on `device`, in words): high precision where it has no FP8 at all.

    MachineError if the backend that was asked for cannot run there, or cannot compute what was.
    """
    if numerics.precision == "high":
        return numerics, "high precision"
    choice = choose(device, numerics.backend)
    if choice.backend is None:
        return replace(numerics, precision="high"), f"high precision, not FP8: {choice.reason}"
    coarse = numerics.config.coarse
    if coarse is not None and choice.backend.name not in ("cpu", "reference"):
        raise MachineError(
            f"fp8.{coarse}: kernels of the {choice.backend.name} backend know tiles of 1 x 128 and "
            "blocks of weights alone; set cluster.fp8_backend = 'reference', or drop it"
        )
    return numerics, f"{choice.backend.name}: {choice.reason}"


def schemes(model: nn.Module) -> dict[str, Fp8]:
    """The scheme of each module of `model` that computes in FP8, by the module's name."""
    found = ((name, getattr(module, "scheme", None)) for name, module in model.named_modules())
    return {name: scheme for name, scheme in found if isinstance(scheme, Fp8)}


HIGH = Numerics()
"""Every product in the tensors' own type."""

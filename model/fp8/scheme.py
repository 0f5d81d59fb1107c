"""How each part of a model computes its products: which are FP8, by which tiles, and who is told.

A model is built with one `Numerics`; each of its Linears and experts asks it for the scheme of its
part, and none means high precision. The mathematics above them does not see it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from configs.train import Fp8Backend, Fp8Config, Precision
from model.fp8.backends import Backend, backend_for, choose
from model.fp8.fp4 import through_fp4
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Kept, Quantized, Tile
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
    recorder: Recorder = field(default_factory=Recorder)
    keeps_e5m6: bool = False
    """Whether inputs wait for the backward pass in E5M6: those of the Linear after attention."""

    def backend(self, device: torch.device) -> Backend:
        """Who computes for tensors on `device`."""
        return backend_for(device, self.backend_name)

    def activations(self, x: Tensor) -> Quantized:
        """The input of the forward product, by tiles of 1 x 128; to be kept."""
        return self._quantize("activations", x, ACTIVATION)

    def weights(self, w: Tensor) -> Quantized:
        """Blocks of 128 x 128, which serve forward and backward products."""
        if self.config.fp4_experts and self.part == "routed_experts":
            return self._noted("weights", w, through_fp4(w))
        return self._quantize("weights", w, BLOCK)

    def gradients(self, dy: Tensor) -> Quantized:
        """The gradient that the input's gradient is made of, by tiles of 1 x 128."""
        tile = BLOCK if self.config.gradient_scaling == "block" else ACTIVATION
        return self._quantize("gradients", dy, tile, kept=False)

    def gradients_along_tokens(self, dy: Tensor, counts: Sequence[int] | None = None) -> Quantized:
        """The gradient that the weight's is made of, by tiles of 128 x 1; of each expert apart."""
        tile = BLOCK if self.config.gradient_scaling == "block" else ALONG_TOKENS
        return self._quantize("gradients_along_tokens", dy, tile, counts, kept=False)

    def activations_along_tokens(
        self, x: Tensor | Quantized, counts: Sequence[int] | None = None
    ) -> Quantized:
        """The input that the weight's gradient is made of, quantised again from what was kept."""
        return self._quantize("activations_along_tokens", x, ALONG_TOKENS, counts, kept=False)

    def hold(self, x: Tensor, x8: Quantized) -> tuple[Tensor, Tensor]:
        """What of the input [T, I] waits for the backward pass."""
        if not self.keeps_e5m6:
            return x8.values, x8.scales
        kept = self.backend(x.device).keep(x)
        return kept.words, kept.scales

    def held(self, values: Tensor, scales: Tensor, tile: Tile, columns: int) -> Tensor | Quantized:
        """What `hold` gave, for `activations_along_tokens`."""
        if not self.keeps_e5m6:
            return Quantized(values, scales, tile)
        return self.backend(values.device).read(Kept(values, scales, columns))

    def _quantize(
        self,
        kind: str,
        x: Tensor | Quantized,
        tile: Tile,
        counts: Sequence[int] | None = None,
        *,
        kept: bool = True,
    ) -> Quantized:
        if self.config.scaling == "tensor":
            # An expert's rows have a scale of their own even so.
            tile = _WHOLE
        device = x.values.device if isinstance(x, Quantized) else x.device
        q = self.backend(device).quantize(x, tile, counts=counts, kept=kept)
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
    recorder: Recorder = field(default_factory=Recorder)

    def of(self, part: Part, *, keeps_e5m6: bool = False) -> Fp8 | None:
        """The scheme of one part; none for high precision."""
        if self.precision == "high" or getattr(self.config, part) == "high":
            return None
        return Fp8(part, self.config, self.backend, self.recorder, keeps_e5m6)


def settle(numerics: Numerics, device: torch.device) -> tuple[Numerics, str]:
    """(what can be computed on `device`, in words): high precision where it has no FP8 at all.

    MachineError if the backend that was asked for cannot run there.
    """
    if numerics.precision == "high":
        return numerics, "high precision"
    choice = choose(device, numerics.backend)
    if choice.backend is None:
        return replace(numerics, precision="high"), f"high precision, not FP8: {choice.reason}"
    return numerics, f"{choice.backend.name}: {choice.reason}"


HIGH = Numerics()
"""Every product in the tensors' own type."""

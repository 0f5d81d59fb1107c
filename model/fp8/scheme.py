"""Which parts of a model are FP8, and how the operands of a part's products are quantised.

A model is built with one `Numerics`. Each of its Linears and expert layers asks it for the scheme
of its part (`Fp8`), and gets None where that part stays in high precision. The mathematics above
them does not see which it is.

A scheme has one method for each operand of the three products (`model/fp8/products.py`):

| operand | fprop | dgrad | wgrad |
|---|---|---|---|
| x | `activations` | | `activations_along_tokens` |
| W | `weights` | `weights` | |
| dy | | `gradients` | `gradients_along_tokens` |

Each operand is also shown to a recorder, which counts what FP8 does to it while it watches.

Axes: T tokens (or rows sorted by expert), I inputs, O outputs.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from configs.errors import MachineError
from configs.train import Fp8Backend, Fp8Config, Precision
from model.fp8.backends import Backend, backend_for, choose
from model.fp8.fp4 import through_fp4
from model.fp8.groups import Groups
from model.fp8.quantized import (
    ACTIVATION,
    ALONG_TOKENS,
    BLOCK,
    Quantized,
    QuantizedE5M6,
    Saved,
    Tile,
)
from model.fp8.recorder import Recorder
from model.weight_cache import cached, fit_to_learn

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
"""One scale for a whole tensor."""
_DEFAULTS = Fp8Config()


@dataclass(frozen=True, slots=True)
class Fp8:
    """How the products of one part are quantised (DeepSeek-V3, section 3.3.2)."""

    part: Part
    config: Fp8Config = _DEFAULTS
    backend_name: Fp8Backend = "auto"
    recorder: Recorder = field(default_factory=Recorder, compare=False)
    saves_e5m6: bool = False
    """Whether inputs are saved in E5M6, as those of the Linear after attention are (3.3.3)."""

    def backend(self, device: torch.device) -> Backend:
        """What casts and multiplies tensors on `device`; MachineError if nothing can."""
        return backend_for(device, self.backend_name)

    @property
    def by_row(self) -> bool:
        """Whether each row of an input is quantised by itself, whatever stands beside it."""
        return self.config.scaling != "tensor"

    def activations(self, x: Tensor) -> Quantized:
        """x [T, I] for the forward product, by tiles of 1 x 128."""
        return self._quantize("activations", x, ACTIVATION)

    def weights(
        self,
        *weights: Tensor,
        matrices: int | None = None,
        half: int | None = None,
        learning: bool = True,
    ) -> Quantized:
        """W [..., O, I] by blocks of 128 x 128, for the forward product and the input gradient.

        W is one weight, or the rows of several one above the other: [O, I] as so many `matrices`
        [G, O / G, I], or the first or second `half` of the rows of each matrix. It is quantised
        once between two changes of its weights (`model.weight_cache`). Only with `learning` is
        there an input gradient.
        """
        device = weights[0].device
        by_column = learning and self.backend(device).reads_columns

        def whole() -> Tensor:
            w = weights[0].detach() if len(weights) == 1 else torch.cat(weights).detach()
            if matrices is not None:
                w = w.unflatten(0, (matrices, -1))
            return w if half is None else w.chunk(2, -2)[half].contiguous()

        form = self, matrices, half, by_column
        q = _cached_together(weights, form, lambda: self._quantized_weight(whole(), by_column))
        if self.recorder.watching:
            counted = whole() if self.recorder.counting else weights[0]
            self.recorder.note(f"{self.part}_weights", counted, q)
        return q

    def _quantized_weight(self, w: Tensor, by_column: bool) -> Quantized:
        if self.config.fp4_experts and self.part == "routed_experts":
            q = through_fp4(w)
            # Bytes are what every device can transpose.
            codes = q.values.view(torch.uint8).mT.contiguous().mT.view(q.values.dtype)
            return replace(q, by_column=codes) if by_column else q
        tile = _WHOLE if self.config.scaling == "tensor" else BLOCK
        return self.backend(w.device).quantize(w, tile, by_column=by_column)

    def gradients(self, dy: Tensor, groups: Groups | None = None) -> Quantized:
        """dy [T, O] for the input gradient, by tiles of 1 x 128."""
        if self.config.gradient_scaling == "block":
            return self._quantize("gradients", dy, BLOCK, groups, saved=False)
        return self._quantize("gradients", dy, ACTIVATION, saved=False)

    def gradients_along_tokens(self, dy: Tensor, groups: Groups | None = None) -> Quantized:
        """dy [T, O] for the weight gradient, by tiles of 128 x 1 of each expert's rows."""
        tile = BLOCK if self.config.gradient_scaling == "block" else ALONG_TOKENS
        return self._quantize("gradients_along_tokens", dy, tile, groups, saved=False)

    def input_to_save(self, x: Tensor, x8: Quantized) -> Saved:
        """What is saved of x [T, I] for the weight gradient: `x8`, which is x in E4M3, or E5M6."""
        return self.backend(x.device).quantize_e5m6(x) if self.saves_e5m6 else x8

    def activations_along_tokens(
        self, x: Tensor | Saved, groups: Groups | None = None
    ) -> Quantized:
        """x [T, I], as it was saved, for the weight gradient, by tiles of 128 x 1.

        What was quantised by tiles of 1 x 128 is rounded a second time.
        """
        if isinstance(x, QuantizedE5M6):
            x = self.backend(x.words.device).dequantize_e5m6(x)
        return self._quantize("activations_along_tokens", x, ALONG_TOKENS, groups, saved=False)

    def _quantize(
        self,
        kind: str,
        x: Tensor | Quantized,
        tile: Tile,
        groups: Groups | None = None,
        *,
        saved: bool = True,
    ) -> Quantized:
        if self.config.scaling == "tensor":
            # An expert's rows have a scale of their own even so, where their sums are apart.
            tile = _WHOLE
        device = x.values.device if isinstance(x, Quantized) else x.device
        q = self.backend(device).quantize(x, tile, groups=groups, saved=saved)
        if self.recorder.watching:
            self.recorder.note(f"{self.part}_{kind}", x, q)
        return q


def _cached_together(
    weights: Sequence[Tensor], form: Hashable, make: Callable[[], Quantized]
) -> Quantized:
    """What `make` makes of all of the weights, until any of them changes."""
    first, *others = weights
    # Whoever forgets a weight forgets its mark too, and gets another.
    marks = [cached(other, "mark", object) for other in others]
    found = cached(first, form, dict[str, Any])
    if "made" not in found or any(a is not b for a, b in zip(found["of"], marks, strict=True)):
        found["made"], found["of"] = fit_to_learn(make), marks
    made: Quantized = found["made"]
    return made


@dataclass(frozen=True, slots=True)
class Numerics:
    """The precision of a whole model, part by part."""

    precision: Precision = "high"
    config: Fp8Config = _DEFAULTS
    backend: Fp8Backend = "auto"
    recorder: Recorder = field(default_factory=Recorder, compare=False)
    compute: torch.dtype | None = None
    """Type of the stream of states, from the embedding on, and of the products that are not FP8.
    None is the weights' own. Narrower, weights are cast at the product (`model.weight_cache`);
    gate, losses, softmax and the statistics of norms stay float32."""

    def of(self, part: Part, *, saves_e5m6: bool = False) -> Fp8 | None:
        """The scheme of one part; None for high precision."""
        if self.precision == "high" or getattr(self.config, part) == "high":
            return None
        return Fp8(part, self.config, self.backend, self.recorder, saves_e5m6)

    def counts_at(self, step: int) -> bool:
        """Whether what FP8 does to tensors is counted at `step`."""
        return self.precision == "fp8" and self.config.counts_at(step)


def settle(numerics: Numerics, device: torch.device) -> tuple[Numerics, str]:
    """(numerics that `device` can compute, a reason): high precision where it has no FP8 at all.

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

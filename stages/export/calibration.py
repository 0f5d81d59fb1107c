"""What activations come to on training text, channel by channel: measured, never guessed.

Axes: N rows, S tokens of a row, C channels.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from configs.errors import ExportError
from configs.seed import derive
from model.layers import RMSNorm
from model.transformer import Transformer
from stages.artifacts import Corpus
from stages.segments import segments_of
from stages.shards import Int64, Rows

BATCH_ROWS = 8
OUTPUT = "self_attn.o_proj"
"""Ends the name of the module whose inputs no norm gives."""
_NORM_OF = {
    "q_proj": "input_layernorm",
    "q_a_proj": "input_layernorm",
    "kv_a_proj_with_mqa": "input_layernorm",
    "q_b_proj": "self_attn.q_a_layernorm",
}
"""Which norm of its layer gives a module its inputs."""


@dataclass(slots=True)
class Range:
    """Between what the channels lay."""

    low_C: Tensor
    high_C: Tensor

    def widen(self, x: Float[Tensor, "*B C"]) -> None:
        """Take in what was seen: nothing where a row is too short for an entry of a compressor."""
        flat = x.detach().flatten(0, -2).float().cpu()
        if not len(flat):
            return
        self.low_C = torch.minimum(self.low_C, flat.amin(0))
        self.high_C = torch.maximum(self.high_C, flat.amax(0))

    @property
    def absmax_C(self) -> Float[Tensor, " C"]:
        """The largest magnitude of each channel."""
        return torch.maximum(-self.low_C, self.high_C)

    def over(self, divisor_C: Float[Tensor, " C"]) -> "Range":
        """The range of what is divided by `divisor_C`, channel by channel."""
        return Range(self.low_C / divisor_C, self.high_C / divisor_C)

    @property
    def whole(self) -> tuple[float, float]:
        """Between what all channels together lay."""
        return float(self.low_C.min()), float(self.high_C.max())


def calibration_rows(corpus: Corpus, count: int, *, seed: int) -> Int64:
    """At most `count` rows [N, S] of training text, drawn by the seed.

    ExportError if the corpus has none.
    """
    if not corpus.train_rows:
        raise ExportError(
            f"{corpus.uri}: holds no training text, on which activations are measured; set "
            "export.calibration_rows = 0, which has them scaled token by token"
        )
    rows = Rows(corpus.path("train"))
    generator = np.random.default_rng(derive(seed, "export", "calibration"))
    return rows.take(np.sort(generator.permutation(len(rows))[:count]))


@torch.no_grad()
def measure(model: Transformer, rows_NS: Int64) -> dict[str, Range]:
    """Ranges by module name: of what norms give, and of what attention's last projection takes.

    ExportError if one of them is not finite.
    """
    found: dict[str, Range] = {}
    hooks = [
        module.register_forward_hook(partial(_saw_output, found, name))
        for name, module in model.named_modules()
        if isinstance(module, RMSNorm)
    ]
    hooks += [
        module.register_forward_pre_hook(partial(_saw_input, found, name))
        for name, module in model.named_modules()
        if name.endswith(OUTPUT)
    ]
    device = next(model.parameters()).device
    try:
        for start in range(0, len(rows_NS), BATCH_ROWS):
            tokens_BS = torch.from_numpy(rows_NS[start : start + BATCH_ROWS])
            model(tokens_BS.to(device), segments_of(tokens_BS).to(device))
    finally:
        for hook in hooks:
            hook.remove()
    for name, one in found.items():
        if not one.absmax_C.isfinite().all():
            raise ExportError(
                f"calibration: what {name} gives on training text is not finite, so no scale fits "
                "it; export a checkpoint from before the training broke"
            )
    return found


def of_weight(ranges: Mapping[str, Range], name: str) -> Range:
    """Of the inputs of an attention weight, by its name: `model.layers.0.self_attn.q_b_proj...`."""
    layer, _, rest = name.partition(".self_attn.")
    module = rest.removesuffix(".weight")
    if module in _NORM_OF:
        return ranges[f"{layer}.{_NORM_OF[module]}"]
    return ranges[name.removesuffix(".weight")]


def _saw(found: dict[str, Range], name: str, x: Tensor) -> None:
    if name not in found:
        zeros_C = torch.zeros(x.shape[-1])
        found[name] = Range(zeros_C, zeros_C)
    found[name].widen(x)


def _saw_output(
    found: dict[str, Range], name: str, _: nn.Module, __: tuple[Tensor, ...], output: Tensor
) -> None:
    _saw(found, name, output)


def _saw_input(
    found: dict[str, Range], name: str, _: nn.Module, inputs: tuple[Tensor, ...]
) -> None:
    _saw(found, name, inputs[0])

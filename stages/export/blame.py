"""Which tensor's rounding moves a variant's answers most, if each lies within its own bound.

Tensors of the variant are put into the source, half of the candidates at a time, and the half that
moves the logits further is searched on: first among layers, then among the tensors of that layer.
So a layer and a tensor are found in 2 log2(layers) + 2 log2(tensors) passes over a few rows, some
thirty for a model of 61 layers and 256 experts. Rounding errors add up nearly, so the heaviest half
holds the heaviest tensor wherever one stands out; where none does, any answer is as good.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from model.transformer import Transformer
from model.weights.config import table_of
from model.weights.files import load_state
from stages.export import parity
from stages.export.formats import Format
from stages.export.tensors import Reading, TensorFolder
from stages.shards import Int64


@dataclass(frozen=True, slots=True)
class Culprit:
    """A tensor whose rounding moves the logits more than that of others."""

    layer: str
    tensor: str
    kl_nats: float
    """Mean KL(source || source with this tensor alone as the variant has it)."""
    layer_kl_nats: float
    """The same with all tensors of its layer."""
    whole_kl_nats: float
    """The same with all tensors."""
    measured_kl_nats: float
    """Of the variant itself, whose activations may be rounded too."""

    def __str__(self) -> str:
        """As the end of a sentence that says what is wrong."""
        if self.whole_kl_nats < self.measured_kl_nats / 2:
            return (
                f"; activations are to blame before weights, whose rounding alone makes "
                f"{self.whole_kl_nats:.3g} of {self.measured_kl_nats:.3g} nats: raise "
                "export.calibration_rows, or set export.smooth or export.rotate"
            )
        return (
            f"; {self.tensor} is to blame before others: its rounding alone makes "
            f"{self.kl_nats:.3g} of {self.whole_kl_nats:.3g} nats, that of {self.layer} "
            f"{self.layer_kl_nats:.3g}"
        )


def find_culprit(
    source: TensorFolder,
    stored: TensorFolder,
    form: Format,
    reference: Transformer,
    rows_NS: Int64,
    measured_kl_nats: float,
) -> Culprit:
    """The culprit by the first rows of `rows_NS`, one batch of them; `reference` is the source, and
    `measured_kl_nats` what the variant came to on all of them."""
    copies = table_of(form.model).copies(form.model)
    names = dict.fromkeys(name for name in source.names if name not in copies)
    mixed = Transformer(form.model).to(parity.device_of(reference)).eval()
    rows_BS = rows_NS[: parity.BATCH_ROWS]

    def read(swapped: frozenset[str], name: str) -> Tensor:
        if name in swapped:
            return form.decode(name, stored.read)
        x = source.read(name)
        return x.float() if x.is_floating_point() else x

    def kl(swapped: Sequence[str]) -> float:
        load_state(mixed, Reading(names, partial(read, frozenset(swapped))))
        return parity.compare(reference, mixed, rows_BS).mean_kl_nats

    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(parity.layer_of(name), []).append(name)
    layer = _heaviest(list(layers), lambda some: kl([n for one in some for n in layers[one]]))
    tensor = _heaviest(layers[layer], kl)
    return Culprit(layer, tensor, kl([tensor]), kl(layers[layer]), kl([*names]), measured_kl_nats)


def _heaviest(candidates: Sequence[str], weigh: Callable[[Sequence[str]], float]) -> str:
    """The candidate that halving by weight ends at."""
    while len(candidates) > 1:
        middle = len(candidates) // 2
        candidates = max((candidates[:middle], candidates[middle:]), key=weigh)
    return candidates[0]

"""A loss as a trainer takes it: of what a model predicts of one rank's rows."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from cluster.trainer import Batch, LossSpec
from model.transformer import Transformer


def part_of(
    loss: LossSpec, model: Transformer, batch: Batch, totals: Mapping[str, float] | None = None
) -> tuple[Tensor, dict[str, Any]]:
    """The loss of these rows and its metrics; without `totals` they are all the rows there are."""
    totals = loss.counts(batch) if totals is None else totals
    predicted = model.predictions(loss.reads(batch), ahead=loss.ahead)
    value, metrics = loss(predicted, batch, totals)
    return value, dict(metrics)

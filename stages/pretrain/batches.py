"""Training batches as a pure function of the step, so that a loader's position is one number."""

from dataclasses import dataclass

import torch
from torch import Tensor

from stages.shards import Rows, row_order


@dataclass
class PackedBatches:
    """Rows of a corpus in training order. Holds a path and numbers; opens its files when used."""

    folder: str
    batch_sequences: int
    seed: int
    rows_before: int = 0
    """Rows in training order that were consumed before the first step."""

    def __post_init__(self) -> None:
        self._rows: Rows | None = None

    def batch(self, step: int, *, rank: int, world: int) -> dict[str, Tensor]:
        """{"tokens": int64 [batch_sequences / world, S]}: this rank's rows of `step`."""
        if self._rows is None:
            self._rows = Rows(self.folder)
        share = self.batch_sequences // world
        start = self.rows_before + (step - 1) * self.batch_sequences + rank * share
        rows = self._rows.take(row_order(len(self._rows), start, share, seed=self.seed))
        return {"tokens": torch.from_numpy(rows)}

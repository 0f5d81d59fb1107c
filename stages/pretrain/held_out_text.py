"""The loss on held-out text while a model is trained: the same rows at each measurement.

The loss is what training minimises of the next token, in nats a token: computed in the precision
that is trained in, with attention as the step has it. So what lies between it and the training loss
of that step is how well text is known, and not how it is computed; what the finished weights do in
full precision is for the evaluation to say.

Axes: N rows, B rows of a batch on this rank, S positions.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from configs.errors import DataError
from configs.seed import derive
from configs.train import PretrainSpec
from model.transformer import Transformer
from stages.artifacts import Corpus
from stages.framing import BOS_ID
from stages.pretrain.objective import PretrainLoss, scored_targets
from stages.shards import Int64, Rows
from stages.telemetry import HELD_OUT

LOSS = f"{HELD_OUT}loss"
"""Nats a token over all measured rows; `LOSS/SOURCE` over those of one source."""


@dataclass(frozen=True)
class HeldOutText:
    """Rows of each source, and when they are measured. Opens its files when it is used."""

    folder: str
    """Of the corpus's held-out rows, one folder a source."""
    rows: Mapping[str, Sequence[int]]
    """By source, in the order of their names."""
    batch_sequences: int
    """Rows of a pass over all ranks, at most: as many as training has in memory at a time."""
    every_steps: int
    steps: int
    """Of the whole training."""
    loss: Callable[[int], PretrainLoss]
    """What is minimised at a step."""

    def due(self, step: int) -> bool:
        """Whether to measure after `step`, of which 0 is before the first."""
        return step % self.every_steps == 0 or step == self.steps

    def batches(self, *, rank: int, world: int) -> Iterator[dict[str, Tensor]]:
        """This rank's share of each pass: `tokens` int64 [B, S], `source` int64 [B], its number.

        Every rank has equally many rows; those that are missing are padding, of no source.
        """
        tokens_NS, source_N = self._read()
        share = -(-min(self.batch_sequences, len(tokens_NS)) // world)
        lacking = -len(tokens_NS) % (share * world)
        tokens_NS = np.pad(tokens_NS, ((0, lacking), (0, 0)), constant_values=BOS_ID)
        source_N = np.pad(source_N, (0, lacking), constant_values=-1)
        for start in range(rank * share, len(tokens_NS), world * share):
            part = slice(start, start + share)
            yield {
                "tokens": torch.from_numpy(tokens_NS[part]),
                "source": torch.from_numpy(source_N[part]),
            }

    def sums(
        self, model: Transformer, batch: Mapping[str, Tensor], *, step: int
    ) -> dict[str, float]:
        """Nats and scored tokens of each source in this batch, as the loss of `step` has them."""
        nats_B = self.loss(max(1, step)).next_token_nats(model, batch["tokens"])
        targets_B = scored_targets(batch["tokens"])[0].sum(1)
        # On the host: not every device has float64.
        nats_B, targets_B, source_B = nats_B.cpu().double(), targets_B.cpu(), batch["source"].cpu()
        found: dict[str, float] = {}
        for number, name in enumerate(self.rows):
            mine_B = source_B == number
            found[f"nats/{name}"] = float(nats_B[mine_B].sum())
            found[f"targets/{name}"] = float(targets_B[mine_B].sum())
        return found

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Nats a token, of each source and of all tokens together."""
        nats, targets = (
            {name: sums[f"{kind}/{name}"] for name in self.rows} for kind in ("nats", "targets")
        )
        by_source = {f"{LOSS}/{name}": nats[name] / targets[name] for name in self.rows}
        return by_source | {LOSS: sum(nats.values()) / sum(targets.values())}

    def _read(self) -> tuple[Int64, Int64]:
        """All rows, and the number of each one's source."""
        blocks = [
            Rows(f"{self.folder}/{name}").take(np.array(rows)) for name, rows in self.rows.items()
        ]
        numbers = np.repeat(np.arange(len(blocks)), [len(block) for block in blocks])
        return np.concatenate(blocks), numbers


def held_out_text(
    config: PretrainSpec,
    corpus: Corpus,
    loss: Callable[[int], PretrainLoss],
    *,
    micro_batches: int = 1,
) -> HeldOutText | None:
    """What the config has measured of the corpus; none if it asks for nothing.

    DataError if there is nothing to measure.
    """
    train = config.pretrain
    if not train.evaluate_every_steps:
        return None
    rows = {
        name: picked
        for name, count in sorted(corpus.held_out_rows.items())
        if count and (picked := _pick(config, corpus, name))
    }
    if not rows:
        raise DataError(
            f"{corpus.uri}: no held-out row of {len(corpus.held_out_rows)} sources has a token to "
            f"predict, and pretrain.evaluate_every_steps = {train.evaluate_every_steps}; raise "
            "data.held_out_share, or set the latter to 0"
        )
    return HeldOutText(
        folder=str(corpus.path("held_out")),
        rows=rows,
        batch_sequences=train.batch_sequences // micro_batches,
        every_steps=train.evaluate_every_steps,
        steps=train.steps,
        loss=loss,
    )


def _pick(config: PretrainSpec, corpus: Corpus, source: str) -> tuple[int, ...]:
    """Rows of a source, drawn by the seed from those that have a token to predict."""
    rows = Rows(corpus.path("held_out", source))
    scored = np.flatnonzero((rows.take(np.arange(len(rows)))[:, 1:] != BOS_ID).any(axis=1))
    rng = np.random.default_rng(derive(config.seed, "pretrain", "held_out", source))
    drawn = rng.permutation(scored)[: config.pretrain.evaluate_rows]
    return tuple(sorted(drawn.tolist()))

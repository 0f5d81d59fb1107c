"""A loss, batches and jobs that tests of the cluster share, importable by its workers."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from cluster.fit import FitJob
from cluster.output import Output
from cluster.trainer import LossSpec
from configs.train import BalanceConfig, OptimConfig
from model.passes import Whole
from model.transformer import Predictions, Transformer
from stages.telemetry import open_metrics
from tests.references import TINY
from tests.supplies import saves_of

STEPS, SEQUENCES, LENGTH = 7, 8, 12
OPTIM = OptimConfig(learning_rate=1e-2, epsilon=1e-3, max_grad_norm=0.5)
"""A large epsilon: Adam then amplifies a gradient's rounding error at most lr / epsilon = 10 times,
however small the gradient is."""


@dataclass(frozen=True)
class NextToken:
    """Mean cross-entropy of the next token, plus that of the one after it."""

    scale: float = 1.0

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Sequences on this rank."""
        return {"sequences": float(len(batch["tokens"]))}

    @property
    def ahead(self) -> bool:
        """Two tokens are predicted."""
        return True

    def reads(self, batch: Mapping[str, Tensor]) -> Whole:
        """The rows."""
        return Whole(batch["tokens"])

    def __call__(
        self, predicted: Predictions, batch: Mapping[str, Tensor], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, float]]:
        """This rank's part."""
        tokens = batch["tokens"]
        assert predicted.after_next_BSV is not None
        parts = [
            F.cross_entropy(
                logits[:, :-ahead].flatten(0, 1), tokens[:, ahead:].flatten(), reduction="sum"
            )
            / (totals["sequences"] * (LENGTH - ahead))
            for ahead, logits in ((1, predicted.next_BSV), (2, predicted.after_next_BSV))
        ]
        return self.scale * (parts[0] + parts[1]), {"next": float(parts[0].detach())}


@dataclass(frozen=True)
class RandomBatches:
    """Batches drawn from the step's own seed, from half of the vocabulary so that there is
    something to learn."""

    seed: int = 0

    def batch(self, step: int, *, rank: int, world: int) -> dict[str, Tensor]:
        """This rank's rows."""
        generator = torch.Generator().manual_seed(1000 * self.seed + step)
        rows = torch.randint(TINY.vocab_size // 2, (SEQUENCES, LENGTH), generator=generator)
        return {"tokens": rows.chunk(world)[rank].clone()}


class Stubborn:
    """A sampler that keeps its first weights, whatever it is given."""

    def update_weights(self, version: int, *shards: object) -> int:
        """The version that it still holds."""
        return 0


def next_logprobs(model: Transformer, batch: Mapping[str, Tensor]) -> Tensor:
    """Log-probability of each next token at temperature 0.7; 0 in the last column."""
    tokens = batch["tokens"]
    logprobs = (model(tokens)[:, :-1] / 0.7).log_softmax(-1)
    return F.pad(logprobs.gather(-1, tokens[:, 1:, None]).squeeze(-1), (0, 1))


def repeatable(report: Mapping[str, Any]) -> dict[str, Any]:
    """What a step tells that is the same whenever it is taken from the same state."""
    return {name: value for name, value in report.items() if not name.endswith("_seconds")}


def allowed() -> None:
    """This build may write."""


def rate(step: int) -> float:
    """The learning rate of every step."""
    return 0.01


def at_every_step(loss: LossSpec, step: int) -> LossSpec:
    """The same at each."""
    return loss


def saves(builder: Path) -> str:
    """Where a builder's saves lie."""
    return str(builder / "resume" / "saves")


def job(builder: Path, loss: LossSpec, **changes: Any) -> FitJob:
    """Seven steps in the folder of a builder, with a save at every second and at the last."""
    settings: dict[str, Any] = {
        "model": TINY,
        "optim": OPTIM,
        "balance": BalanceConfig(bias_update_speed=0.01),
        "precision": "fp8",
        "seed": 0,
        "steps": STEPS,
        "tokens_per_step": SEQUENCES * LENGTH,
        "checkpoint_every_steps": 2,
        "learning_rate": rate,
        "indexer_learning_rate": rate,
        "source": RandomBatches(),
        "loss": partial(at_every_step, loss),
        "saves": saves_of(builder),
        "open_log": partial(open_metrics, str(builder)),
        "may_write": allowed,
        "threads": 1,
        "output": Output(str(builder / "logs"), "trainer"),
    }
    return FitJob(**settings | changes)

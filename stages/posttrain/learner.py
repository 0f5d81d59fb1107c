"""GRPO as the loop sees it, and as a loss that trainer ranks compute on their part of a batch.

Axes: N sequences, T positions, G answers of a group.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from cluster.pool import Score
from cluster.trainer import LossSpec
from configs.rl import GrpoConfig, PosttrainConfig
from model.passes import Whole
from model.transformer import Predictions, Transformer
from stages.framing import EOS_ID
from stages.posttrain.objective import advantages, grpo_loss, require_finite, token_logprobs
from stages.posttrain.rollout import ScoredRollout, collate


@dataclass(frozen=True, slots=True)
class NextTokenLogprobs:
    """Log-probability of each next token, for the reference model."""

    temperature: float

    def __call__(self, model: Transformer, batch: Mapping[str, Tensor]) -> Tensor:
        """[N, T]; see `token_logprobs`."""
        tokens_NT = batch["tokens"]
        return token_logprobs(model(tokens_NT), tokens_NT, temperature=self.temperature)


@dataclass(frozen=True, slots=True)
class GrpoLoss:
    """`grpo_loss` over a batch of `minibatches`, each rank holding some of its rows."""

    config: GrpoConfig
    temperature: float

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """Sequences on this rank. TrainingError if what samplers or the reference said of them is
        not finite."""
        for name in ("behaviour_logprobs", "reference_logprobs"):
            if name in batch:
                require_finite(name, batch[name], batch["mask"])
        return {"sequences": float(batch["tokens"].shape[0])}

    @property
    def ahead(self) -> bool:
        """Answers are drawn one token at a time."""
        return False

    def reads(self, batch: Mapping[str, Tensor]) -> Whole:
        """Prompts with their answers."""
        return Whole(batch["tokens"])

    def __call__(
        self, predicted: Predictions, batch: Mapping[str, Tensor], totals: Mapping[str, float]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's part of the loss and of its metrics."""
        logprobs_NT = token_logprobs(
            predicted.next_BSV, batch["tokens"], temperature=self.temperature
        )
        behaviour_NT = batch["behaviour_logprobs"]
        loss, metrics = grpo_loss(
            logprobs_NT,
            behaviour_NT,
            # Without a KL term there is no reference; any finite stand-in has weight zero.
            batch.get("reference_logprobs", behaviour_NT),
            batch["advantages"],
            batch["mask"],
            config=self.config,
            num_sequences=int(totals["sequences"]),
        )
        # A maximum does not add up over ranks, and a KL to a stand-in says nothing.
        hidden = {"ratio_max"} | ({"kl"} if "reference_logprobs" not in batch else set())
        return loss, {name: value for name, value in metrics.items() if name not in hidden}


@dataclass(frozen=True, slots=True)
class Grpo:
    """All that the loop knows of the algorithm: another one needs these three members."""

    config: GrpoConfig
    temperature: float
    """The samplers'."""

    @property
    def reference(self) -> Score | None:
        """What of each batch the starting weights are asked; none if the loss has no use for it.

        The answer joins the batch as `reference_logprobs`.
        """
        return NextTokenLogprobs(self.temperature) if self.config.kl_weight > 0 else None

    @property
    def loss(self) -> LossSpec:
        """What the trainers minimise."""
        return GrpoLoss(self.config, self.temperature)

    def advantages(self, rewards_G: Sequence[float]) -> list[float]:
        """How much better each answer of a group is than expected."""
        return advantages(rewards_G)


def minibatches(
    rollouts: Sequence[ScoredRollout], config: PosttrainConfig
) -> Iterator[dict[str, Tensor]]:
    """The step's answers in `config.minibatches` parts of whole groups, as tensors."""
    rows = len(rollouts) // config.minibatches
    for start in range(0, len(rollouts), rows):
        batch = collate(rollouts[start : start + rows], pad_id=EOS_ID)
        yield {
            "tokens": batch.tokens_NT,
            "mask": batch.mask_NT,
            "behaviour_logprobs": batch.behaviour_logprobs_NT,
            "advantages": batch.advantages_N,
        }

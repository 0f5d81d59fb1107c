"""How the model is improved by reinforcement learning."""

from typing import Annotated, ClassVar, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.base import Frozen
from configs.names import NodeName, Word
from configs.train import Fp8Config, OptimConfig, Precision


class GrpoConfig(Frozen):
    """The objective of DeepSeek-V3.2 (arXiv 2512.02556, section 3.1)."""

    clip_epsilon: float = Field(default=0.2, gt=0)
    kl_weight: float = Field(default=1e-3, ge=0)
    """beta of the unbiased KL to the model that post-training started from."""
    off_policy_delta: float = Field(default=0.5, gt=0)
    """A sequence of negative advantage whose mean log(pi_old / pi) exceeds this is masked."""


class PosttrainOptimConfig(OptimConfig):
    """AdamW for small steps away from a trained model."""

    learning_rate: float = Field(default=3e-5, gt=0)
    weight_decay: float = Field(default=0.0, ge=0)


class PosttrainConfig(Frozen):
    """Steps, rollouts and numerics of GRPO."""

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"checkpoint_every_steps"})

    steps: PositiveInt
    prompts_per_step: PositiveInt = 32
    group_size: Annotated[int, Field(ge=2)] = 8
    """Answers sampled for each prompt; the advantage is the reward less the group's mean."""
    max_new_tokens: PositiveInt = 16
    temperature: float = Field(default=1.0, gt=0)
    minibatches: PositiveInt = 1
    """Optimiser steps taken on one step's rollouts."""
    warmup_steps: int = Field(default=5, ge=0)
    optim: PosttrainOptimConfig = PosttrainOptimConfig()
    bias_update_speed: float = Field(default=0.0, ge=0)
    """As in pretraining; 0 keeps the routing bias that pretraining ended with."""
    grpo: GrpoConfig = GrpoConfig()
    precision: Precision = "high"
    """Samplers and trainers both run in it, so that their log-probabilities agree."""
    fp8: Fp8Config = Fp8Config()
    checkpoint_every_steps: PositiveInt = 20
    evaluate_every_steps: PositiveInt = 10
    """How often held-out problems are asked; they are before the first step and after the last.
    Nothing that is trained depends on it, but the artifact's `history.json` does."""
    evaluate_problems: NonNegativeInt = 100
    """Held-out problems to ask each time, the same ones; 0 asks none."""
    evaluate_samples_per_problem: PositiveInt = 2
    """Sampled answers; one more is given greedily."""

    @model_validator(mode="after")
    def _minibatches_divide(self) -> Self:
        if self.prompts_per_step % self.minibatches:
            raise ValueError(
                f"prompts_per_step = {self.prompts_per_step} is not divisible by "
                f"minibatches = {self.minibatches}; change either"
            )
        return self

    def learning_rate_at(self, step: int) -> float:
        """The rate at `step`, the first of which is 1: linear warm-up, then constant."""
        return self.optim.learning_rate * min(1.0, step / max(1, self.warmup_steps))

    def saves_at(self, step: int) -> bool:
        """Whether the state after `step` is saved to resume from."""
        return step % self.checkpoint_every_steps == 0 or step == self.steps

    def evaluates_at(self, step: int) -> bool:
        """Whether held-out problems, if any, are asked after `step`; 0 is before the first."""
        return step % self.evaluate_every_steps == 0 or step == self.steps


class PosttrainPhase(PosttrainConfig):
    """One phase of post-training, and where it stands in the line."""

    corpus: Word | None = None
    """Which of `data.corpora` has its problems; none is the node `data`."""
    after: NodeName | None = None
    """The phase, or the node, whose model it improves. None means the phase that stands before it;
    the first improves what pretraining ended with."""


class PosttrainSection(PosttrainPhase):
    """`[posttrain]`: the node `posttrain`; or, if phases are named, one node each.

    `[posttrain.phases.math]` is the node `posttrain.math`. A phase has this section's settings
    where it says nothing else.
    """

    phases: dict[Word, PosttrainPhase] = Field(default_factory=dict)


class PosttrainSpec(Frozen):
    """The posttrain stage's whole config."""

    seed: int
    posttrain: PosttrainConfig

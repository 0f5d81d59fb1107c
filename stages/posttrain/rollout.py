"""From sampled answers to a training batch: one type per state, and the steps between them.

Prompt (see `stages/prompts.py`) -> Rollout -> ScoredRollout -> TrainingBatch.
Axes: N sequences, T positions.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from cluster.generation import Sample
from configs.errors import TrainingError
from stages.prompts import Prompt
from stages.verifiers import Verdict, verify


@dataclass(frozen=True, slots=True)
class Rollout:
    """One sampled answer, with the evidence needed to train on it."""

    prompt: Prompt
    token_ids: tuple[int, ...]
    """The answer, its stop token included if it was emitted."""
    logprobs: tuple[float, ...]
    """Log-probability of each answer token, as the sampler drew it."""
    version: int
    """Version of the policy that the sampler held."""
    stopped: bool
    """Whether the model ended the answer itself, rather than ran out of tokens."""


@dataclass(frozen=True, slots=True)
class ScoredRollout:
    """A rollout with what the verifier said and how it compares with its group."""

    rollout: Rollout
    verdict: Verdict
    advantage: float


@dataclass(frozen=True, slots=True)
class TrainingBatch:
    """Rollouts as tensors, padded on the right.

    Position t of every NT tensor but `tokens_NT` speaks of the prediction made there, of token
    t + 1. So the mask is true from the last prompt token to the last but one answer token, and
    the last column is false everywhere.
    """

    tokens_NT: Int[Tensor, "N T"]
    """int64: prompt, answer, padding."""
    mask_NT: Bool[Tensor, "N T"]
    """Positions that predict an answer token."""
    behaviour_logprobs_NT: Float[Tensor, "N T"]
    """float32: the sampler's log-probability of token t + 1; 0 outside the mask."""
    advantages_N: Float[Tensor, " N"]
    """float32."""


def group_rollouts(
    prompts: Sequence[Prompt], samples: Sequence[Sample], *, group_size: int
) -> list[tuple[Rollout, ...]]:
    """One group per prompt; the samples of prompt i are number i * group_size and following.

    TrainingError if samples are missing, empty, or carry another number of log-probabilities than
    of tokens.
    """
    if len(samples) != len(prompts) * group_size:
        raise TrainingError(
            f"the sampler returned {len(samples)} answers to {len(prompts)} prompts, not "
            f"{group_size} each; repeat the step"
        )
    groups = []
    for index, prompt in enumerate(prompts):
        answers = samples[index * group_size : (index + 1) * group_size]
        groups.append(tuple(_rollout(prompt, sample) for sample in answers))
    return groups


def check_staleness(
    rollouts: Iterable[Rollout], *, policy_version: int, max_staleness: int
) -> None:
    """TrainingError for a rollout sampled more than `max_staleness` versions before the policy.

    A rollout from a version that the policy has yet to reach is refused as well: its weights
    cannot have come from this policy.
    """
    for rollout in rollouts:
        if not policy_version - max_staleness <= rollout.version <= policy_version:
            raise TrainingError(
                f"problem {rollout.prompt.problem.id}: the answer was sampled by version "
                f"{rollout.version}, but the policy is at version {policy_version} and accepts "
                f"answers at most {max_staleness} versions old; update the samplers' weights"
            )


def score(
    groups: Iterable[Sequence[Rollout]],
    *,
    answer_text: Callable[[Sequence[int]], str],
    advantages: Callable[[Sequence[float]], Sequence[float]],
) -> list[ScoredRollout]:
    """Verify every answer and compare it with its group, in the order given.

    `answer_text` turns answer tokens into the text that the verifier reads, `advantages` a group's
    rewards into its advantages. VerifierError passes through: a reward that cannot be computed is
    never a 0.
    """
    scored = []
    for group in groups:
        verdicts = [
            verify(rollout.prompt.problem, answer_text(rollout.token_ids)) for rollout in group
        ]
        gains = advantages([verdict.reward for verdict in verdicts])
        scored += [
            ScoredRollout(rollout=rollout, verdict=verdict, advantage=gain)
            for rollout, verdict, gain in zip(group, verdicts, gains, strict=True)
        ]
    return scored


def collate(scored: Sequence[ScoredRollout], *, pad_id: int) -> TrainingBatch:
    """Pad rollouts on the right to the longest of them; see TrainingBatch for the alignment."""
    rows = [[*item.rollout.prompt.token_ids, *item.rollout.token_ids] for item in scored]
    shape = len(rows), max(map(len, rows))
    tokens_NT = torch.full(shape, pad_id, dtype=torch.int64)
    mask_NT = torch.zeros(shape, dtype=torch.bool)
    behaviour_logprobs_NT = torch.zeros(shape)
    for index, (item, row) in enumerate(zip(scored, rows, strict=True)):
        answer = slice(len(item.rollout.prompt.token_ids) - 1, len(row) - 1)
        tokens_NT[index, : len(row)] = torch.tensor(row)
        mask_NT[index, answer] = True
        behaviour_logprobs_NT[index, answer] = torch.tensor(item.rollout.logprobs)
    return TrainingBatch(
        tokens_NT=tokens_NT,
        mask_NT=mask_NT,
        behaviour_logprobs_NT=behaviour_logprobs_NT,
        advantages_N=torch.tensor([item.advantage for item in scored]),
    )


def _rollout(prompt: Prompt, sample: Sample) -> Rollout:
    """A sample beside its prompt; TrainingError if its lists do not fit each other."""
    if not sample.token_ids or len(sample.token_ids) != len(sample.logprobs):
        raise TrainingError(
            f"problem {prompt.problem.id}: an answer of {len(sample.token_ids)} tokens with "
            f"{len(sample.logprobs)} log-probabilities; the sampler must return one for each"
        )
    return Rollout(
        prompt=prompt,
        token_ids=tuple(sample.token_ids),
        logprobs=tuple(sample.logprobs),
        version=sample.version,
        stopped=sample.stopped,
    )

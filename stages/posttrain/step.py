"""What one step of reinforcement learning does with the pools, and what it reports.

All randomness is keyed on the step and the problem, so a resumed step repeats the interrupted one.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from cluster.generation import GenerationPool
from cluster.pool import TrainerPool
from configs.seed import derive
from model.fp8.drift import Drift
from stages.posttrain.learner import minibatches
from stages.posttrain.rollout import ScoredRollout, check_staleness, group_rollouts, score
from stages.posttrain.run import Run
from stages.prompts import Prompt
from stages.samples import ENTRY, Sample, as_entry

_SHOWN_STEPS, _SHOWN_PROBLEMS = 10, 4


@dataclass(frozen=True, slots=True)
class Learned:
    """What the optimiser steps on one step's answers report."""

    figures: Mapping[str, Any]
    """Means over the minibatches, what FP8 did in the first of them, and the `expert_load` of the
    last: each layer's share of tokens by expert."""
    notes: Sequence[str]
    """What the user should be told."""


def sample(run: Run, samplers: GenerationPool, step: int) -> list[ScoredRollout]:
    """A group of scored answers to each of the step's problems.

    Step k starts from the weights of version k - 1; TrainingError if another drew an answer.
    """
    size, seed = run.rl.group_size, run.config.seed
    chosen = _choose(run, step)
    samples = samplers.sample(
        [list(prompt.token_ids) for prompt in chosen for _ in range(size)],
        run.sampling,
        # A problem that was chosen twice has two slots, and other answers in each.
        [
            derive(seed, "posttrain", step, slot, prompt.problem.id, index)
            for slot, prompt in enumerate(chosen)
            for index in range(size)
        ],
    )
    groups = group_rollouts(chosen, samples, group_size=size)
    for group in groups:
        check_staleness(group, policy_version=step - 1, max_staleness=0)
    return score(groups, answer_text=run.answer_text, advantages=run.algorithm.advantages)


def learn(
    run: Run,
    trainers: TrainerPool,
    rollouts: Sequence[ScoredRollout],
    step: int,
    drift: Drift,
) -> Learned:
    """One optimiser step on each minibatch of the answers."""
    rl, algorithm = run.rl, run.algorithm
    rate, reference = rl.learning_rate_at(step), algorithm.reference
    counts = rl.precision == "fp8" and rl.fp8.counts_at(step)
    counted: dict[str, Any] = {}
    reports: list[dict[str, Any]] = []
    for number, batch in enumerate(minibatches(rollouts, rl)):
        if reference is not None:
            batch["reference_logprobs"] = trainers.reference(batch, reference)
        counting = counts and number == 0
        metrics = trainers.forward_backward(batch, algorithm.loss, counting=counting)
        if counting:
            counted = drift.figures(trainers.fp8_tallies())
        reports.append({**metrics, **trainers.optim_step(rate)})
    notes = counted.pop("notes", [])
    loads = [report.pop("expert_load") for report in reports if "expert_load" in report]
    means = {name: fmean(report[name] for report in reports) for name in reports[0]}
    load = {"expert_load": loads[-1]} if loads else {}
    return Learned({**means, "learning_rate": rate, **counted, **load}, notes)


def describe(rollouts: Sequence[ScoredRollout]) -> dict[str, float]:
    """What the step's answers looked like, as means over them."""

    def mean(value: Callable[[ScoredRollout], float]) -> float:
        return fmean(float(value(item)) for item in rollouts)

    return {
        "reward": mean(lambda item: item.verdict.reward),
        "response_tokens": mean(lambda item: len(item.rollout.token_ids)),
        "stopped_share": mean(lambda item: item.rollout.stopped),
        "useful_share": mean(lambda item: item.advantage != 0),
        "policy_version": float(min(item.rollout.version for item in rollouts)),
    }


def shown(run: Run, rollouts: Sequence[ScoredRollout], step: int) -> dict[str, Any]:
    """Some of the step's answers for people to read: one to each of a few problems, at few steps.

    Nothing at the others, so that the log stays small however long the training is.
    """
    every = max(1, run.rl.steps // _SHOWN_STEPS)
    if (step - 1) % every and step != run.rl.steps:
        return {}
    firsts = rollouts[:: run.rl.group_size][:_SHOWN_PROBLEMS]
    return {
        ENTRY: as_entry(
            Sample(
                prompt=one.rollout.prompt.problem.prompt,
                right_answer=one.rollout.prompt.problem.answer,
                answer=run.answer_text(one.rollout.token_ids),
                reward=one.verdict.reward,
                reason=one.verdict.reason,
            )
            for one in firsts
        )
    }


def _choose(run: Run, step: int) -> list[Prompt]:
    """The step's problems, drawn with replacement."""
    rng = np.random.default_rng(derive(run.config.seed, "posttrain", "problems", step))
    picks = rng.integers(len(run.prompts), size=run.rl.prompts_per_step)
    return [run.prompts[index] for index in picks]

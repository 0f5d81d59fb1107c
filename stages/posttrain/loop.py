"""The posttrain stage: GRPO between a pool of samplers and a pool of trainers.

One step: draw problems, sample a group of answers for each, verify them, take the policy's
gradient step, push the new weights to the samplers under the next version. All randomness is
keyed on the step and the problem, so a resumed run repeats the interrupted one.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from cluster import checkpoint
from cluster.generation import GenerationPool, Sampling, open_generation
from cluster.pool import TrainerPool, TrainerSpec, open_trainers
from cluster.workers import WorkerDied
from configs.errors import DataError, MachineError
from configs.rl import PosttrainSpec
from configs.seed import derive
from configs.train import BalanceConfig, check_fp8
from model.fp8.drift import Drift
from model.fp8.scheme import Numerics, settle
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Workspace, stage
from stages.conventions import carry, read_end_tokens
from stages.posttrain.learner import GrpoLoss, NextTokenLogprobs, minibatches
from stages.posttrain.rollout import ScoredRollout, check_staleness, group_rollouts, score
from stages.prompts import Prompt, answer_text, encode_prompts
from stages.telemetry import SAVES, MetricsFile, begin_metrics, following, write_history
from stages.tokens import load_tokenizer
from stages.verifiers import read_problems


@stage(revision=4)
def posttrain(
    config: PosttrainSpec, work: Workspace, *, corpus: Corpus, base: Checkpoint
) -> Checkpoint:
    """Improve `base` on the corpus's training problems."""
    rl = config.posttrain
    if not corpus.train_problems:
        raise DataError(
            f"{corpus.uri}: train_problems = 0, and reinforcement learning needs problems with "
            'checkable answers; add a source of type = "arithmetic" to data.sources'
        )
    check_fp8("posttrain", rl, base.model)
    end_tokens = read_end_tokens(base.path())
    _, *earlier = work.resumable(SAVES)
    run = _Run(
        config=config,
        work=work,
        base=base,
        tokenizer=load_tokenizer(base.path("tokenizer.json")),
        end_tokens=end_tokens,
        start=checkpoint.latest(*earlier),
    )
    # What cannot be computed is told before any worker is started. Workers compute on CPUs.
    settle(run.numerics, torch.device("cpu"))
    prompts = encode_prompts(
        read_problems(corpus.path("problems", "train.parquet")),
        run.tokenizer,
        context_tokens=base.model.max_position_embeddings,
        max_new_tokens=rl.max_new_tokens,
    )
    work.tracker.start(steps=rl.steps, unit="step")
    # Steps after the last save will be made again, and are not to be shown until then.
    begin_metrics(work, run.resume())
    with following(work.beside(), work.tracker):
        final = _with_restarts(run, prompts)
    checkpoint.consolidate(final, base.model, work.path())
    carry(base.path(), work.path())
    records = write_history(work)
    return Checkpoint(
        uri=work.out,
        step=rl.steps,
        sequences_seen=base.sequences_seen,
        model=base.model,
        final_loss=records[-1]["loss"],
    )


@dataclass(frozen=True)
class _Run:
    """What stays the same while the stage runs."""

    config: PosttrainSpec
    work: Workspace
    base: Checkpoint
    tokenizer: Tokenizer
    end_tokens: tuple[int, ...]
    """Ids that end an answer."""
    start: tuple[Path, int] | None
    """The save of an earlier build that this one begins with, and its step. Chosen once: a builder
    that is late may still write beside it."""

    @property
    def numerics(self) -> Numerics:
        rl = self.config.posttrain
        return Numerics(rl.precision, rl.fp8, self.work.machines.fp8_backend)

    def resume(self) -> tuple[Path, int] | None:
        """The save to continue from and its step: this build's newest, or what it begins with."""
        return checkpoint.latest(self.work.resumable(SAVES)[0]) or self.start


def _with_restarts(run: _Run, prompts: Sequence[Prompt]) -> Path:
    """The final save; pools that lose a worker are rebuilt from the newest save."""
    machines = run.work.machines
    deaths = 0
    while True:
        try:
            return _train(run, prompts)
        except WorkerDied as death:
            deaths += 1
            if deaths > machines.max_restarts:
                raise MachineError(
                    f"{death}; workers died {deaths} times, cluster.max_restarts = "
                    f"{machines.max_restarts}"
                ) from death
            run.work.tracker.note(f"{death}; rebuilding the pools from the newest save")


def _train(run: _Run, prompts: Sequence[Prompt]) -> Path:
    rl = run.config.posttrain
    own, *earlier = run.work.resumable(SAVES)
    saved = run.resume()
    done = saved[1] if saved else 0
    if saved and done == rl.steps:
        return saved[0]
    log = MetricsFile(run.work.beside(), resume_step=done)
    with _pools(run) as (trainers, samplers):
        drift, first = Drift(), trainers.news()
        if saved:
            trainers.load(saved[0], step=done * rl.minibatches)
            samplers.update_weights(done, trainers.weights())
        for step in range(done + 1, rl.steps + 1):
            begin = time.perf_counter()
            rollouts = _sample(run, samplers, prompts, step)
            sampled = time.perf_counter()
            metrics = _learn(run, trainers, rollouts, step, drift)
            samplers.update_weights(step, trainers.weights())
            metrics["sampling_seconds"] = sampled - begin
            metrics["learning_seconds"] = time.perf_counter() - sampled
            run.work.lease.check()
            # Before the save: a run that continues from it must find this line.
            if notes := first.pop("notes", []) + metrics.pop("notes", []):
                metrics["notes"] = notes
            log.append(metrics | _describe(rollouts) | first, step=step)
            first = {}
            if step % rl.checkpoint_every_steps == 0 or step == rl.steps:
                trainers.save(own, step=step, earlier=earlier)
    saved = checkpoint.latest(own)
    assert saved is not None
    return saved[0]


@contextmanager
def _pools(run: _Run) -> Iterator[tuple[TrainerPool, GenerationPool]]:
    rl, start, machines = run.config.posttrain, run.base.path(), run.work.machines
    spec = TrainerSpec(
        optim=rl.optim,
        balance=BalanceConfig(bias_update_speed=rl.bias_update_speed),
        precision=run.numerics,
        seed=run.config.seed,
        reference=rl.grpo.kl_weight > 0,
    )
    with (
        open_trainers(machines, start, spec) as trainers,
        open_generation(machines, start, precision=run.numerics) as samplers,
    ):
        yield trainers, samplers


def _sample(
    run: _Run, samplers: GenerationPool, prompts: Sequence[Prompt], step: int
) -> list[ScoredRollout]:
    """One step's scored answers, group by group."""
    rl, seed = run.config.posttrain, run.config.seed
    rng = np.random.default_rng(derive(seed, "posttrain", "problems", step))
    chosen = [prompts[i] for i in rng.integers(len(prompts), size=rl.prompts_per_step)]
    repeated = [list(prompt.token_ids) for prompt in chosen for _ in range(rl.group_size)]
    seeds = [
        derive(seed, "posttrain", step, slot, prompt.problem.id, index)
        for slot, prompt in enumerate(chosen)
        for index in range(rl.group_size)
    ]
    sampling = Sampling(rl.max_new_tokens, rl.temperature, run.end_tokens)
    samples = samplers.sample(repeated, sampling, seeds)
    groups = group_rollouts(chosen, samples, group_size=rl.group_size)
    for group in groups:
        check_staleness(group, policy_version=step - 1, max_staleness=0)
    read = partial(answer_text, run.tokenizer, end_tokens=run.end_tokens)
    return score(groups, answer_text=read)


def _learn(
    run: _Run, trainers: TrainerPool, rollouts: list[ScoredRollout], step: int, drift: Drift
) -> dict[str, Any]:
    """Optimiser steps on one step's answers; their mean metrics, and the first one's telemetry."""
    rl = run.config.posttrain
    loss = GrpoLoss(config=rl.grpo, temperature=rl.temperature)
    reports: list[dict[str, Any]] = []
    counted: dict[str, Any] = {}
    for batch in minibatches(rollouts, rl):
        if rl.grpo.kl_weight > 0:
            batch["reference_logprobs"] = trainers.reference(
                batch, NextTokenLogprobs(rl.temperature)
            )
        counting = rl.precision == "fp8" and rl.fp8.counts_at(step) and not reports
        metrics: dict[str, Any] = dict(trainers.forward_backward(batch, loss, counting=counting))
        if counting:
            counted = drift.figures(trainers.fp8_tallies())
        rate = rl.optim.learning_rate * min(1.0, step / max(1, rl.warmup_steps))
        report = trainers.optim_step(rate)
        load = report.pop("expert_load")
        reports.append(metrics | report | {"learning_rate": rate})
    mean = {name: float(np.mean([report[name] for report in reports])) for name in reports[0]}
    return mean | counted | {"expert_load": load}


def _describe(rollouts: Sequence[ScoredRollout]) -> dict[str, float]:
    """What the step's answers looked like."""
    versions = {item.rollout.version for item in rollouts}
    return {
        "reward": float(np.mean([item.verdict.reward for item in rollouts])),
        "response_tokens": float(np.mean([len(item.rollout.token_ids) for item in rollouts])),
        "stopped_share": float(np.mean([item.rollout.stopped for item in rollouts])),
        "useful_share": float(np.mean([item.advantage != 0 for item in rollouts])),
        "policy_version": float(min(versions)),
    }

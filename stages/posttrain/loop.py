"""The posttrain stage: GRPO between a pool of samplers and a pool of trainers.

One step: choose problems, sample a group of answers to each, score them, learn, push the new
weights to the samplers under the next version. Held-out problems are asked beside it, for
measuring alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from cluster import checkpoint
from cluster.backend import fitted, foresee
from cluster.generation import GenerationPool, open_generation
from cluster.output import TRAINER, Output
from cluster.pool import TrainerPool, open_trainers
from cluster.session import ray_for
from cluster.tracing import trace_told, untraced
from cluster.workers import with_restarts
from configs.rl import PosttrainSpec
from model.fp8.drift import Drift
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Workspace, fills
from stages.conventions import carry
from stages.posttrain import face
from stages.posttrain.exam import best_step, measure, tell
from stages.posttrain.journal import Journal, Stopwatch
from stages.posttrain.run import Run, prepare
from stages.posttrain.step import describe, learn, sample, shown
from stages.telemetry import begin_metrics, following, write_history


@fills(face.posttrain)
def posttrain(
    config: PosttrainSpec, work: Workspace, *, corpus: Corpus, base: Checkpoint
) -> Checkpoint:
    """Improve `base` on the corpus's training problems, and measure it on held-out ones."""
    run = prepare(config, work, corpus, base)
    foresee(run.numerics, work.machines)
    work.tracker.start(steps=run.rl.steps, unit="step")
    # Steps after the last save will be made again, and are not to be shown until then.
    begin_metrics(work, run.saves.newest())
    with following(work.beside(), work.tracker):
        final = with_restarts(partial(_train, run), work.machines, work.tracker.note)
    if told := untraced(_output(work), work.profile, run.rl.steps):
        work.tracker.note(told)
    work.lease.check()
    checkpoint.consolidate(final, base.model, work.path())
    carry(base.path(), work.path())
    records = write_history(work)
    for line in tell(records):
        work.tracker.note(line)
    return Checkpoint(
        uri=work.out,
        step=run.rl.steps,
        sequences_seen=base.sequences_seen,
        model=base.model,
        final_loss=records[-1]["loss"],
        best_step=best_step(records),
    )


def _train(run: Run) -> Path:
    """All steps that the newest save does not hold; the final save."""
    rl, saved = run.rl, run.saves.choose()
    done = saved[1] if saved else 0
    if saved and done == rl.steps:
        return saved[0]
    journal, drift = Journal(run.work, resume_step=done), Drift()
    with _pools(run) as (trainers, samplers):
        if saved:
            trainers.load(saved[0], step=done * rl.minibatches)
            samplers.update_weights(done, trainers.weights())
        journal.announce(trainers.news())
        if not done:
            _measure_before(run, samplers, journal)
        for step in range(done + 1, rl.steps + 1):
            watch = Stopwatch()
            rollouts = sample(run, samplers, step)
            watch.lap("sampling_seconds")
            with trainers.tracing(run.work.profile, step, of=rl.steps):
                learned = learn(run, trainers, rollouts, step, drift)
            samplers.update_weights(step, trainers.weights())
            watch.lap("learning_seconds")
            figures = {**learned.figures, **describe(rollouts)}
            if run.exam is not None and rl.evaluates_at(step):
                figures |= measure(samplers, run.exam, step).figures(journal.records())
                watch.lap("measuring_seconds")
            figures |= watch.seconds | shown(run, rollouts, step)
            notes = [*learned.notes, *_trace_told(run, step)]
            journal.write(figures, step=step, notes=notes)
            if rl.saves_at(step):
                run.work.lease.check()
                trainers.save(run.saves, step=step)
    final = run.saves.newest()
    assert final is not None
    return final[0]


def _trace_told(run: Run, step: int) -> list[str]:
    return trace_told(_output(run.work), run.work.profile, step, run.rl.steps)


def _output(work: Workspace) -> Output:
    """Where the trainers' words go, and their traces."""
    return Output(str(work.logs), TRAINER)


def _measure_before(run: Run, samplers: GenerationPool, journal: Journal) -> None:
    """Ask the model that training starts from."""
    if run.exam is None:
        return
    watch = Stopwatch()
    measured = measure(samplers, run.exam, 0)
    watch.lap("measuring_seconds")
    journal.write(measured.figures(()) | watch.seconds, step=0)


@contextmanager
def _pools(run: Run) -> Iterator[tuple[TrainerPool, GenerationPool]]:
    work, start = run.work, run.base.path()
    machines, logs, supply = fitted(work.machines), work.logs, work.supply
    workers = machines.trainers + machines.samplers
    with (
        ray_for(machines, str(start), workers=workers, trainers=machines.trainers),
        open_trainers(machines, start, run.trainers, logs=logs, supply=supply) as trainers,
        open_generation(
            machines, start, logs=logs, supply=supply, precision=run.numerics
        ) as samplers,
    ):
        yield trainers, samplers

"""The long SPMD loop: the same steps on every rank, under Ray Train's supervision.

Ray Train places the ranks, restarts them when one dies, and does nothing else here: ranks write
their own sharded saves into the slot, and a restarted group continues from the newest complete
one. Ranks that looked for themselves could see different things, so one chooses for all: of this
build's saves rank 0, since a shared disk may show them to some ranks later; of an earlier build's
the driver, once, since a builder that is late may still write there. Losses are reproduced to the
last bit, because a batch is a pure function of its step.
"""

import math
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ray
import ray.train
import torch
import torch.distributed as dist
from ray.exceptions import RayError
from ray.train import ScalingConfig, UserCallback, WorkerGroupError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.config import FailureConfig, RunConfig
from safetensors import SafetensorError

from cluster import checkpoint
from cluster.backend import CPU, Backend
from cluster.checkpoint import require_compute
from cluster.desk import Desk, FarDesk, StepLog, open_desk
from cluster.device_errors import out_of_memory
from cluster.feeding import batches
from cluster.gathered import gathered
from cluster.groups import Groups, require_equal_cards
from cluster.head import require_reachable
from cluster.memory import LESS_MEMORY, Room
from cluster.mesh import require_one_stage
from cluster.nodes import this_node
from cluster.output import RESTART, Output
from cluster.places import Places, deadlines
from cluster.saves import Saves
from cluster.session import close_ray, hear, ray_for, worker_env
from cluster.supply import Supply
from cluster.tracing import Tracer, trace_told
from cluster.trainer import Batch, LossSpec, Trainer, build_trainer
from cluster.utilisation import MFU, Utilisation, hold_against_peak
from cluster.warmup import keep_compiled
from cluster.workers import await_room, choose_network, needs_of, what_happened, with_tail
from configs.errors import (
    ArtifactError,
    IngotError,
    LeaseLost,
    MachineError,
    StoreError,
    TrainingError,
)
from configs.model import ModelConfig
from configs.parallel import ClusterConfig, Recompute
from configs.profile import Profile
from configs.train import BalanceConfig, OptimConfig, Precision
from model.fp8.drift import Drift
from model.fp8.scheme import Numerics
from model.transformer import Transformer
from model.weights.files import read_tensors

_SHOWN_SECONDS = 90.0
"""How long a shared disk may take to show what another machine wrote: NFS looks at a folder again
after a minute at most, by default (`acdirmax`)."""


@runtime_checkable
class StepSource(Protocol):
    """Batches as a pure function of the step. Travels to the workers by value."""

    def batch(self, step: int, *, rank: int, world: int) -> Batch:
        """This rank's part of the batch of `step` (1, 2, ...)."""


@runtime_checkable
class HeldOut(Protocol):
    """What is measured now and then and never learnt from. Travels to the workers by value."""

    def due(self, step: int) -> bool:
        """Whether to measure after `step`; 0 is before the first."""

    def batches(self, *, rank: int, world: int) -> Iterator[Batch]:
        """This rank's part; every rank has equally many batches, and at least one."""

    def sums(self, model: Transformer, batch: Batch, *, step: int) -> Mapping[str, float]:
        """What is found in a batch after `step`, as numbers that add up over batches and ranks."""

    def figures(self, sums: Mapping[str, float]) -> dict[str, float]:
        """What the totals say, by the names of metrics."""


@dataclass(frozen=True)
class FitJob:
    """All that a rank needs. Every callable must be importable on the workers."""

    model: ModelConfig
    optim: OptimConfig
    balance: BalanceConfig
    precision: Precision | Numerics
    seed: int
    steps: int
    tokens_per_step: int
    checkpoint_every_steps: int
    learning_rate: Callable[[int], float]
    indexer_learning_rate: Callable[[int], float]
    source: StepSource
    loss: Callable[[int], LossSpec]
    """What is minimised at a step."""
    saves: Saves
    open_log: Callable[[int], StepLog]
    """Opens the step log for a run that continues after the given step."""
    may_write: Callable[[], None]
    """Raises LeaseLost when this build must not write any more."""
    threads: int
    output: Output
    """Where the ranks' words go."""
    reads: tuple[Path, ...] = ()
    """Folders of the build's inputs that every rank reads."""
    held_out: HeldOut | None = None
    base: str | None = None
    """A model's folder, with whose weights training begins; none begins with values drawn anew."""
    micro_batches: int = 1
    """In how many parts, one after another, a rank takes its rows of a step."""
    less_memory: str = LESS_MEMORY
    """Which settings of the recipe lower what a rank holds, as an imperative."""
    profile: Profile | None = None
    """Which steps are traced, and on which rank."""
    flops_per_token: float | None = None
    """The model's, of a training step, for MFU; none leaves it unmeasured."""
    vocabulary: tuple[int, ...] | None = None
    """What each token counts as to a memory of n-grams; none where the model has no memory."""

    @property
    def supply(self) -> Supply:
        """How files reach ranks on other machines."""
        return self.saves.supply


def fit(job: FitJob, machines: ClusterConfig, home: str, notes: str) -> Path:
    """Train until `job.steps` are done; the final save. Continues an interrupted run.

    Ray's workers live in the folder `home`, which must outlast this process's Ray and hold no
    Python files; Ray Train keeps notes of its own in the folder `notes`.
    TrainingError if the steps were not done; an Ingot error of a rank is raised as itself;
    MachineError once workers died more than `machines.max_restarts` times.
    """
    require_one_stage(machines)
    Path(notes).mkdir(parents=True, exist_ok=True)
    desk = desk_of(job)
    desk.begin()
    done = job.saves.newest()
    if done is None or done[1] != job.steps:
        count = machines.trainers
        with ray_for(machines, home, workers=count, trainers=count) as places:
            backend = places.backend
            if done is not None:
                require_compute(done[0], backend.dtype_name, backend.name)
            each = needs_of(machines, backend, places.trainer)
            await_room(each, machines, count, role=job.output.role)
            job.may_write()
            _run(job, machines, places, desk, notes)
        done = job.saves.newest()
    if done is None or done[1] != job.steps:
        seen = 0 if done is None else done[1]
        raise TrainingError(f"{seen} of {job.steps} steps were done; run again to continue")
    return done[0]


def _run(job: FitJob, machines: ClusterConfig, places: Places, desk: Desk, notes: str) -> None:
    backend = places.backend
    # Of the whole process; those who train beside this one set the same.
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(machines.startup_timeout_seconds)
    # Ray annotates its first generation of settings and takes its second.
    settings: Any = RunConfig(
        name="ray-train",
        storage_path=notes,
        failure_config=FailureConfig(
            max_failures=machines.max_restarts, controller_failure_limit=machines.max_restarts
        ),
        worker_runtime_env={"env_vars": worker_env(machines, backend)},
        callbacks=[_Interruptions(desk)],
    )
    far = None
    if job.supply.is_spread:
        far = FarDesk(open_desk(job.saves, job.open_log), machines.step_timeout_seconds)
    trainer = TorchTrainer(
        _train_worker,
        train_loop_config={
            "job": job,
            "desk": far,
            "backend": backend,
            "ep": machines.ep,
            "recompute": machines.recompute,
            "seconds": deadlines(backend, machines, first=True).group,
            "step_seconds": deadlines(backend, machines).group,
        },
        torch_config=_Group(
            backend=backend.group,
            timeout_s=math.ceil(deadlines(backend, machines, first=True).group),
            device=backend,
        ),
        scaling_config=ScalingConfig(
            num_workers=machines.trainers,
            # Ray Train will not have one of its own resources asked for without this word.
            use_gpu="num_gpus" in backend.asked(places.trainer),
            resources_per_worker=needs_of(machines, backend, places.trainer),
            placement_strategy=machines.placement.upper(),
        ),
        run_config=settings,
    )
    try:
        with gathered(job.output, job.supply):
            _fit_interruptibly(trainer)
    except ray.train.TrainingFailedError as error:
        job.may_write()
        desk.raise_failure()
        failed = MachineError(
            f"training workers failed more than cluster.max_restarts = {machines.max_restarts} "
            f"times: {_last_line(error)}; run again to continue from the newest save"
        )
        raise with_tail(failed, job.output, _to_name(error, job.output)) from error
    except RayError as error:
        # What drives the ranks is gone, and not one of them.
        require_reachable()
        raise MachineError(
            f"the training was cut off ({what_happened(error)}); run again to continue from the "
            "newest save"
        ) from error
    desk.raise_failure()


@dataclass
class _Group(TorchConfig):
    """Ray's own, but for the network that ranks meet on, and for what each of them sees."""

    device: Backend = CPU

    @property
    def backend_cls(self) -> type[Any]:
        return _GroupBackend


# Ray names the class by a property alone, so that types do not know what is inherited.
class _GroupBackend(TorchConfig().backend_cls):  # type: ignore[misc]
    share_cuda_visible_devices = False
    """Each rank sees its own device, as it does in groups of actors."""

    def on_start(self, worker_group: Any, backend_config: _Group) -> None:
        worker_group.execute(choose_network, backend_config.device)
        super().on_start(worker_group, backend_config)


class _Interruptions(UserCallback):
    """Runs in Ray Train's own actor, on the driver's machine."""

    def __init__(self, desk: Desk) -> None:
        self._desk, self._count = desk, 0

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Keep which ranks failed: a dead one makes the others' collectives fail too.

        Nothing where the builder has lost its folder to another.
        """
        raised = chain.from_iterable(map(_causes_of, worker_exceptions.values()))
        if any(isinstance(error, LeaseLost) for error in raised):
            return
        self._count += 1
        died = {
            rank: error.health_check_failure
            for rank, error in worker_exceptions.items()
            if isinstance(error, WorkerHealthCheckFailedError)
        }
        failed = died or worker_exceptions
        rank = min(failed)
        why = f"trainer {rank} failed ({what_happened(failed[rank])})"
        self._desk.interrupt(f"restart {self._count}: {why}")


def _causes_of(error: BaseException) -> Iterator[BaseException]:
    """An error, and all that it was raised from: what a rank raised lies in what Ray makes of it,
    and may have a cause of its own."""
    one: BaseException | None = error
    while one is not None:
        yield one
        one = getattr(one, "cause", None) or one.__cause__


def _fit_interruptibly(trainer: TorchTrainer) -> None:
    """Run `trainer.fit()` so that Ctrl-C reaches the caller, as KeyboardInterrupt.

    On the main thread Ray Train would take the signal for itself, and end the process with exit
    code 0 or 1. An interrupt closes Ray, and with it the workers, once no other stage uses it.
    """
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def run() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # whatever ends the thread must end the wait for it
            ended.put(error)
        else:
            ended.put(None)

    try:
        threading.Thread(target=run, daemon=True).start()
        error = hear(ended)
    except KeyboardInterrupt:
        close_ray()
        raise
    if error is not None:
        raise error


def _train_worker(config: dict[str, Any]) -> None:
    """What runs on each rank."""
    job: FitJob = config["job"]
    backend: Backend = config["backend"]
    # On a cluster all report to one machine, also those who share its disk: it sees at once what it
    # has written itself.
    desk: Desk | FarDesk = config["desk"] or desk_of(job)
    if desk.has_failed():
        return
    keep_compiled()
    try:
        job.supply.arrive()
        job.output.capture(dist.get_rank())
        job.may_write()
        job.supply.bring(*job.reads)
        backend.begin(job.seed)
        require_equal_cards(backend.card())
        groups = Groups.of_world(config["ep"], config["seconds"], node=this_node())
        _steps(job, desk, backend, groups, config["step_seconds"], config["recompute"])
    except LeaseLost:
        raise  # The slot is another builder's: nothing may be left in it.
    except IngotError as error:
        desk.fail(type(error).__name__, str(error))
        raise
    except (RuntimeError, MemoryError) as error:
        # A lost device is left to Ray Train, which starts the ranks anew.
        if (told := out_of_memory(error)) is None:
            raise
        desk.fail(MachineError.__name__, f"trainer {dist.get_rank()}: {told}")
        raise


def desk_of(job: FitJob) -> Desk:
    """Where ranks report to that see the driver's files."""
    return Desk(job.saves, job.open_log)


def _steps(
    job: FitJob,
    desk: Desk | FarDesk,
    backend: Backend = CPU,
    groups: Groups | None = None,
    step_seconds: float | None = None,
    recompute: Recompute = "none",
) -> None:
    """All steps; from the second on collectives wait for `step_seconds` at most, if it is given."""
    torch.set_num_threads(job.threads)
    trainer = build_trainer(
        job.model,
        optim=job.optim,
        balance=job.balance,
        precision=job.precision,
        seed=job.seed,
        vocabulary=job.vocabulary,
        backend=backend,
        groups=groups,
        recompute=recompute,
    )
    trainer.room = Room(job.output, job.less_memory)
    chosen = agreed_save(job, desk)
    job.supply.forget_after(job.saves.root, chosen[1] if chosen else 0)
    if chosen:
        _load(trainer, job, *chosen)
    elif job.base is not None:
        trainer.load_whole(read_tensors(Path(job.base)))
    drift, begun = Drift(), trainer.step
    log = desk if trainer.rank == 0 else None
    reason = log.open_log(begun) if log else None
    if begun == 0 and (held_out := _evaluate(trainer, job)):
        _record(log, job, held_out, step=0)
    tracer = Tracer(job.profile, job.output, rank=trainer.rank, steps=job.steps)
    used = None if job.flops_per_token is None else hold_against_peak(trainer, job.flops_per_token)
    steps = range(begun + 1, job.steps + 1)
    make = partial(job.source.batch, rank=dist.get_rank(), world=dist.get_world_size())
    coming = batches(make, steps, backend)
    for step in steps:
        with tracer.step(step):
            learned = _learn(trainer, job, drift, used, coming, step)
        held_out = _evaluate(trainer, job)
        news = _news(trainer, begun, reason, used) if step == begun + 1 else {}
        # Before the save: a run that continues from it must find this line.
        told = {"notes": trace_told(job.output, job.profile, step, job.steps)}
        _record(log, job, news, learned, held_out, told, step=step)
        if step % job.checkpoint_every_steps == 0 or step == job.steps:
            _save(trainer, job, desk)
        if step == begun + 1 and step_seconds is not None:
            trainer.groups.wait_at_most(step_seconds)


def _news(
    trainer: Trainer, begun: int, reason: str | None, used: Utilisation | None
) -> dict[str, Any]:
    """What the first record of this group of ranks says beside its figures."""
    news = trainer.news()
    if used is not None:
        news["tags"][f"{MFU}.peak"] = used.told
    if reason is not None:
        source = f"the save of step {begun}" if begun else "the beginning"
        news[RESTART] = f"{reason}; goes on from {source}"
    return news


def _learn(
    trainer: Trainer,
    job: FitJob,
    drift: Drift,
    used: Utilisation | None,
    coming: Iterator[Batch],
    step: int,
) -> dict[str, Any]:
    """One optimiser step on the batch that comes next; what there is to say of it."""
    begin = time.perf_counter()
    batch = next(coming)
    counting = trainer.numerics.counts_at(step)
    rate = job.learning_rate(step)
    indexer_rate = job.indexer_learning_rate(step)
    metrics = trainer.train_step(
        batch,
        job.loss(step),
        rate,
        indexer_learning_rate=indexer_rate,
        counting=counting,
        micro_batches=job.micro_batches,
    )
    metrics |= trainer.telemetry
    if counting:
        metrics |= drift.figures(trainer.fp8_tallies())
    metrics["learning_rate"] = rate
    if "indexer_grad_norm" in metrics:
        metrics["indexer_learning_rate"] = indexer_rate
    metrics["tokens_per_second"] = job.tokens_per_step / (time.perf_counter() - begin)
    if used is not None:
        metrics[MFU] = used.of(metrics["tokens_per_second"])
    return metrics


def _evaluate(trainer: Trainer, job: FitJob) -> dict[str, float]:
    """The held-out figures of the weights as they are, if it is time for them."""
    held_out, step = job.held_out, trainer.step
    if held_out is None or not held_out.due(step):
        return {}
    batches = held_out.batches(rank=dist.get_rank(), world=dist.get_world_size())
    figures = held_out.figures(trainer.measure(batches, partial(held_out.sums, step=step)))
    if not all(map(math.isfinite, figures.values())):
        raise TrainingError(
            f"after step {step}, not finite on held-out text: {figures}; lower the learning rate"
        )
    return figures


def _record(log: Desk | FarDesk | None, job: FitJob, *told: Mapping[str, Any], step: int) -> None:
    """Write the line of a step, on the rank that has a log: all that is told of it in one."""
    if log is None:
        return
    notes = [note for part in told for note in part.get("notes", ())]
    line = {name: value for part in told for name, value in part.items() if name != "notes"}
    job.may_write()
    log.append(line | ({"notes": notes} if notes else {}), step)


def agreed_save(job: FitJob, desk: Desk | FarDesk) -> tuple[Path, int] | None:
    """What the driver's machine has to continue from, and its step, on every rank."""
    found = desk.choose() if dist.get_rank() == 0 else None
    # Two numbers say it: the step, and whether it is what the driver began with.
    said = torch.tensor([-1, 0] if found is None else [found[1], found == job.saves.start])
    dist.broadcast(said, src=0)
    step, by_driver = said.tolist()
    if step < 0:
        return None
    if by_driver:
        return job.saves.start
    return checkpoint.step_folder(job.saves.root, step), step


def _load(trainer: Trainer, job: FitJob, folder: Path, step: int) -> None:
    """Read the save that rank 0 chose; the other ranks look again until their disk shows it."""
    deadline = time.monotonic() + _SHOWN_SECONDS
    while True:
        try:
            job.supply.fetch(folder)
            return trainer.load(folder, step=step)
        except (ArtifactError, SafetensorError, OSError) as error:
            if isinstance(error, StoreError) and (trainer.rank == 0 or _is_of_store(error)):
                raise  # It names the remedy itself.
            if trainer.rank == 0:
                raise ArtifactError(
                    f"cannot read the save {folder}: {error}; delete it, and the next run "
                    "continues from the one before it"
                ) from error
            if time.monotonic() > deadline:
                raise MachineError(
                    f"rank {trainer.rank} of {trainer.world} cannot read {folder}, which rank 0 "
                    f"found complete and continues from, for {_SHOWN_SECONDS:g} s ({error}); see "
                    "that all machines are shown the same files there, and run again"
                ) from error
        time.sleep(min(1.0, _SHOWN_SECONDS / 10))


def _is_of_store(error: StoreError) -> bool:
    """Whether the store could not be used, and not what lies in it."""
    return not isinstance(error, ArtifactError)


def _save(trainer: Trainer, job: FitJob, desk: Desk | FarDesk) -> None:
    job.may_write()
    shard = trainer.save(checkpoint.step_folder(job.saves.root, trainer.step))
    job.supply.send(shard)
    dist.barrier()
    if trainer.rank == 0:
        job.may_write()
        desk.complete(replace(trainer.save_state(), tokens=trainer.step * job.tokens_per_step))
    if job.supply.is_far:
        checkpoint.prune_shards(job.saves.root, keep=2)


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def _to_name(error: ray.train.TrainingFailedError, output: Output) -> int:
    """The rank to be named: one that died makes the others' collectives fail too.

    What a rank raised is in its file already; that it died nobody has written yet.
    """
    failures = error.worker_failures if isinstance(error, WorkerGroupError) else {0: error}
    died = {r: one for r, one in failures.items() if isinstance(one, WorkerHealthCheckFailedError)}
    for rank, one in died.items():
        output.add(rank, f"died: {one.health_check_failure}")
    return min(died or failures)

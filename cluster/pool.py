"""The four verbs over ranks: a pool of trainer actors behind one driver."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch
from torch import Tensor

from cluster import checkpoint
from cluster.backend import CPU, Backend
from cluster.groups import Groups, join_group, require_equal_cards
from cluster.memory import LESS_MEMORY, Room
from cluster.mesh import require_one_stage
from cluster.models import frozen
from cluster.nodes import this_node
from cluster.output import TRAINER, Output
from cluster.places import deadlines
from cluster.save_state import SaveState
from cluster.saves import Saves
from cluster.session import ray_for
from cluster.supply import Supply
from cluster.tracing import Tracer
from cluster.trainer import Batch, LossSpec, Trainer, build_trainer
from cluster.warmup import first_step_seconds
from cluster.workers import Actor, Worker, choose_network, free_address, gather, open_workers
from configs.errors import ConfigError
from configs.parallel import ClusterConfig
from configs.profile import Profile
from configs.train import BalanceConfig, OptimConfig, Precision
from model.fp8.recorder import Tally
from model.fp8.scheme import Numerics
from model.transformer import Transformer
from model.weights.config import read_config
from model.weights.files import read_tensors

Score = Callable[[Transformer, Batch], Tensor]
"""Row-wise values of a model on one rank's part of a batch; travels to the workers."""


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """What every rank of a pool is built from."""

    optim: OptimConfig
    balance: BalanceConfig
    precision: Precision | Numerics
    seed: int
    reference: bool
    """Keep a frozen copy of the starting weights, for `TrainerPool.reference`."""
    less_memory: str = LESS_MEMORY
    """Which settings of the recipe lower what a rank holds, as an imperative."""


class TrainerPool:
    """Trainers whose experts are sharded; a batch is divided over them row by row."""

    def __init__(
        self,
        actors: list[Actor],
        machines: ClusterConfig,
        output: Output,
        backend: Backend = CPU,
    ) -> None:
        self.actors, self.machines, self.output = actors, machines, output
        self.backend = backend
        self._step_seconds = first_step_seconds(machines)

    def forward_backward(
        self, batch: Batch, loss: LossSpec, *, counting: bool = False
    ) -> dict[str, float]:
        """Add the gradients of `loss` on the whole batch; its metrics.

        `counting` tallies what FP8 does to every tensor, for `fp8_tallies`.
        """
        parts = self._split(batch)
        reports: list[dict[str, float]] = self._each("forward_backward", parts, loss, counting)
        return reports[0]

    def fp8_tallies(self) -> dict[str, Tally]:
        """What FP8 did to each role's tensors in the last forward_backward, over all ranks."""
        reports: list[dict[str, Tally]] = self._all("fp8_tallies")
        return reports[0]

    def news(self) -> dict[str, Any]:
        """What a first record says of how the workers compute; `notes` if not as was asked."""
        reports: list[dict[str, Any]] = self._all("news")
        return reports[0]

    def optim_step(self, learning_rate: float) -> dict[str, Any]:
        """One optimiser step on every rank."""
        reports: list[dict[str, Any]] = self._all("optim_step", learning_rate)
        self._step_seconds = self.machines.step_timeout_seconds
        return reports[0]

    def reference(self, batch: Batch, score: Score) -> Tensor:
        """`score` of the starting weights on the whole batch, its rows in order."""
        return torch.cat(self._each("reference", self._split(batch), score))

    def weights(self) -> list[Any]:
        """References to each rank's part of the weights, in the object store."""
        refs = [actor.weights.remote() for actor in self.actors]
        self._all("ready")
        return refs

    def save(self, saves: Saves, *, step: int) -> None:
        """A sharded save of weights and moments; the two newest are kept.

        Those of earlier builds, which it makes superfluous, are deleted.
        """
        states = self._all("save", checkpoint.step_folder(saves.root, step))
        state: SaveState = states[0]
        saves.complete(replace(state, step=step, phase="posttrain"))

    def load(self, folder: Path, *, step: int) -> None:
        """Continue from a sharded save; MachineError if it was computed in another type."""
        checkpoint.require_compute(folder, self.backend.dtype_name, self.backend.name)
        self._all("load", folder, step)

    @contextmanager
    def tracing(self, asked: Profile | None, step: int, *, of: int) -> Iterator[None]:
        """Trace what the rank that is asked for does within, if it is a step to be traced.

        A training has `of` steps, each of any number of calls.
        """
        if asked is None:
            yield
            return
        self._all("trace", asked, of, step, True)
        yield
        self._all("trace", asked, of, step, False)

    def _split(self, batch: Batch) -> list[dict[str, Tensor]]:
        parts = len(self.actors)
        rows = min(len(tensor) for tensor in batch.values())
        if rows < parts:
            raise ConfigError(
                f"a batch of {rows} rows for {parts} trainers leaves some without any; make the "
                "batch larger, or cluster.trainers smaller"
            )
        chunks = {name: tensor.tensor_split(parts) for name, tensor in batch.items()}
        return [{name: pieces[i] for name, pieces in chunks.items()} for i in range(parts)]

    def _each(self, verb: str, batches: Sequence[Batch], *arguments: Any) -> list[Any]:
        calls = zip(self.actors, batches, strict=True)
        return self._gather(
            [getattr(actor, verb).remote(batch, *arguments) for actor, batch in calls]
        )

    def _all(self, verb: str, *arguments: Any) -> list[Any]:
        return self._gather([getattr(actor, verb).remote(*arguments) for actor in self.actors])

    def _gather(self, refs: list[Any]) -> list[Any]:
        return gather(refs, self.output, timeout_seconds=self._step_seconds)


@contextmanager
def open_trainers(
    machines: ClusterConfig, start: Path, spec: TrainerSpec, *, logs: Path, supply: Supply
) -> Iterator[TrainerPool]:
    """A pool of `machines.trainers` that starts from the checkpoint `start`, closed afterwards.

    What its workers print goes to files in the folder `logs`.
    """
    require_one_stage(machines)
    output = Output(str(logs), TRAINER)
    with (
        ray_for(
            machines, str(start), workers=machines.trainers, trainers=machines.trainers
        ) as places,
        open_workers(
            _TrainWorker,
            machines,
            machines.trainers,
            output=output,
            supply=supply,
            arguments=(start, spec, machines, places.backend),
            backend=places.backend,
            share=places.trainer,
        ) as actors,
    ):
        begun = partial(
            gather,
            output=output,
            timeout_seconds=machines.startup_timeout_seconds,
            setting="cluster.startup_timeout_seconds",
        )
        (rendezvous,) = begun([actors[0].address.remote()])
        begun([actor.join.remote(rendezvous) for actor in actors])
        yield TrainerPool(actors, machines, output, places.backend)


class _TrainWorker(Worker):
    """One rank of the pool. Joins its peers, once all are placed, before it holds a model."""

    trainer: Trainer
    starting: Transformer | None

    def __init__(
        self,
        start: Path,
        spec: TrainerSpec,
        machines: ClusterConfig,
        backend: Backend,
        output: Output,
        supply: Supply,
        rank: int,
    ) -> None:
        super().__init__(output, supply, rank)
        torch.set_num_threads(machines.threads_per_worker)
        backend.begin(spec.seed)
        supply.bring(start)
        self.start, self.spec, self.machines, self.backend = start, spec, machines, backend
        self.output = output
        self.tracer: Tracer | None = None

    def address(self) -> str:
        """Where the ranks can meet: on this one's machine, on loopback in a local cluster."""
        local = self.machines.address is None
        return free_address("127.0.0.1" if local else ray.util.get_node_ip_address())

    def join(self, rendezvous: str) -> None:
        """Meet the other ranks and load the starting weights."""
        world = self.machines.trainers
        seconds = deadlines(self.backend, self.machines, first=True).group
        if world > 1:
            if self.machines.address is not None:
                choose_network(self.backend)
            join_group(rendezvous, self.rank, world, seconds, self.backend)
            require_equal_cards(self.backend.card())
        groups = None
        if world > 1:
            groups = Groups.of_world(self.machines.ep, seconds, node=this_node())
        config, tensors = read_config(self.start), read_tensors(self.start)
        self.trainer = build_trainer(
            config,
            optim=self.spec.optim,
            balance=self.spec.balance,
            precision=self.spec.precision,
            seed=self.spec.seed,
            backend=self.backend,
            groups=groups,
            recompute=self.machines.recompute,
        )
        self.trainer.load_whole(tensors)
        self.trainer.room = Room(self.output, self.spec.less_memory)
        self.starting = None
        if self.spec.reference:
            self.starting = frozen(
                config,
                tensors,
                precision=self.spec.precision,
                backend=self.backend,
                groups=groups,
            )

    def forward_backward(self, batch: Batch, loss: LossSpec, counting: bool) -> dict[str, float]:
        return self.trainer.forward_backward(batch, loss, counting=counting)

    def trace(self, asked: Profile, steps: int, step: int, begins: bool) -> None:
        if self.tracer is None:
            self.tracer = Tracer(asked, self.output, rank=self.rank, steps=steps)
        (self.tracer.begin if begins else self.tracer.end)(step)

    def fp8_tallies(self) -> dict[str, Tally]:
        return self.trainer.fp8_tallies()

    def news(self) -> dict[str, Any]:
        return self.trainer.news()

    def optim_step(self, learning_rate: float) -> dict[str, Any]:
        report = self.trainer.optim_step(learning_rate) | self.trainer.telemetry
        self.trainer.groups.wait_at_most(deadlines(self.backend, self.machines).group)
        return report

    def reference(self, batch: Batch, score: Score) -> Tensor:
        assert self.starting is not None
        with torch.inference_mode():
            return score(self.starting, self.backend.place(batch)).cpu()

    def weights(self) -> Mapping[str, Tensor]:
        """On the host: samplers may have other devices, or none of this process's. Experts lie
        under their numbers."""
        return checkpoint.by_expert(self.trainer.state(), self.trainer.experts_here())

    def save(self, folder: Path) -> SaveState:
        self.supply.send(self.trainer.save(folder))
        if self.supply.is_far:
            checkpoint.prune_shards(folder.parent, keep=2)
        return self.trainer.save_state()

    def load(self, folder: Path, step: int) -> None:
        if self.supply.is_far:
            number = int(folder.name.partition("-")[2])
            self.supply.forget_after(folder.parent, number)
            self.supply.fetch(folder)
        self.trainer.load(folder, step=step)

"""The four verbs over ranks: a pool of trainer actors behind one driver."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import checkpoint
from cluster.expert_parallel import join_group
from cluster.session import ensure_ray
from cluster.trainer import Batch, LossSpec, Trainer
from cluster.workers import Actor, dismiss, free_address, gather, spawn
from configs.model import ModelConfig
from configs.parallel import ClusterConfig
from configs.train import BalanceConfig, OptimConfig, Precision
from model.weights.files import read_config, read_tensors

_ROLE = "trainer"


@dataclass(frozen=True, slots=True)
class TrainerSpec:
    """What every rank of a pool is built from."""

    optim: OptimConfig
    balance: BalanceConfig
    precision: Precision
    seed: int
    reference: bool
    """Keep a frozen copy of the starting weights, for `reference_logprobs`."""


class TrainerPool:
    """Trainers whose experts are sharded; a batch is divided over them row by row."""

    def __init__(self, actors: list[Actor], machines: ClusterConfig) -> None:
        self.actors = actors
        self.machines = machines

    def forward_backward(self, batch: Batch, loss: LossSpec) -> dict[str, float]:
        """Add the gradients of `loss` on the whole batch; its metrics."""
        results: list[dict[str, float]] = self._each("forward_backward", self._split(batch), loss)
        return results[0]

    def optim_step(self, learning_rate: float) -> dict[str, Any]:
        """One optimiser step on every rank."""
        refs = [actor.optim_step.remote(learning_rate) for actor in self.actors]
        reports: list[dict[str, Any]] = gather(refs, self.machines, role=_ROLE)
        return reports[0]

    def reference_logprobs(self, batch: Batch, temperature: float) -> Tensor:
        """Log-probability [N, T] of each next token under the starting weights."""
        return torch.cat(self._each("reference_logprobs", self._split(batch), temperature))

    def weights(self) -> list[Any]:
        """References to each rank's part of the weights, in the object store."""
        refs = [actor.weights.remote() for actor in self.actors]
        gather([actor.ready.remote() for actor in self.actors], self.machines, role=_ROLE)
        return refs

    def save(self, root: Path, *, step: int) -> None:
        """A sharded save of weights and moments under `root`; the two newest are kept."""
        folder = checkpoint.step_folder(root, step)
        refs = [actor.save.remote(str(folder)) for actor in self.actors]
        gather(refs, self.machines, role=_ROLE)
        checkpoint.mark_complete(folder, {"step": step})
        checkpoint.prune(root, keep=2)

    def load(self, folder: Path, *, step: int) -> None:
        """Continue from a sharded save."""
        refs = [actor.load.remote(str(folder), step) for actor in self.actors]
        gather(refs, self.machines, role=_ROLE)

    def _split(self, batch: Batch) -> list[dict[str, Tensor]]:
        parts = len(self.actors)
        chunks = {name: tensor.tensor_split(parts) for name, tensor in batch.items()}
        return [{name: pieces[i] for name, pieces in chunks.items()} for i in range(parts)]

    def _each(self, verb: str, batches: Sequence[Batch], *arguments: Any) -> list[Any]:
        refs = [
            getattr(actor, verb).remote(batch, *arguments)
            for actor, batch in zip(self.actors, batches, strict=True)
        ]
        return gather(refs, self.machines, role=_ROLE)


@contextmanager
def open_trainers(machines: ClusterConfig, start: Path, spec: TrainerSpec) -> Iterator[TrainerPool]:
    """A pool of `machines.trainers` that starts from the checkpoint `start`, closed afterwards."""
    ensure_ray(machines, str(start), cpus_needed=machines.trainers * machines.cpus_per_worker)
    arguments = (str(start), spec, machines, free_address())
    actors = spawn(_TrainWorker, machines, machines.trainers, role=_ROLE, arguments=arguments)
    try:
        yield TrainerPool(actors, machines)
    finally:
        dismiss(actors)


class _TrainWorker:
    """One rank of the pool."""

    def __init__(
        self, start: str, spec: TrainerSpec, machines: ClusterConfig, rendezvous: str, rank: int
    ) -> None:
        torch.set_num_threads(machines.threads_per_worker)
        if machines.trainers > 1:
            join_group(rendezvous, rank, machines.trainers, machines.step_timeout_seconds)
        folder = Path(start)
        config = read_config(folder)
        self.rank = rank
        self.trainer = _trainer(config, spec, folder)
        self.reference = _trainer(config, spec, folder).model if spec.reference else None

    def ready(self) -> int:
        return self.rank

    def forward_backward(self, batch: Batch, loss: LossSpec) -> dict[str, float]:
        return self.trainer.forward_backward(batch, loss)

    def optim_step(self, learning_rate: float) -> dict[str, Any]:
        return self.trainer.optim_step(learning_rate)

    def reference_logprobs(self, batch: Batch, temperature: float) -> Tensor:
        assert self.reference is not None
        self.reference.eval()
        with torch.inference_mode():
            tokens_NT = batch["tokens"]
            logits_NTV = self.reference(tokens_NT)[:, :-1] / temperature
            chosen = logits_NTV.log_softmax(-1).gather(-1, tokens_NT[:, 1:, None]).squeeze(-1)
            return torch.nn.functional.pad(chosen, (0, 1))

    def weights(self) -> Mapping[str, Tensor]:
        return self.trainer.state()

    def save(self, folder: str) -> None:
        self.trainer.save(Path(folder))

    def load(self, folder: str, step: int) -> None:
        self.trainer.load(Path(folder), step=step)


def _trainer(config: ModelConfig, spec: TrainerSpec, start: Path) -> Trainer:
    trainer = Trainer(
        config,
        optim=spec.optim,
        balance=spec.balance,
        precision=spec.precision,
        seed=spec.seed,
    )
    trainer.load_whole(read_tensors(start))
    return trainer

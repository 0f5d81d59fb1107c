"""A pool of samplers: prompts in, answers out, each token from a policy of known version."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cluster.backend import Backend
from cluster.checkpoint import merged
from cluster.output import Output
from cluster.session import ray_for
from cluster.supply import Supply
from cluster.warmup import first_step_seconds
from cluster.workers import Actor, Worker, gather, open_workers
from configs.errors import MachineError
from configs.parallel import ClusterConfig
from configs.train import Precision
from model import decode
from model.drawing import Drawing
from model.fp8.scheme import Numerics, settle
from model.weight_cache import forget, keep
from model.weights.files import load_pretrained


@dataclass(frozen=True, slots=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int
    temperature: float
    """0 takes the likeliest token."""
    stop_tokens: tuple[int, ...]
    top_k: int | None = None
    """Draw from this many of the likeliest tokens only."""
    top_p: float = 1.0
    """Draw from the fewest likeliest tokens whose probabilities reach this sum."""
    max_rows: int | None = None
    """Answers that a sampler works on at a time; none means all of its share at once. Whenever one
    is finished, the next begins."""
    keep_experts: bool = False
    """Whether samples say which experts their tokens went to."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer and the evidence to train on it."""

    token_ids: list[int]
    """The stop token included, if it was reached."""
    logprobs: list[float]
    """Of each token under the distribution that it was drawn from."""
    version: int
    """Version of the weights that drew every token of this answer."""
    stopped: bool
    experts: np.ndarray | None = field(default=None, compare=False)
    """On request int32 [tokens read, layers with experts, experts a token]: where each token of
    prompt and answer went, but for the answer's last, which was never read."""


class GenerationPool:
    """Samplers with equal weights; prompts are divided over them in order."""

    def __init__(self, actors: list[Actor], machines: ClusterConfig, output: Output) -> None:
        self.actors, self.machines, self.output = actors, machines, output
        self._step_seconds = first_step_seconds(machines)

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Sample]:
        """One answer for each prompt, in order; answer i depends on `seeds[i]` and the weights.

        Which sampler serves a prompt bears on speed, and on no more than the last bits.
        """
        share = -(-len(prompts) // len(self.actors))
        refs: list[Any] = []
        for index, actor in enumerate(self.actors):
            part = slice(index * share, (index + 1) * share)
            refs.append(
                actor.sample.remote([list(p) for p in prompts[part]], sampling, list(seeds[part]))
            )
        parts = gather(refs, self.output, timeout_seconds=self._step_seconds)
        self._step_seconds = self.machines.step_timeout_seconds
        return [sample for part in parts for sample in part]

    def load(self, checkpoint: Path) -> None:
        """Let every sampler hold `checkpoint` as version 0, in place of the model that it held."""
        refs = [actor.load.remote(checkpoint) for actor in self.actors]
        gather(
            refs,
            self.output,
            timeout_seconds=self.machines.startup_timeout_seconds,
            setting="cluster.startup_timeout_seconds",
        )

    def update_weights(self, version: int, shards: Sequence[Any]) -> None:
        """Replace every sampler's weights by `shards` (see `TrainerPool.weights`).

        Returns once all samplers hold `version`; MachineError if one holds another.
        """
        refs = [actor.update_weights.remote(version, *shards) for actor in self.actors]
        held = gather(refs, self.output, timeout_seconds=self.machines.step_timeout_seconds)
        if set(held) != {version}:
            raise MachineError(f"samplers hold versions {held} after an update to {version}")


@contextmanager
def open_generation(
    machines: ClusterConfig,
    checkpoint: Path,
    *,
    logs: Path,
    supply: Supply,
    precision: Precision | Numerics = "high",
) -> Iterator[GenerationPool]:
    """A pool of `machines.samplers` that holds `checkpoint` as version 0, closed afterwards.

    What its workers print goes to files in the folder `logs`.
    """
    output = Output(str(logs), "sampler")
    with (
        ray_for(machines, str(checkpoint), workers=machines.samplers) as places,
        open_workers(
            _Sampler,
            machines,
            machines.samplers,
            output=output,
            supply=supply,
            arguments=(checkpoint, precision, machines.threads_per_worker, places.backend),
            backend=places.backend,
            share=places.sampler,
        ) as actors,
    ):
        yield GenerationPool(actors, machines, output)


class _Sampler(Worker):
    """One actor of the pool."""

    def __init__(
        self,
        checkpoint: Path,
        precision: Precision | Numerics,
        threads: int,
        backend: Backend,
        output: Output,
        supply: Supply,
        rank: int,
    ) -> None:
        super().__init__(output, supply, rank)
        torch.set_num_threads(threads)
        # Answers are drawn by their own seeds.
        backend.begin(seed=0)
        self.device = torch.device(backend.device)
        # As a trainer does: one that learns in high precision must not be sampled in FP8.
        self.numerics, _ = settle(backend.numerics(precision), self.device)
        self.load(checkpoint)

    def load(self, checkpoint: Path) -> None:
        vars(self).pop("model", None)  # There may be room for one only.
        self.supply.bring(checkpoint)
        self.model = load_pretrained(checkpoint, device=self.device, precision=self.numerics)
        keep(self.model)
        self.version = 0

    def sample(
        self, prompts: list[list[int]], sampling: Sampling, seeds: list[int]
    ) -> list[Sample]:
        answers = decode.sample(
            self.model,
            prompts,
            max_new_tokens=sampling.max_new_tokens,
            drawing=Drawing(sampling.temperature, sampling.top_k, sampling.top_p),
            stop_tokens=sampling.stop_tokens,
            seeds=seeds,
            max_rows=sampling.max_rows,
            keep_experts=sampling.keep_experts,
        )
        return [
            Sample(a.token_ids, a.logprobs, self.version, a.stopped, a.experts) for a in answers
        ]

    def update_weights(self, version: int, *shards: dict[str, Tensor]) -> int:
        whole = merged(shards)
        with torch.no_grad():
            for name, tensor in self.model.state_dict().items():
                tensor.copy_(whole[name])
        forget(self.model)
        self.version = version
        return self.version

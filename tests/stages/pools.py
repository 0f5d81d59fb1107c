"""The two pools of post-training in this process, for tests of its loop.

They compute with real models and the real trainer, so that what a run makes can be compared with
what the equations say; there is no Ray and there are no other processes.
"""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cluster import checkpoint
from cluster.checkpoint import merged
from cluster.generation import Sample, Sampling
from cluster.pool import Score, TrainerSpec
from cluster.saves import Saves
from cluster.supply import Supply
from cluster.trainer import Batch, LossSpec, build_trainer
from configs.parallel import ClusterConfig
from configs.profile import Profile
from model import decode
from model.drawing import Drawing
from model.transformer import Transformer
from model.weights.config import read_config
from model.weights.files import load_pretrained, read_tensors


@dataclass(frozen=True)
class Call:
    """One call of a pool's verb."""

    verb: str
    arguments: Mapping[str, Any]
    """Tensors are copies, made when the call came; forward_backward also keeps the `state` that
    the model was in."""
    weights: str
    """Digest of the pool's own weights when the call returned."""
    result: Any = None


@dataclass
class Book:
    """Every call of both pools in the order in which they ended, over all pools ever opened.

    `fail(verb, n, error)` makes the n-th call of a verb, counted in the same way, raise `error`
    before it does anything. Such a call is not in the book. `act(verb, n, action)` does something
    just before the call instead.
    """

    calls: list[Call] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    failures: dict[tuple[str, int], BaseException] = field(default_factory=dict)
    actions: dict[tuple[str, int], Any] = field(default_factory=dict)

    def fail(self, verb: str, number: int, error: BaseException) -> None:
        self.failures[verb, number] = error

    def act(self, verb: str, number: int, action: Any) -> None:
        self.actions[verb, number] = action

    def begin(self, verb: str) -> None:
        """Count a call, and fail if it was to."""
        self.counts[verb] = self.counts.get(verb, 0) + 1
        key = verb, self.counts[verb]
        if key in self.actions:
            self.actions[key]()
        if key in self.failures:
            raise self.failures[key]

    def of(self, *verbs: str) -> list[Call]:
        """The calls of these verbs, in order."""
        return [call for call in self.calls if call.verb in verbs]

    def verbs(self) -> list[str]:
        return [call.verb for call in self.calls]


class LocalTrainers:
    """A `TrainerPool` of one rank, which is the real `Trainer`.

    It starts from the checkpoint that it was opened on, and so does the reference, which nothing
    changes afterwards. `weights` hands out a copy of what it holds at that moment. Saves are real
    ones, marked complete and pruned as the pool does.
    """

    def __init__(self, book: Book, start: Path, spec: TrainerSpec) -> None:
        self.book, self.spec = book, spec
        self.trainer = build_trainer(
            read_config(start),
            optim=spec.optim,
            balance=spec.balance,
            precision=spec.precision,
            seed=spec.seed,
        )
        self.trainer.load_whole(read_tensors(start))
        self.starting = load_pretrained(start).eval() if spec.reference else None
        self._note("open_trainers", {"start": start, "spec": spec})

    def news(self) -> dict[str, Any]:
        self.book.begin("news")
        return self.trainer.news()

    def reference(self, batch: Batch, score: Score) -> Tensor:
        self.book.begin("reference")
        assert self.starting is not None
        with torch.inference_mode():
            found = score(self.starting, batch).clone()
        self._note("reference", {"batch": _copy(batch), "score": score}, found)
        return found

    def forward_backward(
        self, batch: Batch, loss: LossSpec, *, counting: bool = False
    ) -> dict[str, float]:
        self.book.begin("forward_backward")
        state = _copy(self.trainer.state())
        found = self.trainer.forward_backward(batch, loss, counting=counting)
        arguments = {"batch": _copy(batch), "loss": loss, "counting": counting, "state": state}
        self._note("forward_backward", arguments, found)
        return found

    @contextmanager
    def tracing(self, asked: Profile | None, step: int, *, of: int) -> Iterator[None]:
        assert asked is None
        yield

    def fp8_tallies(self) -> dict[str, Any]:
        self.book.begin("fp8_tallies")
        return dict(self.trainer.fp8_tallies())

    def optim_step(self, learning_rate: float) -> dict[str, Any]:
        self.book.begin("optim_step")
        found = self.trainer.optim_step(learning_rate)
        self._note("optim_step", {"learning_rate": learning_rate}, found)
        return found

    def weights(self) -> list[Mapping[str, Tensor]]:
        self.book.begin("weights")
        shards: list[Mapping[str, Tensor]] = [_copy(self.trainer.state())]
        self._note("weights", {}, shards)
        return shards

    def save(self, saves: Saves, *, step: int) -> None:
        self.book.begin("save")
        self.trainer.save(checkpoint.step_folder(saves.root, step))
        saves.complete(replace(self.trainer.save_state(), step=step, phase="posttrain"))
        self._note("save", {"root": saves.root, "step": step, "earlier": saves.earlier})

    def load(self, folder: Path, *, step: int) -> None:
        self.book.begin("load")
        self.trainer.load(folder, step=step)
        self._note("load", {"folder": folder, "step": step})

    def _note(self, verb: str, arguments: Mapping[str, Any], result: Any = None) -> None:
        weights = digest(self.trainer.model)
        self.book.calls.append(Call(verb, arguments, weights, result))


class LocalSamplers:
    """A `GenerationPool` of one sampler, which decodes with the weights that it holds.

    An answer depends on its prompt, its seed and those weights, and bears the version under which
    they came: 0 for the checkpoint that the pool was opened on.
    """

    def __init__(self, book: Book, start: Path, precision: Any) -> None:
        self.book, self.version = book, 0
        self.model = load_pretrained(start, precision=precision)
        self._note("open_generation", {"start": start, "precision": precision})

    def sample(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, seeds: Sequence[int]
    ) -> list[Sample]:
        self.book.begin("sample")
        answers = decode.sample(
            self.model,
            [list(prompt) for prompt in prompts],
            max_new_tokens=sampling.max_new_tokens,
            drawing=Drawing(sampling.temperature, sampling.top_k, sampling.top_p),
            stop_tokens=sampling.stop_tokens,
            seeds=list(seeds),
            max_rows=sampling.max_rows,
        )
        found = [Sample(a.token_ids, a.logprobs, self.version, a.stopped) for a in answers]
        arguments = {
            "prompts": [tuple(prompt) for prompt in prompts],
            "sampling": sampling,
            "seeds": tuple(seeds),
            "version": self.version,
        }
        self._note("sample", arguments, found)
        return found

    def update_weights(self, version: int, shards: Sequence[Mapping[str, Tensor]]) -> None:
        self.book.begin("update_weights")
        self._take(version, shards)
        self._note("update_weights", {"version": version})

    def _take(self, version: int, shards: Sequence[Mapping[str, Tensor]]) -> None:
        self.model.load_state_dict(merged([dict(shard) for shard in shards]))
        self.version = version

    def _note(self, verb: str, arguments: Mapping[str, Any], result: Any = None) -> None:
        self.book.calls.append(Call(verb, arguments, digest(self.model), result))


class DeafSamplers(LocalSamplers):
    """Samplers that confirm new weights and keep the old ones, under the old version."""

    def _take(self, version: int, shards: Sequence[Mapping[str, Tensor]]) -> None:
        pass


@dataclass
class LocalPools:
    """What opens the pools, in the place of `open_trainers` and `open_generation`."""

    book: Book = field(default_factory=Book)
    samplers: type[LocalSamplers] = LocalSamplers

    @contextmanager
    def open_trainers(
        self, machines: ClusterConfig, start: Path, spec: TrainerSpec, *, logs: Path, supply: Supply
    ) -> Iterator[LocalTrainers]:
        yield LocalTrainers(self.book, start, spec)

    @contextmanager
    def open_generation(
        self,
        machines: ClusterConfig,
        checkpoint: Path,
        *,
        logs: Path,
        supply: Supply,
        precision: Any = "high",
    ) -> Iterator[LocalSamplers]:
        yield self.samplers(self.book, checkpoint, precision)


def digest(model: Transformer) -> str:
    """Of every weight and buffer of a model, to the last bit."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(name.encode() + tensor.detach().contiguous().numpy().tobytes())
    return found.hexdigest()


def _copy(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}

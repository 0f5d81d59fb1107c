"""What is said when memory runs out: who held how much, and which settings ask for less.

Weights, gradients and moments are counted from the model and its optimiser. All else of the peak
is what a step needs while it runs: activations, copies of weights in other forms, the allocator's
own, and on a CPU the process itself.
"""

from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from cluster.device_errors import first_line, is_out_of_memory
from cluster.output import Output
from configs.errors import MachineError

P = ParamSpec("P")
T = TypeVar("T")


def less_memory(ep: int | None = None, also: str = "") -> str:
    """What lowers the memory of a rank, whatever it trains: dividing rows and experts further."""
    ranks = "cluster.trainers" if ep is None else f"cluster.trainers and cluster.ep = {ep}"
    return f"raise {also}{ranks} and run again, which goes on from the newest save"


LESS_MEMORY = less_memory()


@dataclass(frozen=True, slots=True)
class Room:
    """What those who train know of their memory beside the model."""

    output: Output | None = None
    """Where the ranks' words go; a snapshot lies beside them."""
    settings: str = LESS_MEMORY
    """Which settings of the recipe lower what a rank holds, as an imperative."""


@dataclass(frozen=True, slots=True)
class Held:
    """Bytes by category, of one process."""

    weights: int
    gradients: int
    moments: int
    peak: int
    """Of all together, the most until now."""

    @property
    def rest(self) -> int:
        """The peak beyond the other categories."""
        return max(0, self.peak - self.weights - self.gradients - self.moments)

    def told(self) -> str:
        """In one line."""
        return (
            f"weights {self.weights:,} bytes, gradients {self.gradients:,}, moments "
            f"{self.moments:,}, and activations, caches and all else {self.rest:,} of a peak of "
            f"{self.peak:,}"
        )


def telling_when_full(verb: Callable[P, T]) -> Callable[P, T]:
    """Make a verb of a trainer say by a MachineError that memory ran out, and who held it."""

    @wraps(verb)
    def tell(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return verb(*arguments, **named)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            # While the error holds the frames that it came through, and they their tensors.
            trainer: Any = arguments[0]
            raise _full(trainer, error) from error

    return tell


def telling_of_model(build: Callable[P, T]) -> Callable[P, T]:
    """The same of what makes a trainer of a config, and has none yet."""

    @wraps(build)
    def tell(*arguments: P.args, **named: P.kwargs) -> T:
        try:
            return build(*arguments, **named)
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            config: Any = arguments[0]
            raise MachineError(
                f"memory ran out while a model of {config.parameters():,} parameters was made, of "
                "which each rank holds its share of the experts and all else: 4 bytes a parameter "
                "for weights, as much for gradients, and 4 to 8 for moments; raise "
                "cluster.trainers, or cluster.ep where it is set, or take a smaller model "
                f"({first_line(error)})"
            ) from error

    return tell


def held_by(model: nn.Module, optimizer: torch.optim.Optimizer, peak: int) -> Held:
    """What this process holds of a training."""
    parameters = list(model.parameters())
    return Held(
        weights=_bytes([*parameters, *model.buffers()]),
        gradients=_bytes(one.grad for one in parameters if one.grad is not None),
        moments=_bytes(
            one
            for state in optimizer.state.values()
            for one in state.values()
            if isinstance(one, Tensor)
        ),
        peak=peak,
    )


def _full(trainer: Any, error: BaseException) -> MachineError:
    room = trainer.room
    device = next(iter(trainer.model.parameters())).device
    snapshot = _write_snapshot(device, room.output, trainer.rank)
    held = held_by(trainer.model, trainer.optimizer, trainer.backend.memory().peak)
    beside = f"; a snapshot of its memory is in {snapshot}" if snapshot else ""
    return MachineError(
        f"trainer {trainer.rank}: memory of {device} ran out in step {trainer.step + 1}, with "
        f"{held.told()}; {room.settings} "
        f"({first_line(error)}){beside}"
    )


def _write_snapshot(device: torch.device, output: Output | None, rank: int) -> Path | None:
    """The blocks of the device's allocator as they are, for PyTorch's viewer; none without one."""
    module = torch.get_device_module(device)
    dump = getattr(getattr(module, "memory", None), "_dump_snapshot", None)
    if dump is None or output is None or device.type == "cpu":
        return None
    path = output.path(rank).with_suffix(".memory.pickle")
    # Whatever it is that fails, memory ran out before it, and that is to be told.
    with suppress(Exception):
        dump(str(path))
        return path
    return None


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(one.numel() * one.element_size() for one in tensors)

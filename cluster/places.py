"""What each worker of a stage reserves of the devices that are there, and how long it may wait.

Trainers of a group take a device each, since collectives refuse two of them on one. Samplers take
whole ones where there are enough, and otherwise share: with each other, or with the trainers of
their stage. Ray counts shares and divides no memory, so those that share must fit together.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

from cluster.backend import CPU, Backend
from cluster.warmup import first_step_seconds
from configs.errors import MachineError
from configs.parallel import ClusterConfig

_SHARE_OF_A_TRAINER = 0.6
"""Of a device that it shares with samplers: above a half, so that no second trainer fits there."""
_FINEST = 10_000
"""Ray counts shares in parts of this size."""
_ROOM = 0.9
"""A deadline is this part of the one that it must not outlast."""


@dataclass(frozen=True, slots=True)
class Places:
    """What the workers of a stage compute on, and the share of a device that each reserves."""

    backend: Backend = CPU
    trainer: float = 0.0
    sampler: float = 0.0


def share_out(backend: Backend, devices: float, *, trainers: int, samplers: int) -> Places:
    """Places of workers that are there at a time, on so many devices.

    MachineError if trainers outnumber the devices.
    """
    if backend.is_host:
        return Places(backend)
    whole = math.floor(devices)
    if trainers > whole:
        are = "is" if whole == 1 else "are"
        raise MachineError(
            f"cluster.trainers = {trainers}, each on a {backend.resource} of its own, of which "
            f"{whole} {are} there; set it to {whole}, name a larger cluster in cluster.address, or "
            "set cluster.device = 'cpu'"
        )
    if trainers + samplers <= whole:
        return Places(backend, 1.0, 1.0)
    each = -(-samplers // whole)
    trainer = _SHARE_OF_A_TRAINER if trainers else 0.0
    sampler = math.floor((1 - trainer) / each * _FINEST) / _FINEST
    return Places(backend, trainer, sampler)


class Deadlines(NamedTuple):
    """Seconds, each shorter than the next, so that whoever knows most speaks first."""

    execute: int
    """Of one collective, to a library that counts by itself."""
    group: float
    """Of a process group."""
    step: float
    """Of a worker's answer."""


def deadlines(backend: Backend, machines: ClusterConfig, *, first: bool = False) -> Deadlines:
    """What bounds collectives below `cluster.step_timeout_seconds`, or in the `first` step."""
    step = first_step_seconds(machines) if first else machines.step_timeout_seconds
    # In a group of CPUs the rank that waits raises by itself, and is heard in time.
    group = step if backend.is_host else _ROOM * step
    execute = _ROOM * group
    if backend.timeouts is not None and execute >= backend.timeouts.step:
        execute -= execute % backend.timeouts.step
    return Deadlines(max(1, math.floor(execute)), group, step)


def timeout_env(backend: Backend, machines: ClusterConfig) -> dict[str, str]:
    """The variables of a library's own deadlines."""
    its = backend.timeouts
    if its is None:
        return {}
    connect = min(
        max(math.ceil(machines.startup_timeout_seconds), its.connect_least), its.connect_most
    )
    return {
        # Of every step, the first too: it cannot be lowered once a process has begun, and must not
        # outlast the group's.
        its.execute: str(deadlines(backend, machines).execute),
        its.connect: str(connect),
    }

"""Groups of actors that a single-process driver calls, with a deadline on every wait."""

import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import psutil
import ray
from ray.exceptions import (
    ActorUnavailableError,
    NodeDiedError,
    ObjectLostError,
    RayActorError,
    RayError,
    RayTaskError,
)
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.backend import CPU, Backend
from cluster.device_errors import device_lost, out_of_memory
from cluster.gathered import bring_up_to_date, gathered
from cluster.head import is_lost, require_head
from cluster.output import Output
from cluster.session import LOOK_SECONDS, worker_env
from cluster.supply import Supply
from cluster.warmup import keep_compiled
from configs.errors import DeadlineError, IngotError, MachineError
from configs.parallel import ClusterConfig

Actor = Any
"""A Ray actor handle: its methods exist only at run time, so no type can say more."""
E = TypeVar("E", bound=Exception)
T = TypeVar("T")

_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
"""How long a worker may go on after another has failed."""


class WorkerDied(MachineError):
    """A worker process is gone; the group must be rebuilt."""


class Worker:
    """What every actor of a group does first: it finds its files, and its words go where its
    group's do."""

    def __init__(self, output: Output, supply: Supply, rank: int) -> None:
        supply.arrive()
        output.capture(rank)
        keep_compiled()
        self.supply, self.rank = supply, rank

    def ready(self) -> int:
        return self.rank


@contextmanager
def open_workers(
    actor_class: type[Worker],
    machines: ClusterConfig,
    count: int,
    *,
    output: Output,
    supply: Supply,
    arguments: tuple[Any, ...],
    backend: Backend = CPU,
    share: float = 0.0,
) -> Iterator[list[Actor]]:
    """`count` actors of `actor_class(*arguments, output, supply, rank)`, ended afterwards.

    Placed as `cluster.placement` says, each with a `share` of one of the backend's devices, of
    which it sees no other. MachineError if they cannot be placed or a constructor raises;
    DeadlineError if one takes longer than `cluster.startup_timeout_seconds` to construct.
    """
    each = needs_of(machines, backend, share)
    await_room(each, machines, count, role=output.role)
    group: Any = placement_group([each] * count, strategy=machines.placement.upper())
    actors: list[Actor] = []
    try:
        _await_places(group, machines, each, count, role=output.role)
        with gathered(output, supply):
            for rank in range(count):
                remote: Any = ray.remote(actor_class).options(
                    num_cpus=machines.cpus_per_worker,
                    runtime_env={"env_vars": worker_env(machines, backend)},
                    max_restarts=0,
                    scheduling_strategy=PlacementGroupSchedulingStrategy(group, rank),
                    **backend.asked(share),
                )
                actors.append(remote.remote(*arguments, output, supply, rank))
            pending = [actor.ready.remote() for actor in actors]
            gather(
                pending,
                output,
                timeout_seconds=machines.startup_timeout_seconds,
                setting="cluster.startup_timeout_seconds",
            )
            yield actors
    finally:
        if not is_lost():
            try:
                for actor in actors:
                    ray.kill(actor, no_restart=True)
            finally:
                remove_placement_group(group)


def _await_places(
    group: Any, machines: ClusterConfig, each: Mapping[str, float], count: int, *, role: str
) -> None:
    """Return once a group's places are reserved: what is free may lie on too many machines."""
    timeout = machines.placement_timeout_seconds
    deadline = time.monotonic() + timeout
    # In short waits, between which an interrupt is noticed; Ray counts whole seconds.
    while not group.wait(1):
        require_head()
        if time.monotonic() > deadline:
            raise MachineError(
                f"{count} {role}s of {_told(each)} each found no place within {timeout:g} s, "
                "though that many are free in all; lower cluster.cpus_per_worker, or stop what "
                "else runs on the cluster"
            )


def with_restarts(
    build: Callable[[], T], machines: ClusterConfig, note: Callable[[str], None]
) -> T:
    """What `build` returns; it is called again whenever one of its workers dies.

    MachineError once that happened more than `cluster.max_restarts` times. `note` is told of each.
    """
    for deaths in range(1, machines.max_restarts + 2):
        try:
            return build()
        except WorkerDied as death:
            if deaths > machines.max_restarts:
                raise MachineError(
                    f"{death}; workers died {deaths} times, cluster.max_restarts = "
                    f"{machines.max_restarts}; run again to continue"
                ) from death
            note(f"{death}; starting the workers anew")
    raise AssertionError("the last death is raised")


def needs_of(machines: ClusterConfig, backend: Backend, share: float) -> dict[str, float]:
    """What one worker reserves, by Ray's names."""
    return {"CPU": machines.cpus_per_worker, **backend.bundle(share)}


def await_room(
    each: Mapping[str, float], machines: ClusterConfig, count: int, *, role: str
) -> None:
    """Return once there is room for `count` workers that reserve so much each.

    MachineError naming the shortage after `cluster.placement_timeout_seconds`.
    """
    timeout = machines.placement_timeout_seconds
    deadline = time.monotonic() + timeout
    while (short := _shortage(each, count)) is not None:
        require_head()
        if time.monotonic() > deadline:
            needed, free, name = short
            lower = "cluster.cpus_per_worker" if name == "CPU" else f"cluster.{role}s"
            raise MachineError(
                f"{count} {role}s ask for {needed:g} {name}s and {free:g} were free after "
                f"{timeout:g} s; lower {lower}, or stop what else runs on the cluster"
            )
        time.sleep(_POLL_SECONDS)


def _shortage(each: Mapping[str, float], count: int) -> tuple[float, float, str] | None:
    """(needed, free, name) of the first that is short; none if nothing is."""
    available = ray.available_resources()
    for name, share in each.items():
        needed, free = count * share, float(available.get(name, 0))
        if free < needed - 1e-6:
            return needed, free, name
    return None


def _told(each: Mapping[str, float]) -> str:
    """`0.5 CPUs and 1 GPUs`."""
    return " and ".join(f"{share:g} {name}s" for name, share in each.items())


def gather(
    refs: Sequence[Any],
    output: Output,
    *,
    timeout_seconds: float,
    setting: str = "cluster.step_timeout_seconds",
) -> list[Any]:
    """The results of one call on each worker, in order; `setting` is what bounds the wait.

    DeadlineError names the workers that did not answer in time; WorkerDied those that are gone;
    an Ingot error raised in a worker's method is raised here as itself. The others bear as a note
    the end of what the worker printed. After the first failure the other workers, who may be
    waiting for that one in a collective, get a few seconds only.
    """
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    failures: list[Exception] = []
    waiting = {ref: rank for rank, ref in enumerate(refs)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        require_head()
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=min(left, LOOK_SECONDS))
        for ref in done:
            rank = waiting.pop(ref)
            try:
                results[rank] = ray.get(ref)
            except RayError as error:
                failures.append(_failure(error, output, rank))
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failures:
        # A dead peer makes the others' collectives fail too; it is the one to name.
        failures.sort(key=lambda failure: not isinstance(failure, WorkerDied))
        raise failures[0]
    if waiting:
        silent = sorted(waiting.values())
        late = DeadlineError(
            f"{output.role} {silent} did not answer within {timeout_seconds:g} s; see what it "
            f"printed in {output.path(silent[0])}, or raise {setting}"
        )
        raise with_tail(late, output, silent[0])
    return [results[rank] for rank in range(len(refs))]


def choose_network(backend: Backend = CPU) -> None:
    """Have this process's collectives use the network that Ray knows its machine by.

    They would take the address that the machine's own name stands for, which on many is loopback.
    """
    own = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(one.address == own for one in addresses):
            for variable in backend.sockets:
                os.environ.setdefault(variable, name)


def free_address(host: str) -> str:
    """`tcp://host:port` with a port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


def with_tail(error: E, output: Output, rank: int) -> E:
    """The error, with the end of what a worker printed as a note."""
    bring_up_to_date(output)
    if tail := output.tail(rank):
        error.add_note(tail)
    return error


def _failure(error: RayError, output: Output, rank: int) -> Exception:
    """What became of a worker, as an error of ours; what it has not printed goes to its file."""
    who = f"{output.role} {rank}"
    if isinstance(error, RayTaskError) and not _is_of_ray(error.cause):
        output.add(rank, str(error))
        cause = error.cause
        if isinstance(cause, IngotError):
            return cause
        if (told := out_of_memory(cause, output.role)) is not None:
            return MachineError(f"{who}: {told}")
        if (told := device_lost(cause)) is not None:
            return with_tail(WorkerDied(f"{who} died: {told}"), output, rank)
        raised = MachineError(f"{who}: {type(cause).__name__}: {cause}")
        return with_tail(raised, output, rank)
    if isinstance(error, RayActorError) and error.actor_init_failed:
        # Not a dead one: building it again would raise again. Ray has printed why.
        unable = MachineError(f"{who} could not start: {_lines(error)[-1]}")
        return with_tail(unable, output, rank)
    why = what_happened(error)
    output.add(rank, f"died: {why}")
    return with_tail(WorkerDied(f"{who} died: {why}"), output, rank)


def _is_of_ray(cause: BaseException) -> bool:
    """Whether a call failed by the loss of a machine that held what it was given."""
    return isinstance(cause, RayError) and not isinstance(cause, RayTaskError)


def what_happened(error: Exception) -> str:
    """Why a worker is gone, in one line; Ray has many for a machine that is lost."""
    text = " ".join(str(error).split())
    cause = error.cause if isinstance(error, RayTaskError) else error
    is_of_ray = not isinstance(error, RayTaskError) or _is_of_ray(error.cause)
    if isinstance(cause, ActorUnavailableError | NodeDiedError | ObjectLostError) or any(
        is_of_ray and one in text
        for one in ("is unavailable", "its node has died", "node has terminated")
    ):
        return "its machine does not answer any more"
    return _lines(error)[0]


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]

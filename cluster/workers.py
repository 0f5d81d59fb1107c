"""Groups of actors that a single-process driver calls, with a deadline on every wait."""

import socket
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError

from cluster.session import LOOK_SECONDS, worker_env
from configs.errors import DeadlineError, IngotError, MachineError
from configs.parallel import ClusterConfig

Actor = Any
"""A Ray actor handle: its methods exist only at run time, so no type can say more."""


_POLL_SECONDS = 0.2
_GRACE_SECONDS = 5.0
"""How long a worker may go on after another has failed."""


class WorkerDied(MachineError):
    """A worker process is gone; the group must be rebuilt."""


def spawn(
    actor_class: type[Any],
    machines: ClusterConfig,
    count: int,
    *,
    role: str,
    arguments: tuple[Any, ...],
) -> list[Actor]:
    """`count` actors of `actor_class(*arguments, rank)`, each of which answers `ready()`.

    MachineError if they cannot be placed or a constructor raises; DeadlineError if one takes
    longer than `cluster.startup_timeout_seconds` to construct.
    """
    await_cpus(machines, count, role=role)
    remote: Any = ray.remote(actor_class).options(
        num_cpus=machines.cpus_per_worker,
        runtime_env={"env_vars": worker_env(machines)},
        max_restarts=0,
    )
    actors = [remote.remote(*arguments, rank) for rank in range(count)]
    try:
        pending = [actor.ready.remote() for actor in actors]
        gather(pending, role=role, timeout_seconds=machines.startup_timeout_seconds)
    except MachineError:
        dismiss(actors)
        raise
    return actors


def await_cpus(machines: ClusterConfig, count: int, *, role: str) -> None:
    """Return once `count` workers' CPUs are free.

    MachineError naming the shortage after `cluster.placement_timeout_seconds`.
    """
    needed = count * machines.cpus_per_worker
    timeout = machines.placement_timeout_seconds
    deadline = time.monotonic() + timeout
    while (free := float(ray.available_resources().get("CPU", 0))) < needed - 1e-6:
        if time.monotonic() > deadline:
            raise MachineError(
                f"{count} {role}s ask for {needed:g} CPUs and {free:g} were free after "
                f"{timeout:g} s; lower cluster.cpus_per_worker, or stop what else runs on the "
                "cluster"
            )
        time.sleep(_POLL_SECONDS)


def gather(refs: Sequence[Any], *, role: str, timeout_seconds: float) -> list[Any]:
    """The results of one call on each worker, in order.

    DeadlineError names the workers that did not answer in time; WorkerDied those that are gone;
    an Ingot error raised in a worker's method is raised here as itself. After the first failure
    the others, who may be waiting for that worker in a collective, get a few seconds only.
    """
    deadline = time.monotonic() + timeout_seconds
    results: dict[int, Any] = {}
    failures: list[Exception] = []
    waiting = {ref: rank for rank, ref in enumerate(refs)}
    while waiting and (left := deadline - time.monotonic()) > 0:
        done, _ = ray.wait(list(waiting), num_returns=1, timeout=min(left, LOOK_SECONDS))
        for ref in done:
            rank = waiting.pop(ref)
            try:
                results[rank] = ray.get(ref)
            except (RayActorError, RayTaskError) as error:
                failures.append(_failure(error, f"{role} {rank}"))
                deadline = min(deadline, time.monotonic() + _GRACE_SECONDS)
    if failures:
        # A dead peer makes the others' collectives fail too; it is the one to name.
        failures.sort(key=lambda failure: not isinstance(failure, WorkerDied))
        raise failures[0]
    if waiting:
        raise DeadlineError(
            f"{role} {sorted(waiting.values())} did not answer within {timeout_seconds:g} s; look "
            "at its log in Ray's session folder, or raise cluster.step_timeout_seconds"
        )
    return [results[rank] for rank in range(len(refs))]


def dismiss(actors: Sequence[Actor]) -> None:
    """End the actors, whatever they are doing."""
    for actor in actors:
        ray.kill(actor, no_restart=True)


def free_address(host: str) -> str:
    """`tcp://host:port` with a port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return f"tcp://{host}:{probe.getsockname()[1]}"


def _failure(error: Exception, who: str) -> Exception:
    match error:
        case RayActorError():
            return _death(error, who)
        case RayTaskError():
            return _cause(error, who)
    return error


def _death(error: RayActorError, who: str) -> MachineError:
    """A worker whose constructor raised is not dead: building it again would raise again."""
    if error.actor_init_failed:
        return MachineError(f"{who} could not start: {_lines(error)[-1]}")
    return WorkerDied(f"{who} died: {_lines(error)[0]}")


def _cause(error: RayTaskError, who: str) -> Exception:
    cause = error.cause
    if isinstance(cause, IngotError):
        return cause
    return MachineError(f"{who}: {type(cause).__name__}: {cause}")


def _lines(error: Exception) -> list[str]:
    return [line.strip() for line in str(error).splitlines() if line.strip()] or [repr(error)]

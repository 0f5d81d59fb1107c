"""Groups of actors that a single-process driver calls, with a deadline on every wait."""

import socket
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import ActorDiedError, GetTimeoutError, RayActorError, RayTaskError

from cluster.session import worker_env
from configs.errors import DeadlineError, IngotError, MachineError
from configs.parallel import ClusterConfig

Actor = Any
"""A Ray actor handle: its methods exist only at run time, so no type can say more."""


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
    """`count` actors of `actor_class(*arguments, rank)`.

    MachineError if they cannot be placed, or if a constructor raises.

    The class must have a method `ready()`.
    """
    remote: Any = ray.remote(actor_class).options(
        num_cpus=machines.cpus_per_worker,
        runtime_env={"env_vars": worker_env(machines)},
        max_restarts=0,
    )
    actors = [remote.remote(*arguments, rank) for rank in range(count)]
    timeout = machines.placement_timeout_seconds
    pending = [actor.ready.remote() for actor in actors]
    ready, missing = ray.wait(pending, num_returns=count, timeout=timeout)
    if missing:
        dismiss(actors)
        free = ray.available_resources().get("CPU", 0)
        raise MachineError(
            f"{len(ready)} of {count} {role}s were placed within {timeout:g} s; each asks for "
            f"{machines.cpus_per_worker:g} CPUs and {free:g} are free; lower "
            "cluster.cpus_per_worker or stop what else runs on the cluster"
        )
    try:
        gather(pending, machines, role=role)
    except MachineError:
        dismiss(actors)
        raise
    return actors


def gather(refs: Sequence[Any], machines: ClusterConfig, *, role: str) -> list[Any]:
    """The results of one call on each worker, in order.

    DeadlineError names the workers that did not answer within `cluster.step_timeout_seconds`;
    WorkerDied those that are gone; an Ingot error raised in a worker's method is raised here as
    itself.
    """
    timeout = machines.step_timeout_seconds
    _, waiting = ray.wait(list(refs), num_returns=len(refs), timeout=timeout, fetch_local=False)
    if waiting:
        late = [rank for rank, ref in enumerate(refs) if ref in waiting]
        raise DeadlineError(f"{role} {late} did not answer within {timeout:g} s")
    results: list[Any] = []
    failures: list[Exception] = []
    for rank, ref in enumerate(refs):
        try:
            results.append(ray.get(ref, timeout=timeout))
        except (ActorDiedError, RayActorError) as error:
            failures.append(_death(error, f"{role} {rank}"))
        except RayTaskError as error:
            failures.append(_cause(error, f"{role} {rank}"))
        except GetTimeoutError:
            failures.append(DeadlineError(f"{role} {rank}: result not fetched in {timeout:g} s"))
    if failures:
        # A dead peer makes the others' collectives fail too; it is the one to name.
        failures.sort(key=lambda failure: not isinstance(failure, WorkerDied))
        raise failures[0]
    return results


def dismiss(actors: Sequence[Actor]) -> None:
    """End the actors, whatever they are doing."""
    for actor in actors:
        ray.kill(actor, no_restart=True)


def free_address() -> str:
    """`tcp://127.0.0.1:port` with a port that is free on this machine now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"tcp://127.0.0.1:{probe.getsockname()[1]}"


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

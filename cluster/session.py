"""Opens Ray for this process, once, and knows how its workers must be set up.

Stages may run side by side, each on a thread of its own, with one Ray between them. They share it
here: each waits until there is room for its workers, and who is stopped closes it for all.
"""

import logging
import os
import queue
import secrets
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray._common.utils import get_system_memory
from ray._private import worker

from cluster.backend import ACCELERATORS, CPU, Backend, computing, decide, hidden, seen
from cluster.head import require_head, require_listener, require_reachable, watch
from cluster.nodes import require_equal_nodes
from cluster.places import Places, share_out, timeout_env
from cluster.surroundings import (
    folder_fault,
    needs_own_token,
    tmpdir_for_ray,
    token_fault,
    why_refused,
)
from configs.errors import MachineError
from configs.parallel import ClusterConfig

T = TypeVar("T")

LOOK_SECONDS = 0.5
"""A thread that waits looks up so often: another can interrupt it between two lines of Python, and
not within one."""
_SHARE_OF_MEMORY = 0.3
"""Of a machine's, for what its workers hand each other."""
_LEAST_STORE_BYTES = 512 * 1024**2
_SHARED_MEMORY = Path("/dev/shm")
_LOCAL = "127.0.0.1"


def worker_env(machines: ClusterConfig, backend: Backend = CPU) -> dict[str, str]:
    """Environment of every worker process.

    A worker sees the devices that Ray leaves it, and none of another kind: Ray hides nothing from
    those who ask for none. A local cluster keeps its collectives on loopback.
    """
    threads = str(machines.threads_per_worker)
    env = {
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "TOKENIZERS_PARALLELISM": "false",
        **backend.env,
        **timeout_env(backend, machines),
        **hidden(backend),
    }
    if machines.address is None:
        env |= {"MASTER_ADDR": _LOCAL, **dict.fromkeys(backend.sockets, "lo")}
    return env


_equal: set[str] = set()
"""Machines of the named cluster that are known to run what the driver runs."""


@dataclass(frozen=True, slots=True)
class _Room:
    """What the workers of a stage reserve in all."""

    cpus: float
    devices: float
    places: Places


class _Sharing:
    """Who of this process's threads uses its Ray, of which there is one as well."""

    def __init__(self) -> None:
        self.opening = threading.Lock()
        self.changed = threading.Condition()
        self.rooms: dict[int, _Room] = {}
        """By thread: what its workers reserve."""
        self.closing = False


_sharing = _Sharing()


@contextmanager
def ray_for(
    machines: ClusterConfig, home: str, *, workers: int, trainers: int = 0
) -> Iterator[Places]:
    """Ray, open, with room for so many workers of the calling thread's stage; their places.

    `trainers` of them work as one group. Waits while other stages of this process leave too little.
    A stage that has several groups of workers at a time asks once for all of them, and for each
    again within: two stages that had each half of theirs would wait for each other. MachineError if
    Ray is too small, not there, or without the devices that were asked for.
    """
    me, cpus = threading.get_ident(), workers * machines.cpus_per_worker
    ensure_ray(machines, home, cpus_needed=cpus)
    if me in _sharing.rooms:
        yield _sharing.rooms[me].places
        return
    samplers = workers - trainers
    places = _await_devices(machines, trainers=trainers, samplers=samplers)
    room = _Room(cpus, trainers * places.trainer + samplers * places.sampler, places)
    with _reserved(room):
        yield places


@contextmanager
def _reserved(room: _Room) -> Iterator[None]:
    """Room for the calling thread's workers, as soon as others leave it."""
    me = threading.get_ident()
    with _sharing.changed:
        # No deadline of its own: those who are waited for have theirs in all that they do.
        while _sharing.rooms and not _fits(room):
            require_head()
            _sharing.changed.wait(LOOK_SECONDS)
        _sharing.rooms[me] = room
    try:
        yield
    finally:
        with _sharing.changed:
            del _sharing.rooms[me]
            _sharing.changed.notify_all()
        _close_if_unused()


@contextmanager
def ray_cpus(machines: ClusterConfig, home: str, *, cpus: float) -> Iterator[None]:
    """Ray, open, with room for work that asks for so many CPUs and no device.

    As `ray_for`; of a cluster that has fewer, all are taken.
    """
    ensure_ray(machines, home, cpus_needed=1)
    room = _Room(min(cpus, _cpus_of_ray()), 0.0, Places())
    with _reserved(room):
        yield


def _await_devices(machines: ClusterConfig, *, trainers: int, samplers: int) -> Places:
    """Places for the workers of a stage.

    MachineError as of `backend_of` and `share_out`; a named cluster is given time to be joined by a
    machine that has what is short.
    """
    deadline = time.monotonic() + machines.placement_timeout_seconds
    while True:
        try:
            backend = backend_of(machines)
            devices = _devices_of_ray(backend)
            return share_out(backend, devices, trainers=trainers, samplers=samplers)
        except MachineError:
            require_head()
            if machines.address is None or time.monotonic() > deadline:
                raise
            time.sleep(LOOK_SECONDS)


def _fits(room: _Room) -> bool:
    """Whether there is room beside what others reserve."""
    taken = _sharing.rooms.values()
    cpus = sum(one.cpus for one in taken) + room.cpus
    backend = room.places.backend
    alike = [one for one in taken if one.places.backend.resource == backend.resource]
    devices = sum(one.devices for one in alike) + room.devices
    return cpus <= _cpus_of_ray() + 1e-6 and devices <= _devices_of_ray(backend) + 1e-6


def backend_of(machines: ClusterConfig) -> Backend:
    """What workers compute on, of what a named cluster's Ray counts, or this process sees.

    MachineError as of `decide`.
    """
    there = seen() if machines.address is None else ray.cluster_resources()
    return computing(decide(machines.device, there), machines.compute)


def _devices_of_ray(backend: Backend) -> float:
    return 0.0 if backend.is_host else float(ray.cluster_resources().get(backend.resource, 0))


def hear(said: "queue.SimpleQueue[T]") -> T:
    """What another thread says, whenever that is; an interrupt is noticed meanwhile, and the loss
    of the cluster's head, which is a MachineError."""
    while True:
        require_head()
        with suppress(queue.Empty):
            return said.get(timeout=LOOK_SECONDS)


def close_ray() -> None:
    """Close Ray, and with it all workers, as soon as no other thread uses it."""
    _sharing.closing = True
    _close_if_unused()


def _close_if_unused() -> None:
    with _sharing.changed:
        if _sharing.closing and not _sharing.rooms.keys() - {threading.get_ident()}:
            _sharing.closing = False
            ray.shutdown()


def ensure_ray(machines: ClusterConfig, home: str, *, cpus_needed: float) -> None:
    """Connect to the cluster, or start a local one; MachineError if it is too small.

    The process moves meanwhile to `home`, a folder without Python files: Ray puts the driver's
    working directory on its workers' import path, where a user's own `model.py` would hide ours.
    Nobody else minds, since a run's paths are absolute. Ray stays open until the process ends, for
    the stages that follow.
    """
    with _sharing.opening:
        if not ray.is_initialized():
            _open(machines, Path(home))
        if machines.address is not None:
            _require_equal_nodes(machines.address, machines.startup_timeout_seconds)
    require_reachable()
    deadline = time.monotonic() + machines.placement_timeout_seconds
    while (available := _cpus_of_ray()) < cpus_needed:
        require_head()
        if machines.address is not None and time.monotonic() < deadline:
            # A machine may be about to join in the place of one that is lost.
            time.sleep(LOOK_SECONDS)
            continue
        raise MachineError(
            f"the workers ask for {cpus_needed:g} CPUs, the cluster has {available:g}; lower "
            "cluster.trainers, cluster.samplers or cluster.cpus_per_worker, or name a larger "
            "cluster in cluster.address"
        )


def _cpus_of_ray() -> float:
    return float(ray.cluster_resources().get("CPU", 0))


def _open(machines: ClusterConfig, home: Path) -> None:
    for fault in (token_fault(machines, os.environ), folder_fault(machines, os.environ)):
        if fault is not None:
            raise MachineError("; ".join(fault))
    here, politely = Path.cwd(), signal.getsignal(signal.SIGTERM)
    os.chdir(home)
    for name in ("ray", "ray.data", "ray.train", "ray._private.authentication"):
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        _start_to_last(machines)
    except MachineError:
        raise
    except Exception as error:  # Ray raises no narrower one where its processes do not come up
        if machines.address is None:
            raise MachineError(
                f"no Ray can be started on this machine: {error}; if it was busy, run the same "
                "command again, else `ingot doctor` looks for what stands in its way"
            ) from error
        raise MachineError(
            f"cluster.address = {machines.address!r}: Ray cannot be reached: {error}; "
            f"{why_refused(machines, os.environ)}"
        ) from error
    finally:
        os.chdir(here)
        if threading.current_thread() is threading.main_thread():
            # Ray takes the signal for itself, and would end the process in the middle of a stage.
            signal.signal(signal.SIGTERM, politely)


def _require_equal_nodes(address: str, timeout_seconds: float) -> None:
    """Ask those that joined since the last stage."""
    _equal.update(require_equal_nodes(address, timeout_seconds=timeout_seconds, known=_equal))


def _start_to_last(machines: ClusterConfig) -> None:
    """Start Ray for as long as the process lives, whatever thread asks for it.

    Linux ends Ray's processes with the thread that has started them: so that one must not end.
    """
    if threading.current_thread() is threading.main_thread():
        _start(machines)
        return
    ended: queue.SimpleQueue[BaseException | None] = queue.SimpleQueue()

    def start() -> None:
        try:
            _start(machines)
        except BaseException as error:  # whatever ends the thread must end the wait for it
            ended.put(error)
        else:
            ended.put(None)
            threading.Event().wait()

    threading.Thread(target=start, name="ray", daemon=True).start()
    if (error := hear(ended)) is not None:
        raise error


def _start(machines: ClusterConfig) -> None:
    _shorten_messages()
    if machines.address is not None:
        require_listener(machines.address)
        with _silenced():
            ray.init(address=machines.address, log_to_driver=False, logging_level=logging.ERROR)
        watch(ray.get_runtime_context().gcs_address)
        return
    watch(None)
    # Ray would run workers at niceness 15, behind everything else on a machine that may be shared.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if needs_own_token(os.environ):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    with _short_tmpdir():
        ray.init(
            address="local",  # never one that RAY_ADDRESS names, or that runs here already
            num_cpus=max(2, os.cpu_count() or 1),
            include_dashboard=True,
            dashboard_host=_LOCAL,
            _node_ip_address=_LOCAL,  # without it Ray listens on the machine's own address
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=_store_bytes(),
            **_declared(),
        )


def _store_bytes() -> int:
    """Room for what is on its way between workers, of which a policy's weights are the most.

    It is taken as it fills. Beyond what the system lets processes share, Ray would keep it on disk.
    """
    # What a container may use, where it is less than what the machine has.
    share = _SHARE_OF_MEMORY * get_system_memory()
    with suppress(OSError):
        share = min(share, 0.9 * shutil.disk_usage(_SHARED_MEMORY).free)
    if sys.platform == "darwin":
        return _LEAST_STORE_BYTES  # Ray refuses more than 2 GiB there.
    return max(_LEAST_STORE_BYTES, int(share))


def _declared() -> dict[str, Any]:
    """The devices that this process sees, for Ray to count: it looks in other places than torch."""
    there = seen()
    declared: dict[str, Any] = {}
    for one in ACCELERATORS:
        if count := int(there.get(one.resource, 0)):
            declared |= one.asked(count)
    return declared


@contextmanager
def _silenced() -> Iterator[None]:
    """Nothing goes to stderr: Ray's library tells there of each of its tries to join, twenty for a
    wrong token, and the error that ends them says it all."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _shorten_messages() -> None:
    """Have what Ray says of lost workers and machines be one line each, on stderr.

    It prints a page of each onto stdout, and offers no other way.
    """
    if not hasattr(worker, "print_to_stdstream"):
        return

    def say(data: Mapping[str, Any], ignore_prefix: bool = False) -> None:
        for text in data.get("lines", ()):
            sentence = " ".join(str(text).split(". ")[0].split())
            print(f"Ray: {sentence}", file=sys.stderr)

    worker.print_to_stdstream = say


@contextmanager
def _short_tmpdir() -> Iterator[None]:
    """A TMPDIR that leaves room for paths of sockets, for the processes that are started within."""
    short, asked = tmpdir_for_ray(os.environ), os.environ.get("TMPDIR")
    if short is None or asked is None:
        yield
        return
    os.environ["TMPDIR"] = short
    try:
        yield
    finally:
        os.environ["TMPDIR"] = asked

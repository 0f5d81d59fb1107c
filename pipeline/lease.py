"""Who may commit a generation: numbered files, each created by one builder and renewed by it alone.

`lease-000001.json` in the generation's folder holds owner, process, host, start time, heartbeat and
what the build is made of. The holder of the highest number holds the lease. Whoever finds that
holder dead creates the next number, which only one can do; so no lock is needed, and a builder that
slept through all of it finds out when it next looks. A holder is dead when it says that it has
ended, when its heartbeat has not moved for ten seconds of the observer's own clock (so that neither
skewed clocks nor a machine that slept mislead), or at once when its process on this host is gone.
"""

import json
import os
import re
import socket
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster import place
from configs.errors import LeaseLost
from stages.manifest import LEASE_PREFIX, Lease

HEARTBEAT_SECONDS = 2.0
DEAD_SECONDS = 10.0
APART_FACTOR = 5
"""So many times longer are both in a store of objects, where each look is a call to be paid."""
_LOOK_SECONDS = 0.25
_NAME = re.compile(rf"{LEASE_PREFIX}\d+\.json")


class Watch:
    """One waiter's observation of a lease: dead holders are told by our clock, not by theirs."""

    def __init__(self, generation: str) -> None:
        """Of the leases in the folder of this address."""
        self._dead_seconds = DEAD_SECONDS * pace(generation)
        self._seen: tuple[object, object] = (None, None)
        self._since = 0.0

    def is_dead(self, holder: Mapping[str, Any]) -> bool:
        if holder.get("ended") or has_ended(holder):
            return True
        beat = (holder.get("owner"), holder.get("heartbeat"))
        if beat != self._seen:
            self._seen, self._since = beat, time.monotonic()
        return time.monotonic() - self._since > self._dead_seconds


def this_process() -> dict[str, Any]:
    """What tells this process from every other, also from a later one of the same number."""
    return {
        "pid": os.getpid(),
        "host": _host(),
        "machine": _machine(),
        "started": psutil.Process().create_time(),
    }


def has_ended(process: Mapping[str, Any]) -> bool:
    """Whether a process of this host is gone; false for other hosts, where one cannot look."""
    return _is_here(process) and _process_gone(process)


def _is_here(process: Mapping[str, Any]) -> bool:
    return process.get("host") == _host() and process.get("machine", _machine()) == _machine()


def _process_gone(holder: Mapping[str, Any]) -> bool:
    try:
        process = psutil.Process(int(holder["pid"]))
        if process.status() == psutil.STATUS_ZOMBIE:
            return True
        # Start times come from the boot time and ticks; the former may be off by a second.
        return bool(abs(process.create_time() - float(holder["started"])) > 2)
    except (psutil.NoSuchProcess, KeyError):
        return True


def _host() -> str:
    """This machine and its process numbering: containers may share a name but not the numbers."""
    try:
        return f"{socket.gethostname()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return socket.gethostname()


def _machine() -> str:
    """What tells this machine from another of the same name, and stays when it is started anew."""
    try:
        return Path("/etc/machine-id").read_text().strip()
    except OSError:
        return ""


def pace(generation: str) -> int:
    """How many times longer than on a disk all waits are in the place of this address."""
    return 1 if place.is_local(generation) else APART_FACTOR


def newest(generation: str) -> tuple[int, dict[str, Any]]:
    """Number and body of the lease that counts; (0, {}) if none was ever taken.

    A body that cannot be read yet is empty of facts, and its holder dead once that lasts.
    """
    leases = [name for name in place.names(generation) if _NAME.fullmatch(name)]
    if not leases:
        return 0, {}
    number = int(max(leases).removeprefix(LEASE_PREFIX).partition(".")[0])
    return number, _read(place.join(generation, max(leases)))


def has_stopped(generation: str, number: int) -> bool:
    """Whether the builder with this lease certainly writes no more, however long it was silent."""
    holder = _read(place.join(generation, f"{LEASE_PREFIX}{number:06}.json"))
    return bool(holder.get("ended")) or has_ended(holder)


def take(generation: str, number: int, owner: str, inputs: Sequence[str] = ()) -> Lease | None:
    """The lease of this number, unless somebody has it already.

    `inputs` are the addresses that the build reads, which nobody may delete meanwhile.
    """
    lease = Lease(generation, number, owner)
    body = _body(lease, inputs=list(inputs), ended=False)
    return lease if place.create(lease.uri, body) else None


def beat(lease: Lease, stop: threading.Event, inputs: Sequence[str] = ()) -> None:
    """Move the heartbeat until told to stop, or until the lease is another's."""
    while not stop.wait(HEARTBEAT_SECONDS * pace(lease.generation)):
        try:
            lease.check(anew=True)
            renew(lease, inputs)
        except LeaseLost:
            return
        except OSError:
            # A full or vanished disk: the lease ages, and whoever takes over is the next owner.
            continue


def renew(lease: Lease, inputs: Sequence[str] = ()) -> None:
    """Move the heartbeat once."""
    place.replace(lease.uri, _body(lease, inputs=list(inputs), ended=False))


def give_up(lease: Lease) -> None:
    """Say that this build has ended, so that the next one need not wait."""
    # Another's of this number is there where the generation was deleted and begun anew.
    if _read(lease.uri).get("owner") == lease.owner:
        place.replace(lease.uri, _body(lease, inputs=[], ended=True))


def is_held(generation: str) -> bool:
    """Whether a builder that may be alive holds the lease; watches one elsewhere for a while."""
    return bool(held_among([generation], {}))


def held_among(generations: Iterable[str], dead: dict[str, object]) -> set[str]:
    """Those of which a builder that may be alive holds the lease; all are watched at a time.

    `dead` keeps the heartbeats that were found to be the last, so that no holder is watched twice.
    """
    waiting: dict[str, tuple[Watch, dict[str, Any], float]] = {}
    for generation in generations:
        number, first = newest(generation)
        if number and dead.get(generation) != _heartbeat(first):
            deadline = time.monotonic() + (DEAD_SECONDS + _LOOK_SECONDS) * pace(generation)
            waiting[generation] = Watch(generation), first, deadline
    held: set[str] = set()
    while waiting:
        for generation, (watch, first, deadline) in list(waiting.items()):
            now = newest(generation)[1]
            if watch.is_dead(now):
                dead[generation] = _heartbeat(now)
            elif _is_here(first) or now != first or time.monotonic() > deadline:
                held.add(generation)
            else:
                continue
            del waiting[generation]
        if waiting:
            time.sleep(_LOOK_SECONDS * max(map(pace, waiting)))
    return held


def _heartbeat(holder: Mapping[str, Any]) -> object:
    return holder.get("owner"), holder.get("heartbeat")


def _read(address: str) -> dict[str, Any]:
    try:
        holder = json.loads(place.read(address))
    except (OSError, ValueError):
        holder = None
    return holder if isinstance(holder, dict) else {"owner": address.rpartition("/")[2]}


def _body(lease: Lease, **facts: Any) -> bytes:
    holder = {"owner": lease.owner, **this_process(), "heartbeat": time.time(), **facts}
    return json.dumps(holder).encode()

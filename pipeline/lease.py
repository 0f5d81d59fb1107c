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
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from cluster.files import create_exclusively, replace
from configs.errors import LeaseLost
from stages.manifest import LEASE_PREFIX, Lease

HEARTBEAT_SECONDS = 2.0
DEAD_SECONDS = 10.0
_LOOK_SECONDS = 0.25


class Watch:
    """One waiter's observation of a lease: dead holders are told by our clock, not by theirs."""

    def __init__(self) -> None:
        self._seen: tuple[object, object] = (None, None)
        self._since = 0.0

    def is_dead(self, holder: Mapping[str, Any]) -> bool:
        if holder.get("ended") or has_ended(holder):
            return True
        beat = (holder.get("owner"), holder.get("heartbeat"))
        if beat != self._seen:
            self._seen, self._since = beat, time.monotonic()
        return time.monotonic() - self._since > DEAD_SECONDS


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
    is_here = process.get("host") == _host() and process.get("machine", _machine()) == _machine()
    return is_here and _process_gone(process)


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


def newest(generation: Path) -> tuple[int, dict[str, Any]]:
    """Number and body of the lease that counts; (0, {}) if none was ever taken.

    A body that cannot be read yet is empty of facts, and its holder dead once that lasts.
    """
    try:
        path = max(generation.glob(f"{LEASE_PREFIX}*.json"), default=None)
    except FileNotFoundError:
        # Deleted while it was listed.
        path = None
    if path is None:
        return 0, {}
    return int(path.stem.removeprefix(LEASE_PREFIX)), _read(path)


def has_stopped(generation: Path, number: int) -> bool:
    """Whether the builder with this lease certainly writes no more, however long it was silent."""
    holder = _read(generation / f"{LEASE_PREFIX}{number:06}.json")
    return bool(holder.get("ended")) or has_ended(holder)


def take(generation: Path, number: int, owner: str, inputs: Sequence[str] = ()) -> Lease | None:
    """The lease of this number, unless somebody has it already.

    `inputs` are the addresses that the build reads, which nobody may delete meanwhile.
    """
    lease = Lease(str(generation), number, owner)
    body = _body(lease, inputs=list(inputs), ended=False)
    return lease if create_exclusively(Path(lease.uri), body) else None


def beat(lease: Lease, stop: threading.Event, inputs: Sequence[str] = ()) -> None:
    """Move the heartbeat until told to stop, or until the lease is another's."""
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            lease.check()
            replace(Path(lease.uri), _body(lease, inputs=list(inputs), ended=False))
        except LeaseLost:
            return
        except OSError:
            # A full or vanished disk: the lease ages, and whoever takes over is the next owner.
            continue


def give_up(lease: Lease) -> None:
    """Say that this build has ended, so that the next one need not wait."""
    path = Path(lease.uri)
    # Another's of this number is there where the generation was deleted and begun anew.
    if _read(path).get("owner") == lease.owner:
        replace(path, _body(lease, inputs=[], ended=True))


def is_held(generation: Path) -> bool:
    """Whether a builder that may be alive holds the lease; watches one elsewhere for a while."""
    watch, deadline = Watch(), time.monotonic() + DEAD_SECONDS + _LOOK_SECONDS
    number, first = newest(generation)
    if not number:
        return False
    while not watch.is_dead(newest(generation)[1]):
        if first.get("host") == _host() or newest(generation)[1] != first:
            return True
        if time.monotonic() > deadline:
            return True
        time.sleep(_LOOK_SECONDS)
    return False


def _read(path: Path) -> dict[str, Any]:
    try:
        holder = json.loads(path.read_text())
    except (OSError, json.JSONDecodeError):
        return {"owner": path.name}
    return holder if isinstance(holder, dict) else {"owner": path.name}


def _body(lease: Lease, **facts: Any) -> str:
    holder = {"owner": lease.owner, **this_process(), "heartbeat": time.time(), **facts}
    return json.dumps(holder)

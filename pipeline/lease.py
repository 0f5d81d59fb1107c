"""The right to fill a slot: one file that names its holder, and how a dead holder is told.

`lease.json` in the slot holds owner, process, host, start time and heartbeat. Every change to it
happens under a file lock on the folder above, so that two takers cannot both win. A holder is dead
when its heartbeat has not moved for ten seconds of the observer's own clock (so that neither skewed
clocks nor a machine that slept mislead), or at once when its process on this host is gone.
"""

import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from configs.errors import LeaseLost, StoreError
from stages.artifacts import Lease

LEASE = "lease.json"
HEARTBEAT_SECONDS = 2.0
DEAD_SECONDS = 10.0
_GUARD_SECONDS = 30.0


class Watch:
    """One waiter's observation of a lease: dead holders are told by our clock, not by theirs."""

    def __init__(self) -> None:
        self._seen: tuple[object, object] = (None, None)
        self._since = 0.0

    def is_dead(self, holder: Mapping[str, Any]) -> bool:
        if has_ended(holder):
            return True
        beat = (holder.get("owner"), holder.get("heartbeat"))
        if beat != self._seen:
            self._seen, self._since = beat, time.monotonic()
        return time.monotonic() - self._since > DEAD_SECONDS


def this_process() -> dict[str, Any]:
    """What tells this process from every other, also from a later one of the same number."""
    return {"pid": os.getpid(), "host": _host(), "started": psutil.Process().create_time()}


def has_ended(process: Mapping[str, Any]) -> bool:
    """Whether a process of this host is gone; false for other hosts, where one cannot look."""
    return process.get("host") == _host() and _process_gone(process)


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


def beat(lease: Lease, stop: threading.Event) -> None:
    """Move the heartbeat until told to stop, or until the lease is another's."""
    while not stop.wait(HEARTBEAT_SECONDS):
        try:
            with guard(Path(lease.uri).parent.parent):
                lease.check()
                write_lease(Path(lease.uri).parent, lease.owner)
        except LeaseLost:
            return
        except OSError:
            # A full or vanished disk: the lease ages, and whoever takes it over is the next owner.
            continue


def write_lease(path: Path, owner: str) -> None:
    holder = {"owner": owner, **this_process(), "heartbeat": time.time()}
    # Drafts lie beside the slot, since every file inside it would become part of the artifact.
    draft = path.with_name(f".{path.name}.{LEASE}.draft")
    draft.write_text(json.dumps(holder))
    os.replace(draft, path / LEASE)


def read_lease(path: Path) -> dict[str, Any]:
    """The lease in a slot; empty if there is none or it is no lease."""
    try:
        holder = json.loads((path / LEASE).read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return holder if isinstance(holder, dict) else {}


@contextmanager
def guard(folder: Path) -> Iterator[None]:
    """The file lock under which leases of `folder`'s slots change; held for moments only."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "guard").open("a") as file:
        deadline = time.monotonic() + _GUARD_SECONDS
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise StoreError(
                        f"{file.name}: locked for {_GUARD_SECONDS:g} s; find its holder with "
                        "`lsof` and end it"
                    ) from None
                time.sleep(0.01)
        yield


def is_held(path: Path) -> bool:
    """Whether a builder that may be alive holds the slot at `path`."""
    holder = read_lease(path)
    if not holder:
        return False
    if holder.get("host") == _host():
        return not _process_gone(holder)
    return time.time() - float(holder.get("heartbeat", 0)) < DEAD_SECONDS

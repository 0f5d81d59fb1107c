"""The head of a named cluster: found before Ray is asked to join it, and watched while it is used.

Ray tries a wrong address for many minutes, and where the head is lost it ends the process after a
minute, in the middle of whatever that does. Here both are told in time. Loads no Ray.
"""

import atexit
import os
import re
import socket
import sys
import threading
import time
from contextlib import suppress

from configs.errors import MachineError

CONNECT_SECONDS = 10.0
LOOK_SECONDS = 3.0
LOST_SECONDS = 15.0
"""So long nobody may answer before the head counts as lost: Ray gives it 60."""
_HOST_AND_PORT = re.compile(r"(?P<host>[^/:\s]+):(?P<port>\d+)")

_watched: list[str | None] = [None]
_lost: list[str] = []
"""The address of the head that is lost, once it is."""


def require_listener(address: str) -> None:
    """MachineError at once if nobody listens at `address`; nothing of one that is no HOST:PORT."""
    found = _HOST_AND_PORT.fullmatch(address)
    if found is None:
        return
    try:
        socket.create_connection((found["host"], int(found["port"])), CONNECT_SECONDS).close()
    except OSError as error:
        raise MachineError(
            f"cluster.address = {address!r}: nobody answers there ({error.strerror or error}); see "
            "that the cluster's head runs, and that this is its address and port"
        ) from None


def watch(address: str | None) -> None:
    """Look from now on whether the head answers, until another is watched; none for no cluster."""
    _lost.clear()
    _watched[:] = [address]
    if address is None:
        return
    found = _HOST_AND_PORT.fullmatch(address)
    if found is not None:
        where = found["host"], int(found["port"])
        threading.Thread(target=_watch, args=(address, where), daemon=True, name="head").start()


def is_lost() -> bool:
    """Whether the head answers no more: whatever asks the cluster then would wait in vain."""
    return bool(_lost)


def require_head() -> None:
    """MachineError if the head is lost. Called in every wait for the cluster."""
    if _lost:
        raise MachineError(_gone(_lost[0]))


def _gone(address: str) -> str:
    return (
        f"the head of the cluster at {address} does not answer any more; start it again, and the "
        "same command goes on from the newest save"
    )


def require_reachable() -> None:
    """Return once the head answers, which is asked now; MachineError if it is lost.

    Asked before Ray is, which would wait for a minute and then end the process.
    """
    address = _watched[0]
    found = None if address is None else _HOST_AND_PORT.fullmatch(address)
    deadline = time.monotonic() + 2 * LOST_SECONDS
    while found is not None:
        require_head()
        if time.monotonic() > deadline:
            raise MachineError(_gone(found[0]))
        try:
            where = found["host"], int(found["port"])
            socket.create_connection(where, LOOK_SECONDS).close()
            return
        except OSError:
            time.sleep(min(LOOK_SECONDS, 0.5))


def _watch(address: str, where: tuple[str, int]) -> None:
    answered = time.monotonic()
    while time.monotonic() - answered < LOST_SECONDS:
        time.sleep(LOOK_SECONDS)
        if _watched != [address]:
            return
        try:
            socket.create_connection(where, LOOK_SECONDS).close()
        except OSError:
            continue
        answered = time.monotonic()
    # Before Ray's own, which would wait for the head until that ends the process in its way.
    atexit.register(_leave)
    _lost.append(address)


def _leave() -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(MachineError.exit_code)

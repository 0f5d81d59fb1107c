"""Sends what an interrupted build would continue from to the store, while the build goes on.

A save is a folder whose `complete.json` is written last, and it is sent in that order: so whoever
finds the mark finds the rest. The step log goes with each save, which is of no use without it.
"""

import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from cluster import place
from cluster.files import COMPLETE
from cluster.mirror import Mirror
from configs.errors import StoreError
from stages.manifest import LOGS, MANIFEST
from stages.steps import METRICS

SEND_SECONDS = 5.0
RESUME = "resume"
_STEP = "/step-"
"""How names of saves begin, in any folder; other state of a build has no order."""

_Stamp = tuple[int, int]


class Carrier:
    """Sends the saves of one builder's folder; nothing where the store is a local folder."""

    def __init__(self, mirror: Mirror, builder: Path, say: Callable[[str], None]) -> None:
        """Begin; `say` is told once if the store does not take what is sent."""
        self._mirror, self._builder, self._say = mirror, builder, say
        self._sent: dict[str, _Stamp] = {}
        self._oldest = ""
        self._told = False
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, daemon=True, name="carrier")
        if mirror.is_apart:
            self._thread.start()

    def stop(self) -> None:
        """Send what is new since, and what workers printed, and end.

        Nothing once there is a manifest: the commit has sent all that counts, or this build has
        lost.
        """
        self._stop.set()
        if not self._mirror.is_apart:
            return
        self._thread.join()
        with suppress(StoreError):
            if place.exists(self._mirror.address(self._builder.parent / MANIFEST)):
                return
        self._attempt()
        self._send_logs()

    def _work(self) -> None:
        while not self._stop.wait(SEND_SECONDS):
            self._attempt()

    def _attempt(self) -> None:
        try:
            self.carry()
            self._told = False
        except (StoreError, OSError) as error:
            if not self._told:
                self._told = True
                self._say(
                    f"warning: what this build could be continued from elsewhere is not sent "
                    f"({error}); here it can be"
                )

    def _send_logs(self) -> None:
        """What workers printed, for whoever looks from another machine."""
        with suppress(StoreError, OSError):
            for path in sorted((self._builder / LOGS).glob("*")):
                self._mirror.push(path)

    def carry(self) -> None:
        """One look: send what is new, the marks of whole saves last; delete saves that are too old.

        Those are older than all whole ones here, and one of these has been sent. Of a newer save
        nothing is deleted: a group of workers may be writing it, on other machines.
        """
        found = self._found()
        whole = {_folder(name) for name in self._sent if _is_mark(name)}
        # What comes into a save that was sent whole was fetched: shards of other machines.
        new = [
            name
            for name, stamp in found.items()
            if self._sent.get(name) != stamp and _folder(name) not in whole
        ]
        # The newest save first: what takes long to send is old by then, and may be deleted here.
        for folder in sorted({_folder(name) for name in new}, reverse=True):
            names = [name for name in new if _folder(name) == folder]
            for name in sorted(names, key=_is_mark):
                if _is_mark(name) and (self._builder / METRICS).is_file():
                    self._mirror.push(self._builder / METRICS)
                self._push(name, found)
        marks = [name for name in found if _is_mark(name) and _STEP in name]
        if any(mark in self._sent for mark in marks):
            self._delete_before(_folder(min(marks)))

    def _delete_before(self, oldest: str) -> None:
        """Delete the saves before `oldest` in the store, whoever sent their shards."""
        if oldest == self._oldest:
            return
        root, _, kept = oldest.rpartition("/")
        address = self._mirror.address(self._builder / root)
        for name in place.names(address):
            if _STEP in f"/{name}" and name < kept:
                place.delete(place.join(address, name))
        self._sent = {name: one for name, one in self._sent.items() if name >= oldest}
        self._oldest = oldest

    def _push(self, name: str, found: dict[str, _Stamp]) -> None:
        try:
            self._mirror.push(self._builder / name)
        except FileNotFoundError:
            # An older save, deleted since the look.
            return
        self._sent[name] = found[name]

    def _found(self) -> dict[str, _Stamp]:
        found = {}
        for path in sorted((self._builder / RESUME).rglob("*")):
            if path.suffix != ".draft" and path.is_file():
                status = path.stat()
                name = path.relative_to(self._builder).as_posix()
                found[name] = (status.st_size, status.st_mtime_ns)
        return found


def _is_mark(name: str) -> bool:
    """Of a save; their folders sort by step."""
    return name.endswith(f"/{COMPLETE}")


def _folder(name: str) -> str:
    """Of a save, by the name of one of its files."""
    return name.rpartition("/")[0]

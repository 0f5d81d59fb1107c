"""The files of one build, for its workers on whatever machine they are placed.

On the driver's machine, and where a disk is mounted everywhere, workers find all files under the
driver's paths. Elsewhere they fetch what they read from the store of objects, into folders of the
same paths, and send what they write there: so nothing but the store is shared. Loads neither torch
nor ray.
"""

import fcntl
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from cluster import place
from cluster.mirror import Mirror
from configs.errors import MachineError, NoAnswer, StoreError

_LOCK = ".fetching"
_LOOK_SECONDS, _AGAIN_SECONDS = 0.2, 5.0
FETCH_SECONDS = 3600.0
"""How long a worker waits for another of its machine that fetches the same."""
SILENT_SECONDS = 300.0
"""How long a worker waits for a store that does not answer, before its build ends."""


@dataclass(frozen=True)
class Supply:
    """Where the files of a build come from and go to. Travels to workers by value."""

    mirror: Mirror
    sign: Path
    """A file in the builder's folder that only the driver's disk has."""
    is_spread: bool
    """Whether workers may be on other machines than the driver."""
    inputs: Mapping[Path, Mapping[str, str]] = field(default_factory=dict)
    """The files of each artifact that the build takes: by folder, the SHA-256 of each by name."""
    cache_bytes: int = 0
    """Up to this size copies that nobody has used for a day stay on a worker's machine."""

    @property
    def builder(self) -> Path:
        """The builder's folder, which has the same path on every machine."""
        return self.sign.parent

    @property
    def is_apart(self) -> bool:
        """Whether workers may be on machines that share the store of objects alone."""
        return self.is_spread and self.mirror.is_apart

    @property
    def is_far(self) -> bool:
        """Whether this process is on another machine, and does not see the driver's files."""
        return self.is_spread and not self.sign.exists()

    def arrive(self) -> None:
        """Have a builder's folder on this machine. MachineError if there can be none."""
        if not self.is_far:
            return
        if not self.is_apart:
            raise MachineError(
                f"{socket.gethostname()} does not see {self.builder}, as all machines of a "
                "cluster must where store.url is a folder; mount that folder there, or name a "
                "place of objects (s3://BUCKET/FOLDER) in store.url"
            )
        try:
            self.builder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(
                f"{socket.gethostname()} cannot make {self.builder}, where it is to work as "
                f"the driver does ({error.strerror}); set XDG_CACHE_HOME for the driver to a "
                "folder that every machine can write"
            ) from None
        # Counted among the copies, so that what this build leaves here is deleted some day.
        self.mirror.mark(self.builder)
        keep = [self.builder.parent, *(files.parents[1] for files in self.inputs)]
        self.mirror.trim(self.cache_bytes, keep)

    def bring(self, *folders: Path) -> None:
        """Have what lies below these folders of artifacts on this machine, as it was committed."""
        if not self.is_far:
            return
        for folder in folders:
            for files, hashes in self.inputs.items():
                if folder.is_relative_to(files):
                    below = folder.relative_to(files)
                    wanted = {n: h for n, h in hashes.items() if Path(n).is_relative_to(below)}
                    with _alone(files):
                        self._patiently(partial(self.mirror.bring, files, wanted))

    def fetch(self, folder: Path) -> None:
        """Have all that the store holds of one save on this machine."""
        if self.is_apart:
            self._patiently(partial(self.mirror.pull_folder, folder))

    def send(self, path: Path) -> None:
        """Have a file in the store that was written here, unless the driver's machine sends it."""
        if self.is_far:
            self._patiently(partial(self.mirror.push, path))
            # Still in use, however long the build takes.
            self.mirror.mark(self.builder)

    def publish(self, folder: Path, *, last: str) -> None:
        """Have all of a save in the store that is here and is not there yet, its mark last."""
        if self.is_apart:
            self._patiently(partial(self.mirror.push_folder, folder, last=last))

    def names(self, folder: Path) -> list[str]:
        """What lies right below a folder of saves, here or in the store."""
        found = set(place.names(str(folder)))
        if self.is_apart:
            self._patiently(lambda: found.update(place.names(self.mirror.address(folder))))
        return sorted(found)

    def drop(self, folder: Path) -> None:
        """Delete a save, here and in the store."""
        shutil.rmtree(folder, ignore_errors=True)
        if self.is_apart:
            self._patiently(partial(place.delete, self.mirror.address(folder)))

    def forget_after(self, root: Path, step: int) -> None:
        """Delete shards of later steps that a group now abandoned has left on another machine: one
        of the same size would be taken for that which the store has by then."""
        if self.is_far:
            for path in root.glob("step-*"):
                if int(path.name.partition("-")[2]) > step:
                    shutil.rmtree(path, ignore_errors=True)

    def _patiently(self, call: Callable[[], object]) -> None:
        """Call until the store answers, and say on which machine it could not be used."""
        deadline = time.monotonic() + SILENT_SECONDS
        while True:
            with _named(self.mirror):
                try:
                    call()
                    return
                except NoAnswer:
                    if time.monotonic() > deadline:
                        raise
            time.sleep(_AGAIN_SECONDS)


@contextmanager
def _named(mirror: Mirror) -> Iterator[None]:
    """Say on which machine the store could not be used."""
    try:
        yield
    except StoreError as error:
        # Of the kind that it is: whether it may be mended by waiting is known by that.
        raise type(error)(f"on {socket.gethostname()}: {error}") from error
    except OSError as error:
        raise MachineError(
            f"{socket.gethostname()} cannot keep a copy of {mirror.url} in {mirror.root} "
            f"({error.strerror or error}); free some of its disk, or set XDG_CACHE_HOME for the "
            "driver to a folder that every machine can write"
        ) from error


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one process of this machine at a time fetch into a folder, so that it is done once."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + FETCH_SECONDS
    with (folder.parent / _LOCK).open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except OSError as error:
                if not isinstance(error, BlockingIOError):
                    break  # A disk without locks: each fetches by itself.
                if time.monotonic() > deadline:
                    raise MachineError(
                        f"{socket.gethostname()}: another worker has been fetching {folder} for "
                        f"{FETCH_SECONDS:g} s; see what it printed, and run again"
                    ) from None
            time.sleep(_LOOK_SECONDS)
        yield

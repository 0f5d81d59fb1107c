"""What of the user's machine would stop a run, or change it without a word: found before it starts.

All looks are quick, and load nothing that computes. `ingot doctor` shows each, `ingot run` ends at
the first that it needs, before anything is built.
"""

import errno
import fcntl
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.surroundings import folder_fault, ignored_address, tmpdir_for_ray, token_fault
from configs.errors import MachineError
from configs.parallel import ClusterConfig
from pipeline.places import SQLITE, sqlite_uri


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at."""

    what: str
    seen: str
    fix: str | None = None
    """What to do if it is lacking; none if all is well."""
    needed: bool = False
    """Whether the line cannot run without it."""


def require_machine(
    machines: ClusterConfig, database: Path | None, say: Callable[[str], None]
) -> None:
    """MachineError for the first thing that a run needs and this machine lacks.

    `say` is told of what a run can do without.
    """
    for one in surroundings(machines, database, os.environ):
        if one.fix is not None and one.needed:
            raise MachineError(f"{one.what}: {one.seen}; {one.fix}")
        if one.fix is not None:
            say(f"{one.what}: {one.seen}; {one.fix}")


def surroundings(
    machines: ClusterConfig, database: Path | None, environ: Mapping[str, str]
) -> Iterator[Finding]:
    """Look at what Ray takes from the environment, and where MLflow's SQLite file is to lie, which
    is None for another kind of tracking."""
    yield _address(machines, environ)
    yield _ray_folder(machines, environ)
    seen, fix = token_fault(machines, environ) or ("none is lacking", None)
    yield Finding("Ray's token", seen, fix, needed=True)
    yield _home(environ)
    if database is not None:
        yield _locks(database.parent)
        yield _spelling(database)


def _address(machines: ClusterConfig, environ: Mapping[str, str]) -> Finding:
    what = "RAY_ADDRESS"
    if (address := ignored_address(machines, environ)) is None:
        return Finding(what, "not set" if machines.address is None else "cluster.address counts")
    join = f"cluster.address = {address!r} joins that cluster"
    return Finding(what, f"{address} is ignored: a run starts a Ray of its own", join)


def _ray_folder(machines: ClusterConfig, environ: Mapping[str, str]) -> Finding:
    what = "Ray's folder"
    if fault := folder_fault(machines, environ):
        return Finding(what, *fault, needed=True)
    folder = environ.get("RAY_TMPDIR")
    if machines.address is None and (short := tmpdir_for_ray(environ)):
        seen = f"{folder or short}, for TMPDIR is too long for paths of sockets"
        return Finding(what, seen, None if folder else "RAY_TMPDIR names another short folder")
    return Finding(what, folder or environ.get("TMPDIR") or "/tmp")


def _home(environ: Mapping[str, str]) -> Finding:
    home = environ.get("HOME")
    if home and os.access(home, os.W_OK | os.X_OK):
        return Finding("HOME", home)
    seen = f"{home} cannot be written" if home else "not set"
    return Finding("HOME", f"{seen}; nothing of a run needs it")


def _locks(place: Path) -> Finding:
    """Whether files in a folder, or where it is to be made, can be locked."""
    what = "file locks"
    folder = next(one for one in (place, *place.parents) if one.is_dir())
    probe = folder / f".probe-{uuid.uuid4().hex}"
    try:
        with probe.open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _NO_LOCKS:
            return Finding(
                what,
                f"{folder} is on a file system without them ({error.strerror}), so that MLflow "
                "cannot keep its SQLite file there and does not record runs",
                "set tracking.uri to a server, or to sqlite:/// and a path on a local disk",
            )
        return Finding(what, f"cannot look: {folder} cannot be written ({error.strerror})")
    finally:
        probe.unlink(missing_ok=True)
    return Finding(what, f"there are in {folder}")


def _spelling(database: Path) -> Finding:
    """Whether the address of MLflow's file is spelt as its path is."""
    what, spelt = "store's path", sqlite_uri(database).removeprefix(SQLITE)
    if spelt == str(database):
        return Finding(what, "has only signs that addresses take as they are")
    stray = Path(spelt).parent
    seen = f"{database.parent} has a % or ?, for which MLflow makes an empty folder {stray}"
    return Finding(what, seen, "a folder without them in store.url spares you that")


_NO_LOCKS = frozenset({errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS})

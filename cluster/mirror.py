"""A store as this machine works with it: a folder of local files, and where they count.

A store that is a local folder is its own mirror, and nothing here copies anything. Of a store of
objects the mirror holds what was read or made here: stages work in local files, and what they made
is sent when it is whole. What is read is fetched once, and checked against the hashes of its
manifest, so that old or other bytes are never taken for it.
"""

import hashlib
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cluster import place
from configs.errors import StoreError

CACHE_VARIABLE = "XDG_CACHE_HOME"
_FOLDER = "ingot/stores"
_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL")
"""Buckets of one name on two servers are two stores."""
IDLE_SECONDS = 24 * 3600.0
_USED = ".used"
"""Touched in a copy whenever it is read, so that those unused for longest are known."""


@dataclass(frozen=True)
class Mirror:
    """Addresses of one store, and the same places in a folder of this machine."""

    url: str
    """A path, or a URL without a slash at its end."""
    root: Path

    @property
    def is_apart(self) -> bool:
        """Whether what counts lies elsewhere than the local files."""
        return not place.is_local(self.url)

    def address(self, path: Path) -> str:
        """Where the local path `path` lies in the store itself."""
        if not self.is_apart:
            return str(path)
        return place.join(self.url, *path.relative_to(self.root).parts)

    def push(self, path: Path) -> None:
        """Send a local file to its place in the store."""
        if self.is_apart:
            place.send(path, self.address(path))

    def pull(self, path: Path) -> None:
        """Fetch a file as it is in the store now. FileNotFoundError if it is not there."""
        if self.is_apart:
            place.fetch(self.address(path), path)

    def pull_folder(self, folder: Path, names: Iterable[str] | None = None) -> None:
        """Fetch these files below a folder, or all, unless files of the same size are here."""
        sizes = place.sizes(self.address(folder)) if self.is_apart else {}
        for name in sizes if names is None else names:
            path = folder / name
            if name in sizes and not (path.is_file() and path.stat().st_size == sizes[name]):
                # One that was deleted since the look is not asked for any more.
                with suppress(FileNotFoundError):
                    self.pull(path)

    def push_folder(self, folder: Path, *, last: str) -> None:
        """Send the files below a folder of which the store has none of that size, `last` last."""
        if not self.is_apart:
            return
        sizes = place.sizes(self.address(folder))
        found = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".draft"]
        for path in sorted(found, key=lambda path: (path.name == last, path)):
            name = path.relative_to(folder).as_posix()
            if sizes.get(name) != path.stat().st_size:
                self.push(path)

    def bring(self, folder: Path, hashes: Mapping[str, str]) -> None:
        """Have files below `folder` here, each with the SHA-256 that is given by its name.

        StoreError naming the file if the store returns other bytes, twice.
        """
        if not self.is_apart:
            return
        # Before and after: nobody is to delete meanwhile what is only looked at.
        self.mark(folder.parent)
        for name, wanted in hashes.items():
            path = folder / name
            for _ in range(2):
                if path.is_file() and sha256(path) == wanted:
                    break
                self.pull(path)
            else:
                if sha256(path) != wanted:
                    path.unlink(missing_ok=True)
                    raise StoreError(
                        f"{self.address(path)}: the store returned bytes that are not those of its "
                        f"manifest (sha256 {wanted[:12]}), twice; run again, and if that does not "
                        "help rebuild the node with --force"
                    )
        self.mark(folder.parent)

    def mark(self, builder: Path) -> None:
        """Remember that a builder's folder, which lies in the store too, was used now."""
        if self.is_apart and builder.is_dir():
            (builder / _USED).touch()

    def trim(
        self, most_bytes: int, keep: Iterable[Path], *, idle_seconds: float = IDLE_SECONDS
    ) -> list[Path]:
        """Delete local copies, those unused for longest first, until the rest fits; which ones.

        `keep` are generations that stay whatever their size, and so do those that another process
        may be reading, as they were asked for less than `idle_seconds` ago. What is being built
        here is no copy.
        """
        if not self.is_apart:
            return []
        kept = {path.resolve() for path in keep}
        used = {one.parent: _modified(one) for one in self.root.glob(f"artifacts/*/*/g*/*/{_USED}")}
        copies = sorted(used, key=lambda path: used[path])
        held = {path: sum(_sizes(path)) for path in copies}
        gone = []
        for path in copies:
            if sum(held.values()) <= most_bytes:
                break
            is_idle = time.time() - _modified(path / _USED) >= idle_seconds
            if is_idle and path.parent.resolve() not in kept:
                shutil.rmtree(path, ignore_errors=True)
                del held[path]
                gone.append(path)
        return gone


def mirror_of(url: str) -> Mirror:
    """The mirror of a store: the folder itself, or one in this user's cache for a URL."""
    if place.is_local(url):
        path = place.local_path(url)
        return Mirror(str(path), path)
    url = url.rstrip("/")
    cache = Path(os.environ.get(CACHE_VARIABLE) or "~/.cache").expanduser().absolute()
    served = [os.environ.get(name, "") for name in _ENDPOINTS]
    name = hashlib.sha256("\n".join([url, *filter(None, served)]).encode()).hexdigest()[:16]
    return Mirror(url, cache / _FOLDER / name)


def sha256(path: Path) -> str:
    """Of a local file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sizes(folder: Path) -> list[int]:
    """Of the files below a folder; others may rename and delete them meanwhile."""
    found = []
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(OSError):
                found.append(os.stat(os.path.join(parent, name)).st_size)
    return found


def _modified(path: Path) -> float:
    """When a file was touched; now if another process has just deleted it."""
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()

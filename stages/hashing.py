"""SHA-256 of files that stages read from outside the store, once for each version of a file.

What identifies a file is its name, size and SHA-256. When it was last changed, and which inode or
ETag it has, say only whether a hash that was computed before still holds; they are kept beside it,
in the store, and never enter identity.
"""

import contextlib
import errno
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from fsspec import AbstractFileSystem
from fsspec.implementations.local import LocalFileSystem

from stages.manifest import FileEntry, filesystem

_CHUNK_BYTES = 1 << 20
_SETTLED_SECONDS = 2.5
"""A file that changed less than this ago may change again within the same tick of its clock, which
is 2 seconds long on the coarsest file systems."""

FileSystem = AbstractFileSystem
"""Where files lie: local, or whatever fsspec reaches."""
Stamp = Mapping[str, Any]
"""What changes with a file's content, in all likelihood: JSON values."""


class Hashes:
    """Sizes and hashes of files, by address; known ones are remembered in a folder."""

    def __init__(self, folder: Path | None = None, *, store: Path | None = None) -> None:
        """Remember in `folder`, which need not exist yet; without one, in this process alone."""
        self.store = store
        """What Ingot itself writes lies in here: nothing that a user's pattern should take."""
        self._folder = folder
        self._known: dict[str, tuple[Stamp, FileEntry]] = {}

    def of(self, path: str, fs: AbstractFileSystem | None = None) -> FileEntry:
        """Size and hash of the file at `path` of `fs`, or at the local path or URL `path`.

        The file is read in parts, and only if it may have changed since. OSError if it cannot be.
        """
        if fs is None:
            fs, path = filesystem(path)
        key = fs.unstrip_protocol(path)
        if is_local(fs) and os.path.exists(path) and not os.path.isfile(path):
            # Who opens a pipe waits for someone to write to it.
            raise OSError(errno.EINVAL, "not a regular file", path)
        stamp = _stamp(fs, path)
        found = self._known.get(key) or self._load(key)
        if stamp is not None and found is not None and found[0] == stamp:
            self._known[key] = found
            return found[1]
        # Asked before it is read: a change while that lasts must show in the stamp.
        settled = stamp if stamp is not None and _is_settled(stamp) else None
        entry = hash_stream(fs, path)
        if settled is not None and settled == _stamp(fs, path):
            self._known[key] = settled, entry
            self._save(key, settled, entry)
        return entry

    def _load(self, key: str) -> tuple[Stamp, FileEntry] | None:
        if self._folder is None:
            return None
        try:
            record = json.loads(self._file(self._folder, key).read_text())
            return record["stamp"], FileEntry.model_validate(record["entry"])
        except (OSError, ValueError, KeyError, TypeError):
            # Nothing is lost: the file is hashed again.
            return None

    def _save(self, key: str, stamp: Stamp, entry: FileEntry) -> None:
        if self._folder is None:
            return
        record = {"file": key, "stamp": stamp, "entry": entry.model_dump()}
        # A store that cannot be written, or is full, still plans; it only forgets.
        with contextlib.suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            draft = self._folder / f".{uuid.uuid4().hex}.draft"
            draft.write_text(json.dumps(record))
            os.replace(draft, self._file(self._folder, key))

    @staticmethod
    def _file(folder: Path, key: str) -> Path:
        return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"


def is_local(fs: AbstractFileSystem) -> bool:
    """Whether its paths are those of the system, in which no sign but a slash has a meaning."""
    return isinstance(fs, LocalFileSystem)


def hash_stream(fs: AbstractFileSystem, path: str) -> FileEntry:
    """Size and hash of a file as it is now, read in parts."""
    digest, num_bytes = hashlib.sha256(), 0
    with fs.open(path, "rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return FileEntry(bytes=num_bytes, sha256=digest.hexdigest())


class HashedReader:
    """A file that is hashed as it is read from front to end."""

    def __init__(self, file: IO[bytes]) -> None:
        """Read `file`, which is at its beginning."""
        self._file = file
        self._digest = hashlib.sha256()
        self._bytes = 0

    def read(self, num_bytes: int, /) -> bytes:
        """The next bytes of the file: at most so many, none at its end."""
        return self._take(self._file.read(num_bytes))

    def chunks(self) -> Iterator[bytes]:
        """The bytes of the file, in parts."""
        while chunk := self.read(_CHUNK_BYTES):
            yield chunk

    def lines(self) -> Iterator[bytes]:
        """The lines of the file, each with its end."""
        for line in self._file:
            yield self._take(line)

    @property
    def entry(self) -> FileEntry:
        """Size and hash of what was read so far."""
        return FileEntry(bytes=self._bytes, sha256=self._digest.hexdigest())

    def _take(self, data: bytes) -> bytes:
        self._digest.update(data)
        self._bytes += len(data)
        return data


def _stamp(fs: AbstractFileSystem, path: str) -> Stamp | None:
    """What tells this version of a file from others; none where nothing does."""
    if is_local(fs):
        found = os.stat(path)
        return {
            "bytes": found.st_size,
            "inode": found.st_ino,
            "device": found.st_dev,
            "modified_ns": found.st_mtime_ns,
            # A copy may bring an old time of change along; this one cannot be set.
            "changed_ns": found.st_ctime_ns,
        }
    info = fs.info(path)
    tag = info.get("ETag") or info.get("etag")
    return None if tag is None else {"bytes": int(info["size"]), "etag": str(tag)}


def _is_settled(stamp: Stamp) -> bool:
    """Whether a later change must change the stamp too."""
    if "etag" in stamp:
        return True
    latest_ns = max(stamp["modified_ns"], stamp["changed_ns"])
    return bool(time.time_ns() - latest_ns > _SETTLED_SECONDS * 1e9)

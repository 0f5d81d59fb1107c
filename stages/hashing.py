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
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from cluster import place
from cluster.place import Stamp
from stages.manifest import FileEntry

_CHUNK_BYTES = 1 << 20
_SETTLED_SECONDS = 2.5
"""A file that changed less than this ago may change again within the same tick of its clock, which
is 2 seconds long on the coarsest file systems."""


class Hashes:
    """Sizes and hashes of files, by address; known ones are remembered in a folder."""

    def __init__(self, folder: Path | None = None, *, store: Path | None = None) -> None:
        """Remember in `folder`, which need not exist yet; without one, in this process alone."""
        self.store = store
        """What Ingot itself writes lies in here: nothing that a user's pattern should take."""
        self._folder = folder
        self._known: dict[str, tuple[Stamp, FileEntry]] = {}

    def of(self, address: str) -> FileEntry:
        """Size and hash of the file at a path or URL.

        The file is read in parts, and only if it may have changed since. OSError if it cannot be.
        """
        key = place.key(address)
        if place.is_local(address):
            path = place.local_path(address)
            if path.exists() and not path.is_file():
                # Who opens a pipe waits for someone to write to it.
                raise OSError(errno.EINVAL, "not a regular file", str(path))
        stamp = place.stamp(address)
        found = self._known.get(key) or self._load(key)
        if stamp is not None and found is not None and found[0] == stamp:
            self._known[key] = found
            return found[1]
        # Asked before it is read: a change while that lasts must show in the stamp.
        settled = stamp if stamp is not None and _is_settled(stamp) else None
        entry = hash_whole(address)
        if settled is not None and settled == place.stamp(address):
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


def hash_whole(address: str) -> FileEntry:
    """Size and hash of a file as it is now, read in parts."""
    with place.opened(address) as file:
        reader = HashedReader(file)
        for _ in reader.chunks():
            pass
    return reader.entry


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

    @property
    def entry(self) -> FileEntry:
        """Size and hash of what was read so far."""
        return FileEntry(bytes=self._bytes, sha256=self._digest.hexdigest())

    def _take(self, data: bytes) -> bytes:
        self._digest.update(data)
        self._bytes += len(data)
        return data


def _is_settled(stamp: Stamp) -> bool:
    """Whether a later change must change the stamp too."""
    if "etag" in stamp:
        return True
    latest_ns = max(stamp["modified_ns"], stamp["changed_ns"])
    return bool(time.time_ns() - latest_ns > _SETTLED_SECONDS * 1e9)

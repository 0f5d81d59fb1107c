"""The bytes of a file, unpacked in parts, up to where it is damaged."""

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import IO, cast

import pyarrow as pa

from configs.errors import StoreError
from stages.data.formats import MAX_HELD_BYTES, MAX_RATIO, START_BYTES, packing_of
from stages.hashing import HashedReader

_CHUNK_BYTES = 1 << 18


class Content:
    """The bytes of one file, unpacked, in parts. It ends where the file is damaged."""

    def __init__(self, reader: HashedReader, start: bytes, size_bytes: int) -> None:
        """Read `reader`, at whose beginning stands `start`, of a file of this size."""
        self.packing = packing_of(start)
        self.size_bytes = size_bytes
        """Of the file on disk."""
        self.damage = ""
        """What is wrong where the content ended, and the remedy; empty if it ended well."""
        self.lost_bytes = 0
        """Of the file on disk, behind the damage."""
        self._reader = reader
        self._unpacked_bytes = 0
        self._parts = reader.chunks() if self.packing is None else self._unpacked(self.packing)
        self._first: list[bytes] = []
        self.start = start if self.packing is None else self._look()
        """The first bytes of the content."""

    def chunks(self) -> Iterator[bytes]:
        """All bytes, in parts; to be read once."""
        yield from self._first
        yield from self._parts

    def on_disk(self, num_bytes: int) -> int:
        """About how many bytes of the file these of its content are."""
        if self.packing is None:
            return num_bytes
        read = self._reader.entry.bytes
        return max(1, num_bytes * read // max(self._unpacked_bytes, 1))

    def _look(self) -> bytes:
        while sum(map(len, self._first)) < START_BYTES and (part := next(self._parts, b"")):
            self._first.append(part)
        return b"".join(self._first)[:START_BYTES]

    def _unpacked(self, packing: str) -> Iterator[bytes]:
        source = _Watched(self._reader)
        unpack = _UNPACKERS[packing](source)
        most_bytes = max(MAX_HELD_BYTES, MAX_RATIO * self.size_bytes)
        while True:
            before = self._reader.entry.bytes
            try:
                chunk = unpack(_CHUNK_BYTES)
            except _DAMAGE as error:
                # What the place of the file says is not what the packing says.
                if source.error is not None:
                    raise source.error from error
                said = " ".join(str(error).split())
                self._stop(f"is damaged where {packing} packed it: {said}; fetch it again", before)
                return
            self._unpacked_bytes += len(chunk)
            if self._unpacked_bytes > most_bytes:
                said = f"unpacks to more than {MAX_RATIO} times its {self.size_bytes:,} bytes"
                self._stop(f"{said}; unpack it yourself, or leave it out of the glob", before)
                return
            if not chunk:
                return
            yield chunk

    def _stop(self, damage: str, read_bytes: int) -> None:
        self.damage = damage
        # Where the packing ends wrong, nobody knows how much of what came before is right.
        self.lost_bytes = self.size_bytes - read_bytes or self.size_bytes


_DAMAGE = (OSError, EOFError, ValueError, zlib.error)
"""What gzip and zstd raise of bytes that they cannot unpack; all else is no fault of the file."""


class _Watched:
    """A file for a program that may hide what reading it raised."""

    closed = False

    def __init__(self, reader: HashedReader) -> None:
        self.error: Exception | None = None
        self._reader = reader

    def read(self, num_bytes: int) -> bytes:
        try:
            return self._reader.read(num_bytes)
        except (OSError, StoreError) as error:
            self.error = error
            raise

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        """Who opened the file closes it."""


def _gzip_reader(source: _Watched) -> Callable[[int], bytes]:
    # Part by part: a longer read would lose what was unpacked before the damage.
    return gzip.GzipFile(fileobj=cast(IO[bytes], source), mode="rb").read1


def _zstd_reader(source: _Watched) -> Callable[[int], bytes]:
    stream = pa.CompressedInputStream(pa.PythonFile(source, mode="r"), "zstd")
    return cast(Callable[[int], bytes], stream.read)


_UNPACKERS: dict[str, Callable[[_Watched], Callable[[int], bytes]]] = {
    "gzip": _gzip_reader,
    "zstd": _zstd_reader,
}

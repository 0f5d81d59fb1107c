"""What is said of a source of files that cannot be used as it is: field, file and remedy."""

import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from gzip import BadGzipFile
from typing import Any

from configs.data import FilesSource
from configs.errors import DataError


def fault(name: str, source: FilesSource, what: str, remedy: str) -> DataError:
    """The error that `what` is wrong with the source `name`."""
    return DataError(f"data.sources.{name}.glob = {source.glob!r}: {what}; {remedy}")


@contextmanager
def reading(name: str, source: FilesSource, path: str) -> Iterator[None]:
    """Say which file the system refuses or is damaged, and what to do."""
    try:
        yield
    except DataError:
        raise
    except (EOFError, zlib.error, BadGzipFile) as error:
        raise fault(
            name, source, f"{path} is damaged where gzip packed it: {error}", "fetch it again"
        ) from error
    except OSError as error:
        raise fault(
            name, source, f"{path} cannot be read: {error}", "allow it, or narrow the glob"
        ) from error


def not_utf8(
    name: str, source: FilesSource, label: str, error: UnicodeDecodeError, offset: int
) -> DataError:
    """What a file holds that is no UTF-8; `offset` is that of the bytes that were decoded."""
    return fault(
        name,
        source,
        f"{label} has byte 0x{error.object[error.start]:02x} at offset {offset + error.start}, "
        "which is not UTF-8",
        "convert the file to UTF-8, or leave it out of the glob",
    )


def require_unchanged(
    name: str, source: FilesSource, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """DataError if a file differs from what it was: no hash would say what was read."""
    for label in sorted(before.keys() | after.keys()):
        if before.get(label) != after.get(label):
            raise fault(
                name,
                source,
                f"{label} changed while the source was read: {_describe(before.get(label))} "
                f"before, {_describe(after.get(label))} after",
                "run again when nothing writes to it",
            )


def _describe(facts: Mapping[str, Any] | None) -> str:
    return f"{facts['bytes']:,} bytes of sha256 {facts['sha256'][:12]}" if facts else "no file"

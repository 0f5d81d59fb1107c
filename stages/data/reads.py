"""What the data stage reads from outside the line, by content: the user's files, and Python."""

import platform
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from configs.data import DataSpec, FilesSource, Source, StdlibSource, TokenizerConfig
from configs.errors import DataError
from stages.hashing import FileSystem, Hashes
from stages.manifest import filesystem
from stages.names import TOKENIZER

_WILDCARD = re.compile(r"[*?\[]")


def reads(config: DataSpec, hashes: Hashes) -> Mapping[str, Any]:
    """What the corpus depends on besides its config: files by content, the Python version."""
    found = {name: identify(name, source, hashes) for name, source in config.data.sources.items()}
    known = {name: facts for name, facts in sorted(found.items()) if facts}
    return known | identify_tokenizer(config.data.tokenizer, hashes)


def identify(name: str, source: Source, hashes: Hashes) -> dict[str, Any]:
    """What makes two readings of this source equal, as JSON; empty where the config says it all.

    Files enter by relative name, bytes and sha256, the standard library by the Python version.
    """
    match source:
        case FilesSource():
            found = {}
            for fs, path, label in matches(name, source):
                with reading(name, source, path):
                    found[label] = hashes.of(path, fs).model_dump()
            return found
        case StdlibSource():
            return {"python": platform.python_version()}
        case _:
            return {}


def identify_tokenizer(config: TokenizerConfig, hashes: Hashes) -> dict[str, Any]:
    """The file to be taken, by content; nothing if the tokenizer is to be trained."""
    if config.file is None:
        return {}
    try:
        entry = hashes.of(config.file)
    except OSError as error:
        raise DataError(
            f"data.tokenizer.file = {config.file!r}: cannot be read ({error.strerror}); name "
            "another"
        ) from None
    # No source can bear this name: theirs have no dots.
    return {TOKENIZER: entry.model_dump()}


def matches(name: str, source: FilesSource) -> list[tuple[FileSystem, str, str]]:
    """(file system, path, name relative to the glob's fixed part) of each match, sorted."""
    try:
        fs, pattern = filesystem(source.glob)
        paths = sorted(fs.glob(pattern))
        folders = [path for path in paths if fs.isdir(path)]
    except (OSError, ValueError, ImportError) as error:
        raise fault(name, source, f"cannot be read: {error}", "correct the address") from error
    if not paths:
        raise fault(name, source, "matches no file", "correct the path or the pattern")
    if folders:
        raise fault(
            name, source, f"matches a folder, {folders[0]}", "say which files in it, as *.txt"
        )
    base = _WILDCARD.split(str(pattern), maxsplit=1)[0].rpartition("/")[0]
    return [(fs, path, path.removeprefix(base).lstrip("/")) for path in paths]


@contextmanager
def reading(name: str, source: FilesSource, path: str) -> Iterator[None]:
    """Say which file the system refuses, and what to do."""
    try:
        yield
    except DataError:
        raise
    except OSError as error:
        raise fault(
            name, source, f"{path} cannot be read: {error}", "allow it, or narrow the glob"
        ) from error


def fault(name: str, source: FilesSource, what: str, remedy: str) -> DataError:
    """The error that a source of files cannot be used as it is."""
    return DataError(f"data.sources.{name}.glob = {source.glob!r}: {what}; {remedy}")

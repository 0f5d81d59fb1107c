"""Divides what a source has to read into shards, each of which one worker reads by itself."""

import os
import platform
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.data import FilesSource, StdlibSource, TextSource
from configs.seed import derive
from stages.data.faults import Globbed, reading, require_unchanged
from stages.data.finding import matches
from stages.data.reads import identify
from stages.hashing import Hashes

_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
)


@dataclass(frozen=True, slots=True)
class InputFile:
    """A file to be read."""

    label: str
    path: str
    bytes: int
    version: str
    """SHA-256 of the file; of the standard library's, the version of Python."""


@dataclass(frozen=True, slots=True)
class InputShard:
    """Files of one source that are read one after another."""

    source: str
    number: int
    files: tuple[InputFile, ...]

    @property
    def bytes(self) -> int:
        """On disk, of all its files."""
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that there is to read of one source."""

    shards: tuple[InputShard, ...]
    known: Mapping[str, Any]
    """Size and hash of each file by label, as `reads.identify` has them."""
    unread_files: int = 0
    """Files known to be beyond `max_bytes` before anything is read."""
    unread_bytes: int = 0


def inputs_of(
    name: str, source: TextSource, hashes: Hashes, *, shard_bytes: int, seed: int
) -> Inputs:
    """The shards of a source. DataError as of `matches` and `identify`."""
    match source:
        case StdlibSource():
            files, unread = _stdlib_files(name, source, seed=seed)
            shards = tuple(divide(name, files, shard_bytes))
            return Inputs(shards, {}, len(unread), sum(unread))
        case FilesSource():
            known = identify(name, source, hashes)
            files = known_files(name, source, hashes, known)
            return Inputs(tuple(divide(name, files, shard_bytes)), known)


def known_files(
    name: str, source: Globbed, hashes: Hashes, known: Mapping[str, Any]
) -> Sequence[InputFile]:
    """Where the files lie that were identified. DataError if there are others by now."""
    paths = {label: path for path, label in matches(name, source, hashes.store)}
    now = {label: known[label] for label in paths if label in known}
    for label in paths.keys() - known.keys():
        with reading(name, source, paths[label]):
            now[label] = hashes.of(paths[label]).model_dump()
    require_unchanged(name, source, known, now)
    return [
        InputFile(label, path, known[label]["bytes"], known[label]["sha256"])
        for label, path in paths.items()
    ]


def divide(name: str, files: Iterable[InputFile], shard_bytes: int) -> Iterator[InputShard]:
    """Files in order, as many to a shard as stay within `shard_bytes`; a larger one by itself."""
    waiting: list[InputFile] = []
    number = total = 0
    for file in files:
        if waiting and total + file.bytes > shard_bytes:
            yield InputShard(name, number, tuple(waiting))
            waiting, number, total = [], number + 1, 0
        waiting.append(file)
        total += file.bytes
    if waiting:
        yield InputShard(name, number, tuple(waiting))


def _stdlib_files(
    name: str, source: StdlibSource, *, seed: int
) -> tuple[Sequence[InputFile], Sequence[int]]:
    """Whole source files in an order drawn from `seed`, as many as fit `source.max_bytes`, and the
    sizes of those that do not."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(_library(root))
    order = np.random.default_rng(derive(seed, "data", name, "files")).permutation(len(paths))
    files, unread, left_bytes = [], [], source.max_bytes
    for path in (paths[index] for index in order):
        if (size_bytes := path.stat().st_size) <= left_bytes:
            left_bytes -= size_bytes
            label = path.relative_to(root).as_posix()
            files.append(InputFile(label, str(path), size_bytes, platform.python_version()))
        else:
            unread.append(size_bytes)
    return files, unread


def _library(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        for name in files:
            # `_sysconfigdata...` differs between builds of one version.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def decode_python(path: Path) -> str:
    """The text of a source file; what its encoding cannot read, the quality rules will see."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8", errors="replace")

"""Reads raw text: the standard library of the running Python, and the user's own files."""

import os
import sysconfig
import tokenize
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.data import FilesSource, StdlibSource
from configs.errors import DataError
from configs.seed import derive
from stages.data.faults import require_unchanged
from stages.data.files import Document, read_documents
from stages.data.finding import Match, matches
from stages.data.reads import identify
from stages.hashing import Hashes

_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What one source gave, and what its `max_bytes` kept out."""

    documents: Sequence[Document]
    unread_files: int
    """Files that were not read to their end."""
    unread_bytes: int
    """Size of those files on disk."""

    @property
    def read_bytes(self) -> int:
        """Of the documents' text."""
        return sum(len(document.text.encode()) for document in self.documents)


def read_stdlib(name: str, source: StdlibSource, *, seed: int) -> Reading:
    """Whole source files in an order drawn from `seed`, as many as fit `source.max_bytes`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(_library(root))
    order = np.random.default_rng(derive(seed, "data", name, "files")).permutation(len(paths))
    documents, unread_bytes, left_bytes = [], [], source.max_bytes
    for path in (paths[index] for index in order):
        if (size_bytes := path.stat().st_size) <= left_bytes:
            left_bytes -= size_bytes
            label = path.relative_to(root).as_posix()
            documents.append(Document(name, label, _decode_python(path)))
        else:
            unread_bytes.append(size_bytes)
    return Reading(documents, len(unread_bytes), sum(unread_bytes))


def read_files(name: str, source: FilesSource, hashes: Hashes) -> Reading:
    """The documents of every file that the glob matches, up to `source.max_bytes` of text.

    Files are read in parts, and no further than needed; one that is read to its end is hashed on
    the way. DataError, naming the field, its value and a remedy: no file matches, a file cannot be
    read or changes meanwhile, bytes are not UTF-8, a record lacks the text field.
    """
    before = identify(name, source, hashes)
    documents, unread = _read_within(name, source, matches(name, source, hashes.store), before)
    require_unchanged(name, source, before, identify(name, source, hashes))
    return Reading(documents, len(unread), sum(before[label]["bytes"] for label in unread))


def require_documents(
    name: str,
    source: StdlibSource | FilesSource,
    kept: Sequence[Document],
    reading: Reading,
    dropped: Mapping[str, int],
) -> None:
    """DataError unless at least two documents are left: one to train on, one to hold out."""
    if len(kept) >= 2:
        return
    match source:
        case FilesSource():
            field = f"glob = {source.glob!r}"
        case StdlibSource():
            field = f"max_bytes = {source.max_bytes}"
    reasons = ", ".join(f"{count} by {rule}" for rule, count in sorted(dropped.items()))
    raise DataError(
        f"data.sources.{name}.{field}: yields {len(kept)} usable documents of "
        f"{len(reading.documents)} read (dropped: {reasons or 'none'}), but training and held-out "
        f"text need one each; give more text (max_bytes = {source.max_bytes} now), or relax "
        "data.quality"
    )


def require_training_text(name: str, train: Sequence[str], held_out: Sequence[str]) -> None:
    """DataError if nothing is left to train on once what is held out was cut from it."""
    if not train:
        raise DataError(
            f"data.sources.{name}: all of its training text stands in its {len(held_out)} held-out "
            "documents too, as copies of one another do; give text that repeats itself less"
        )


def _library(root: Path) -> Iterator[Path]:
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in _NOT_LIBRARY]
        for name in files:
            # `_sysconfigdata...` differs between builds of one version.
            if name.endswith(".py") and not name.startswith("_sysconfigdata"):
                yield Path(folder, name)


def _decode_python(path: Path) -> str:
    """The text of a source file; what its encoding cannot read, the quality rules will see."""
    try:
        with tokenize.open(path) as file:
            return file.read()
    except (SyntaxError, UnicodeDecodeError):
        return path.read_text(encoding="utf-8", errors="replace")


def _read_within(
    name: str,
    source: FilesSource,
    matches: Sequence[Match],
    known: Mapping[str, Any],
) -> tuple[list[Document], list[str]]:
    """Documents while they fit `source.max_bytes`, and the files not read to their end."""
    documents: list[Document] = []
    left_bytes = source.max_bytes
    for number, (path, label) in enumerate(matches):
        for document in read_documents(name, source, path, label, known.get(label)):
            left_bytes -= len(document.text.encode())
            if left_bytes < 0:
                return documents, [unread for _, unread in matches[number:]]
            documents.append(document)
    return documents, []

"""Reads raw text: the standard library of the running Python, and the user's own files."""

import hashlib
import json
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec import AbstractFileSystem

from configs.data import FilesSource, Source, StdlibSource
from configs.errors import DataError
from configs.seed import derive

PIECE_CHARS = 4_000
"""A longer `.txt` file is many documents: it is split at blank lines into pieces of this size."""

_NOT_LIBRARY = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idlelib", "__pycache__"}
)
_BREAKS = ("\n\n", "\r\n\r\n", "\n")
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with where it came from."""

    source: str
    """The source's name in the recipe."""
    id: str
    """Unique in its source: a relative file name, with `#n` where a file holds several."""
    text: str


@dataclass(frozen=True, slots=True)
class Reading:
    """What one source gave, and what its `max_bytes` kept out."""

    documents: Sequence[Document]
    unread_files: int
    """Files that were not read to their end."""
    unread_bytes: int
    """Size of those files on disk."""


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


def read_files(name: str, source: FilesSource) -> Reading:
    """The documents of every file that the glob matches, up to `source.max_bytes` of text.

    DataError, naming the field, its value and a remedy: no file matches, a file cannot be read or
    changes meanwhile, bytes are not UTF-8, a record lacks the text field.
    """
    before = identify(name, source)
    documents, unread = _read_within(name, source, _matches(name, source))
    _require_unchanged(name, source, before, identify(name, source))
    return Reading(documents, len(unread), sum(before[label]["bytes"] for label in unread))


def require_documents(
    name: str,
    source: StdlibSource | FilesSource,
    kept: Sequence[Document],
    read: Mapping[str, int],
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
        f"data.sources.{name}.{field}: yields {len(kept)} usable documents of {read['documents']} "
        f"read (dropped: {reasons or 'none'}), but training and held-out text need one each; "
        f"give more text (max_bytes = {source.max_bytes} now), or relax data.quality"
    )


def identify(name: str, source: Source) -> dict[str, Any]:
    """What makes two readings of this source equal, as JSON; empty where the config says it all.

    Files enter by relative name, bytes and sha256, the standard library by the Python version.
    """
    match source:
        case FilesSource():
            found = {}
            for fs, path, label in _matches(name, source):
                digest, num_bytes = hashlib.sha256(), 0
                with _opened(name, source, fs, path) as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
                        num_bytes += len(chunk)
                found[label] = {"bytes": num_bytes, "sha256": digest.hexdigest()}
            return found
        case StdlibSource():
            return {"python": platform.python_version()}
        case _:
            return {}


def split_text(text: str, *, piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Pieces of at most `piece_chars`, cut after a blank line, else a line, else anywhere.

    Joined, the pieces are the text, except for pieces of white space alone, which are left out.
    """
    start = 0
    while start < len(text):
        end = start + piece_chars
        if end < len(text):
            found = (text.rfind(mark, start, end) + len(mark) for mark in _BREAKS)
            end = next((cut for cut in found if cut > start + len("\r\n\r\n")), end)
        piece, start = text[start:end], end
        if piece.strip():
            yield piece


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


def _matches(name: str, source: FilesSource) -> list[tuple[AbstractFileSystem, str, str]]:
    """(file system, path, name relative to the glob's fixed part) of each match, sorted."""
    try:
        fs, pattern = fsspec.core.url_to_fs(source.glob)
        paths = sorted(fs.glob(pattern))
        folders = [path for path in paths if fs.isdir(path)]
    except (OSError, ValueError, ImportError) as error:
        raise _fault(name, source, f"cannot be read: {error}", "correct the address") from error
    if not paths:
        raise _fault(name, source, "matches no file", "correct the path or the pattern")
    if folders:
        raise _fault(
            name, source, f"matches a folder, {folders[0]}", "say which files in it, as *.txt"
        )
    base = _WILDCARD.split(str(pattern), maxsplit=1)[0].rpartition("/")[0]
    return [(fs, path, path.removeprefix(base).lstrip("/")) for path in paths]


def _read_within(
    name: str, source: FilesSource, matches: Sequence[tuple[AbstractFileSystem, str, str]]
) -> tuple[list[Document], list[str]]:
    """Documents while they fit `source.max_bytes`, and the files not read to their end."""
    documents: list[Document] = []
    left_bytes = source.max_bytes
    for number, (fs, path, label) in enumerate(matches):
        for document in _read_one(name, source, fs, path, label):
            left_bytes -= len(document.text.encode())
            if left_bytes < 0:
                return documents, [unread for _, _, unread in matches[number:]]
            documents.append(document)
    return documents, []


def _require_unchanged(
    name: str, source: FilesSource, before: Mapping[str, Any], after: Mapping[str, Any]
) -> None:
    """DataError if a file differs from what it was: no hash would say what was read."""
    for label in sorted(before.keys() | after.keys()):
        if before.get(label) != after.get(label):
            raise _fault(
                name,
                source,
                f"{label} changed while the source was read: {_describe(before.get(label))} "
                f"before, {_describe(after.get(label))} after",
                "run again when nothing writes to it",
            )


def _describe(facts: Mapping[str, Any] | None) -> str:
    return f"{facts['bytes']:,} bytes of sha256 {facts['sha256'][:12]}" if facts else "no file"


def _read_one(
    name: str, source: FilesSource, fs: AbstractFileSystem, path: str, label: str
) -> Iterator[Document]:
    with _opened(name, source, fs, path) as file:
        match path.rpartition(".")[2].lower():
            case "txt":
                texts: Iterable[str] = split_text(_utf8(name, source, label, file.read(), 0))
            case "jsonl":
                texts = _jsonl(name, source, label, file)
            case "parquet":
                texts = _parquet(name, source, label, file)
            case suffix:
                raise _fault(
                    name,
                    source,
                    f"{label} ends in {suffix!r}",
                    "give files that end in .txt, .jsonl or .parquet",
                )
        for number, text in enumerate(texts):
            yield Document(name, f"{label}#{number}" if number else label, text)


def _jsonl(name: str, source: FilesSource, label: str, file: IO[bytes]) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(file, start=1):
        line = _utf8(name, source, label, raw, offset)
        offset += len(raw)
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise _fault(
                name, source, f"{label} line {number} is not JSON: {error}", "correct the line"
            ) from None
        text = record.get(source.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise _fault(
                name,
                source,
                f"{label} line {number} has no text in {source.text_field!r}, only: {keys}",
                f"set data.sources.{name}.text_field to the key that holds the text",
            )
        # JSON can spell half a surrogate pair, which no encoding can write.
        yield text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def _parquet(name: str, source: FilesSource, label: str, file: IO[bytes]) -> Iterator[str]:
    try:
        table = pq.ParquetFile(file)
        columns = table.schema_arrow
        kind = columns.field(source.text_field).type if source.text_field in columns.names else None
        if kind is None or not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
            raise _fault(
                name,
                source,
                f"{label} has no text column {source.text_field!r}, only: "
                f"{', '.join(f'{field.name} ({field.type})' for field in columns)}",
                f"set data.sources.{name}.text_field to the column that holds the text",
            )
        for batch in table.iter_batches(columns=[source.text_field]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _fault(
            name, source, f"{label} is not readable Parquet: {error}", "write it again"
        ) from error


def _opened(name: str, source: FilesSource, fs: AbstractFileSystem, path: str) -> Any:
    """The file, open for binary reading; the local and the remote kind share no base class."""
    try:
        return fs.open(path, "rb")
    except OSError as error:
        raise _fault(
            name, source, f"{path} cannot be read: {error}", "allow it, or narrow the glob"
        ) from error


def _utf8(name: str, source: FilesSource, label: str, raw: bytes, offset: int) -> str:
    try:
        return raw.decode("utf-8-sig" if offset == 0 else "utf-8")
    except UnicodeDecodeError as error:
        raise _fault(
            name,
            source,
            f"{label} has byte 0x{raw[error.start]:02x} at offset {offset + error.start}, "
            "which is not UTF-8",
            "convert the file to UTF-8, or leave it out of the glob",
        ) from None


def _fault(name: str, source: FilesSource, what: str, remedy: str) -> DataError:
    return DataError(f"data.sources.{name}.glob = {source.glob!r}: {what}; {remedy}")

"""Reads raw text: the standard library of the running Python, and the user's own files."""

import hashlib
import json
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator
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


def read_stdlib(name: str, source: StdlibSource, *, seed: int) -> Iterator[Document]:
    """Whole source files in an order drawn from `seed`, as many as fit `source.max_bytes`."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(_library(root))
    order = np.random.default_rng(derive(seed, "data", name, "files")).permutation(len(paths))
    left_bytes = source.max_bytes
    for path in (paths[index] for index in order):
        if (size_bytes := path.stat().st_size) <= left_bytes:
            left_bytes -= size_bytes
            yield Document(name, path.relative_to(root).as_posix(), _decode_python(path))


def read_files(name: str, source: FilesSource) -> Iterator[Document]:
    """The documents of every file that the glob matches, up to `source.max_bytes` of text.

    DataError, naming the field, its value and a remedy: no file matches, a file cannot be read,
    bytes are not UTF-8, a record lacks the text field.
    """
    left_bytes = source.max_bytes
    for fs, path, label in _matches(name, source):
        for document in _read_one(name, source, fs, path, label):
            left_bytes -= len(document.text.encode())
            if left_bytes < 0:
                return
            yield document


def identify(name: str, source: Source) -> dict[str, Any]:
    """What makes two readings of this source equal, as JSON; empty where the config says it all.

    Files enter by relative name, bytes and sha256, the standard library by the Python version.
    """
    match source:
        case FilesSource():
            found = {}
            for fs, path, label in _matches(name, source):
                digest = hashlib.sha256()
                with _opened(name, source, fs, path) as file:
                    while chunk := file.read(1 << 20):
                        digest.update(chunk)
                found[label] = {"bytes": int(fs.size(path)), "sha256": digest.hexdigest()}
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

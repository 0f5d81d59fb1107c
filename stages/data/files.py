"""Reads one file of text, tables or lines of JSON, in parts, as documents."""

import codecs
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from configs.data import FilesSource
from configs.errors import DataError
from model.weights.reading import POINTER
from stages.data.finding import fault, reading
from stages.hashing import FileSystem, HashedReader

PIECE_CHARS = 4_000
"""A longer `.txt` file is many documents: it is split at blank lines into pieces of this size."""
_BREAKS = ("\n\n", "\r\n\r\n", "\n")


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with where it came from."""

    source: str
    """The source's name in the recipe."""
    id: str
    """Unique in its source: a relative file name, with `#n` where a file holds several."""
    text: str


def read_documents(
    name: str, source: FilesSource, fs: FileSystem, path: str, label: str, known: Any
) -> Iterator[Document]:
    """The documents of one file, of which `known` is the size and hash."""
    with reading(name, source, path), fs.open(path, "rb") as file:
        _require_content(name, source, label, file)
        reader = HashedReader(file)
        match path.rpartition(".")[2].lower():
            case "txt":
                texts = split_text(_decoded(name, source, label, reader))
            case "jsonl":
                texts = _jsonl(name, source, label, reader)
            case "parquet":
                texts = _parquet(name, source, label, file)
            case suffix:
                raise fault(
                    name,
                    source,
                    f"{label} ends in {suffix!r}",
                    "give files that end in .txt, .jsonl or .parquet",
                )
        for number, text in enumerate(texts):
            yield Document(name, f"{label}#{number}" if number else label, text)
        read = reader.entry
        if read.bytes and read.model_dump() != known:
            require_unchanged(name, source, {label: known}, {label: read.model_dump()})


def split_text(parts: Iterable[str], *, piece_chars: int = PIECE_CHARS) -> Iterator[str]:
    """Pieces of at most `piece_chars` of the text that `parts` make up, however it is parted.

    Cut after a blank line, else a line, else anywhere. Joined, the pieces are the text, except for
    pieces of white space alone, which are left out.
    """
    text, start = "", 0
    for part in chain(parts, [None]):
        text, start = text[start:] + (part or ""), 0
        # What could still be cut differently, were there more text, waits for it.
        while start + piece_chars < len(text) or (part is None and start < len(text)):
            end = start + piece_chars
            if end < len(text):
                found = (text.rfind(mark, start, end) + len(mark) for mark in _BREAKS)
                end = next((cut for cut in found if cut > start + len("\r\n\r\n")), end)
            piece, start = text[start:end], end
            if piece.strip():
                yield piece


def _require_content(name: str, source: FilesSource, label: str, file: IO[bytes]) -> None:
    """DataError for a pointer that git-lfs left where the file should be."""
    start = file.read(len(POINTER))
    file.seek(0)
    if start == POINTER:
        raise fault(
            name,
            source,
            f"{label} is a git-lfs pointer, not the file that it stands for",
            "fetch the files with `git lfs pull` in that folder",
        )


def _decoded(name: str, source: FilesSource, label: str, reader: HashedReader) -> Iterator[str]:
    """The text of a file, in parts, without a byte-order mark."""
    decoder, offset, is_start = codecs.getincrementaldecoder("utf-8")(), 0, True
    for chunk in chain(reader.chunks(), [b""]):
        waiting = len(decoder.getstate()[0])
        try:
            text = decoder.decode(chunk, final=not chunk)
        except UnicodeDecodeError as error:
            raise _not_utf8(name, source, label, error, offset - waiting) from None
        offset += len(chunk)
        if text:
            yield text.removeprefix("\ufeff") if is_start else text
            is_start = False


def _jsonl(name: str, source: FilesSource, label: str, reader: HashedReader) -> Iterator[str]:
    offset = 0
    for number, raw in enumerate(reader.lines(), start=1):
        try:
            line = raw.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise _not_utf8(name, source, label, error, offset) from None
        offset += len(raw)
        if not line.strip():
            continue
        try:
            # Whole numbers of any length are JSON, but Python reads no more than 4,300 digits.
            record = json.loads(line, parse_int=float)
        except (RecursionError, ValueError) as error:
            raise fault(
                name, source, f"{label} line {number} is not JSON: {error}", "correct the line"
            ) from None
        text = record.get(source.text_field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            keys = ", ".join(record) if isinstance(record, dict) else type(record).__name__
            raise fault(
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
        if not _is_text(kind):
            raise fault(
                name,
                source,
                f"{label} has no text column {source.text_field!r}, only: "
                f"{', '.join(f'{field.name} ({field.type})' for field in columns)}",
                f"set data.sources.{name}.text_field to the column that holds the text",
            )
        for batch in table.iter_batches(columns=[source.text_field]):
            yield from (text or "" for text in batch.column(0).to_pylist())
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        # Of damaged pages Arrow makes an OSError; what the system refuses has a number.
        if getattr(error, "errno", None) is not None:
            raise
        said = " ".join(str(error).split())
        raise fault(
            name, source, f"{label} is not readable Parquet: {said}", "write it again"
        ) from error


def _is_text(kind: pa.DataType | None) -> bool:
    """Whether a column of this type holds text, each value on its own or in a dictionary."""
    if kind is not None and pa.types.is_dictionary(kind):
        kind = kind.value_type
    return kind is not None and (pa.types.is_string(kind) or pa.types.is_large_string(kind))


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


def _not_utf8(
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


def _describe(facts: Mapping[str, Any] | None) -> str:
    return f"{facts['bytes']:,} bytes of sha256 {facts['sha256'][:12]}" if facts else "no file"

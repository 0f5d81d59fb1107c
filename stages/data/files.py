"""Reads one file of text, tables or lines of JSON, in parts, as documents."""

import codecs
import gzip
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import IO, Any, cast

from cluster import place
from configs.data import FilesSource
from model.weights.reading import POINTER
from stages.data.faults import fault, not_utf8, reading, require_unchanged
from stages.data.rows import json_texts, table_texts
from stages.hashing import HashedReader

PIECE_CHARS = 4_000
"""A longer `.txt` file is many documents: it is split at blank lines into pieces of this size."""
_BREAKS = ("\n\n", "\r\n\r\n", "\n")
_START_BYTES = 4096
_GZIP, _PARQUET = b"\x1f\x8b", b"PAR1"
_PACKED_SUFFIX = ".gz"
_JSON_LINE = re.compile(rb"(\xef\xbb\xbf)?\s*\{[ \t]*[\"}]")
"""Begins an object that goes on in the same line, as one of many lines over several does not."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with where it came from."""

    source: str
    """The source's name in the recipe."""
    id: str
    """Unique in its source: a relative file name, with `#n` where a file holds several."""
    text: str


def read_documents(
    name: str, source: FilesSource, path: str, label: str, known: Any
) -> Iterator[Document]:
    """The documents of one file, of which `known` is the size and hash."""
    with reading(name, source, path), place.opened(path) as file:
        start = _start(file)
        _require_content(name, source, label, start)
        reader = content = HashedReader(file)
        if is_packed := start.startswith(_GZIP):
            start = _start(_unpacked(file))
            file.seek(0)
            # What identity knows is the hash of the file as it lies there.
            content = HashedReader(_unpacked(reader))
        match _kind(label, start):
            case "txt":
                texts = split_text(_decoded(name, source, label, content))
            case "jsonl":
                texts = json_texts(name, source, label, content.lines())
            case "parquet" if is_packed:
                raise fault(
                    name, source, f"{label} is packed by gzip", "unpack it, as a table must be"
                )
            case "parquet":
                texts = table_texts(name, source, label, file)
            case suffix:
                raise fault(
                    name,
                    source,
                    f"{label} ends in {suffix!r}",
                    "give files that end in .txt, .jsonl or .parquet, the first two also packed as "
                    ".gz; unpack or convert others",
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


def _start(file: IO[bytes]) -> bytes:
    """The first bytes of a file, which is at its beginning, and is so again afterwards."""
    start = file.read(_START_BYTES)
    file.seek(0)
    return start


def _unpacked(file: IO[bytes] | HashedReader) -> IO[bytes]:
    """What gzip packed. Read from front to end it only reads `file`, so that need not seek."""
    return cast(IO[bytes], gzip.GzipFile(fileobj=cast(IO[bytes], file), mode="rb"))


def _kind(label: str, start: bytes) -> str:
    """The suffix of a file's name or, without one, that of what the file begins as."""
    own = label.rpartition("/")[2].lower().removesuffix(_PACKED_SUFFIX)
    if "." in own:
        return own.rpartition(".")[2]
    if start.startswith(_PARQUET):
        return "parquet"
    return "jsonl" if _JSON_LINE.match(start) else "txt"


def _require_content(name: str, source: FilesSource, label: str, start: bytes) -> None:
    """DataError for a pointer that git-lfs left where the file should be."""
    if start.startswith(POINTER):
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
            raise not_utf8(name, source, label, error, offset - waiting) from None
        offset += len(chunk)
        if text:
            yield text.removeprefix("\ufeff") if is_start else text
            is_start = False

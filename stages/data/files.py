"""Reads one file of text, tables or lines of JSON, in parts, as documents.

What cannot be read is told in its place, as `Broken`, and reading goes on behind it: with the next
line or, where nothing says where sense begins again, the next file. Memory stays bounded whatever a
file holds: a row or an undivided document has at most 64 MiB, and what is packed must not unpack to
much more than text does.
"""

import codecs
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime
from itertools import chain
from typing import IO, Any

from cluster import place
from configs.data import FilesSource
from configs.errors import DataError
from model.weights.reading import POINTER
from stages.data.content import Content
from stages.data.faults import EVALUATIONS, Broken, Globbed, fault, reading, require_unchanged
from stages.data.formats import MAX_HELD_BYTES, START_BYTES, kind_of, suffix_of
from stages.data.rows import Row, Wanted, json_rows, not_utf8, table_rows, written
from stages.hashing import HashedReader

PIECE_CHARS = 4_000
"""A longer text is many documents: it is split at blank lines into pieces of this size."""
_BREAKS = ("\n\n", "\r\n\r\n", "\n")
_MILLISECONDS_FROM = 1e11
"""As seconds since 1970 it would be in the year 5138."""


@dataclass(frozen=True, slots=True)
class Document:
    """One text, with where it came from."""

    source: str
    """The source's name in the recipe."""
    id: str
    """Unique in its source: a relative file name, with `#n` where a file holds several."""
    text: str
    key: str = ""
    """The document's own name for itself, as the source's `id_field` gives it."""
    licence: str = ""
    timestamp: str = ""
    """When it was written, in ISO 8601 where the file says it as a time or a number."""


def read_documents(
    name: str, source: FilesSource, path: str, label: str, known: Any
) -> Iterator[Document | Broken]:
    """The documents of one file, of which `known` is the size and hash, and what is broken.

    DataError if the system refuses the file, it changed since, is a git-lfs pointer, or of a kind
    that is not read.
    """
    asked = {
        "key": source.id_field,
        "licence": source.licence_field,
        "timestamp": source.timestamp_field,
    }
    fields = {meaning: field for meaning, field in asked.items() if field is not None}
    wanted = Wanted(f"data.sources.{name}.text_field", source.text_field, tuple(fields.values()))
    number, own_licence = 0, source.licence or ""
    for found in read_rows(name, source, path, label, known, wanted, splits=source.split_documents):
        if isinstance(found, Broken):
            yield found
            continue
        place_id = f"{label}#{number}" if number else label
        number += 1
        if found.also:
            said = dict(zip(fields, found.also, strict=True))
            yield Document(
                name,
                place_id,
                found.text,
                key=worded(said.get("key")),
                licence=worded(said.get("licence")) or own_licence,
                timestamp=_moment(said.get("timestamp")),
            )
        else:
            yield Document(name, place_id, found.text, licence=own_licence)


def read_rows(
    name: str, source: Globbed, path: str, label: str, known: Any, wanted: Wanted, *, splits: bool
) -> Iterator[Row | Broken]:
    """The rows of one file, or the text of one that has none, whole or in pieces.

    Faults are those of `read_documents`.
    """
    with reading(name, source, path), place.opened(path) as file:
        start = file.read(START_BYTES)
        file.seek(0)
        if start.startswith(POINTER):
            raise fault(
                name,
                source,
                f"{label} is a git-lfs pointer, not the file that it stands for",
                "fetch the files with `git lfs pull` in that folder",
            )
        reader = HashedReader(file)
        size_bytes = known["bytes"] if known else 0
        content = Content(reader, start, size_bytes)
        match kind_of(label, content.start):
            case "text":
                yield from _texts(name, label, content, splits=splits)
            case "lines":
                yield from json_rows(name, label, content, wanted)
            case "array":
                said = f"{label} is one array of JSON; write one object a line, as `jq -c .[]` does"
                yield Broken(name, label, "broken_file", said, size_bytes)
            case "table" if content.packing is None:
                whole = yield from _table(name, label, file, size_bytes, wanted)
                if whole and file.seek(0, os.SEEK_END) == size_bytes:
                    # It was read in another order than it is hashed in, which is left to those who
                    # compare all files afterwards.
                    return
                file.seek(0)
            case "table":
                raise fault(
                    name,
                    source,
                    f"{label} is packed by {content.packing}",
                    "unpack it, as a table must be",
                )
            case None:
                raise _unknown(name, source, label)
        if content.damage:
            said = f"{label} {content.damage}"
            yield Broken(name, label, "broken_file", said, content.lost_bytes)
        _require_known(name, source, label, known, reader)


def worded(value: object) -> str:
    """A value of a row in words that can be written; of several, each. None of what nests too deep
    to be told."""
    try:
        return written(_worded(value))
    except RecursionError:
        return ""


def _worded(value: object) -> str:
    match value:
        case None:
            return ""
        case str():
            return value
        case date():
            return value.isoformat()
        case list() | tuple():
            return ", ".join(map(_worded, value))
    return str(value)


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


class _Decoded:
    """The text of a file, in parts, without a byte-order mark. It ends where it is no UTF-8."""

    def __init__(self, label: str, content: Content) -> None:
        self.fault = ""
        """What is wrong where the text ended, and the remedy; empty if it ended well."""
        self.read_bytes = 0
        """Of the content, before the fault."""
        self._label, self._content = label, content

    def __iter__(self) -> Iterator[str]:
        decoder, is_start = codecs.getincrementaldecoder("utf-8")(), True
        for chunk in chain(self._content.chunks(), [b""]):
            waiting = decoder.getstate()[0]
            # A letter that damage cut is part of the damage.
            is_last = not chunk and not self._content.damage
            try:
                text = decoder.decode(chunk, final=is_last)
            except UnicodeDecodeError as error:
                at = self.read_bytes - len(waiting) + error.start
                self.fault = not_utf8(self._label, error.object[error.start], at)
                text, self.read_bytes = error.object[: error.start].decode(), at
            else:
                self.read_bytes += len(chunk)
            if text:
                yield text.removeprefix("\ufeff") if is_start else text
                is_start = False
            if self.fault:
                return


def _texts(name: str, label: str, content: Content, *, splits: bool) -> Iterator[Row | Broken]:
    """The text of a file of plain text: in pieces up to where it is broken, or whole or not."""
    decoded = _Decoded(label, content)
    if splits:
        yield from map(Row, split_text(decoded))
        if decoded.fault:
            left_bytes = content.size_bytes - content.on_disk(decoded.read_bytes)
            yield Broken(name, label, "broken_encoding", decoded.fault, max(1, left_bytes))
        return
    parts: list[str] = []
    for part in decoded:
        parts.append(part)
        if decoded.read_bytes > MAX_HELD_BYTES:
            remedy = (
                "divide it"
                if name.startswith(EVALUATIONS)
                else f"set data.sources.{name}.split_documents = true"
            )
            said = (
                f"{label} has more than {MAX_HELD_BYTES:,} bytes of text in one document; "
                f"{remedy}, or leave it out of the glob"
            )
            yield Broken(name, label, "broken_file", said, content.size_bytes)
            return
    if decoded.fault:
        yield Broken(name, label, "broken_encoding", decoded.fault, content.size_bytes)
    elif content.damage:
        content.lost_bytes = content.size_bytes
    elif (text := "".join(parts)).strip():
        yield Row(text)


def _moment(value: object) -> str:
    """When something was: a number is seconds or milliseconds since 1970, in UTC."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            seconds = value / 1000 if abs(value) >= _MILLISECONDS_FROM else value
            return datetime.fromtimestamp(seconds, UTC).isoformat()
        except (ValueError, OverflowError, OSError):
            return str(value)
    return worded(value)


def _unknown(name: str, source: Globbed, label: str) -> DataError:
    return fault(
        name,
        source,
        f"{label} ends in {suffix_of(label)!r}",
        "give files that end in .txt, .md, .jsonl, .parquet or as source code does, all but "
        "tables also packed as .gz or .zst; unpack or convert others",
    )


def _table(
    name: str, label: str, file: IO[bytes], size_bytes: int, wanted: Wanted
) -> Generator[Row | Broken, None, bool]:
    """The rows of a table; returns whether nothing in it is broken."""
    is_whole = True
    for found in table_rows(name, label, file, size_bytes, wanted):
        is_whole = is_whole and not isinstance(found, Broken)
        yield found
    return is_whole


def _require_known(
    name: str, source: Globbed, label: str, known: Any, reader: HashedReader
) -> None:
    """DataError unless a file, to be read to its end, is what it was."""
    for _ in reader.chunks():
        pass
    read = reader.entry.model_dump()
    if read != known:
        require_unchanged(name, source, {label: known}, {label: read})

"""The texts of rows: lines of JSON and Parquet tables, under one set of rules.

The text stands under the name that the recipe gives, or, where no field bears that name as a whole,
inside other fields: `meta.text`. A row without a value there has an empty text, which the quality
rules judge. Anything else that is no text is broken, as it shows that the name is wrong or the row
not one of these.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.errors import StoreError
from stages.data.content import Content
from stages.data.faults import Broken
from stages.data.formats import MAX_HELD_BYTES, MAX_RATIO

_SHOWN_FIELDS = 10
_MISSING = object()
_BATCH_BYTES = 4 << 20
_BATCH_ROWS = 256
"""At most, as values that repeat take less room in a file than in memory."""
_BUFFER_BYTES = 1 << 20
_INT_DIGITS = 4300
"""Whole numbers of any length are JSON, but Python reads no longer ones."""


def _whole_number(digits: str) -> int | float:
    return int(digits) if len(digits) <= _INT_DIGITS else float(digits)


_DECODER = json.JSONDecoder(parse_int=_whole_number)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which columns or keys of rows are read."""

    setting: str
    """The field of the recipe that names the text: `data.sources.mine.text_field`."""
    text: str | None
    """None where rows need no text of their own: theirs is empty, and nothing of them broken."""
    also: tuple[str, ...] = ()
    """What else, of any type; a row may lack it."""


class Row(NamedTuple):
    """One row's text, and the values that were asked for besides, none where it has none."""

    text: str
    also: tuple[Any, ...] = ()


def json_rows(name: str, label: str, content: Content, wanted: Wanted) -> Iterator[Row | Broken]:
    """Each line that is not blank; a line that is no row is broken, and the next one read."""
    offset = 0
    for number, (raw, num_bytes) in enumerate(lines(content.chunks()), start=1):
        if content.damage and raw is not None and len(raw) == num_bytes:
            # The damage cut it short, which is told of the file.
            return
        where = f"{label} line {number}"
        try:
            if raw is None:
                raise _Unfit(f"{where} is longer than {MAX_HELD_BYTES:,} bytes; take it out")
            row = _json_row(raw, where, wanted, is_first=number == 1)
            if row is not None:
                yield row
        except UnicodeDecodeError as error:
            said = not_utf8(label, error.object[error.start], offset + error.start)
            yield Broken(name, where, "broken_encoding", said, content.on_disk(num_bytes))
        except _Unfit as error:
            yield Broken(name, where, "broken_row", str(error), content.on_disk(num_bytes))
        offset += num_bytes


def lines(
    chunks: Iterable[bytes], *, max_bytes: int = MAX_HELD_BYTES
) -> Iterator[tuple[bytes | bytearray | None, int]]:
    """Each line without its end, and its bytes with it; of one longer than `max_bytes` no more
    than its length is kept."""
    held, num_bytes = bytearray(), 0
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            line: bytes | bytearray = part
            if num_bytes:
                num_bytes += len(part)
                if num_bytes <= max_bytes:
                    held += part
                line, held = held, bytearray()
            else:
                num_bytes = len(part)
            yield (line if num_bytes <= max_bytes else None), num_bytes + 1
            num_bytes = 0
        num_bytes += len(rest)
        if num_bytes <= max_bytes:
            held += rest
        else:
            held = bytearray()
    if num_bytes:
        yield (held if num_bytes <= max_bytes else None), num_bytes


def table_rows(
    name: str, label: str, file: IO[bytes], size_bytes: int, wanted: Wanted
) -> Iterator[Row | Broken]:
    """Each row of a Parquet file, read a few rows at a time; where it is damaged, it ends."""
    total = read = text_bytes = 0
    try:
        table = pq.ParquetFile(
            file, page_checksum_verification=True, pre_buffer=False, buffer_size=_BUFFER_BYTES
        )
        total, schema = table.metadata.num_rows, table.schema_arrow
        path = None if wanted.text is None else _path(schema, wanted.text)
        if path is None and wanted.text is not None:
            columns = [f"{column.name} ({column.type})" for column in schema]
            said = _no_text(f"{label} has no text column", columns, "column", wanted)
            yield Broken(name, label, "broken_file", said, size_bytes)
            return
        others = [_column(schema, field) for field in wanted.also]
        names = [".".join(one) for one in [path, *others] if one]
        for group in range(table.num_row_groups):
            rows = _batch_rows(table.metadata.row_group(group), names)
            for batch in table.iter_batches(rows, row_groups=[group], columns=names):
                texts = _at(batch, path).to_pylist()
                also = [_values(_at(batch, one)) for one in others]
                text_bytes += sum(
                    len(value)
                    for column in (texts, *also)
                    for value in column
                    if isinstance(value, str)
                )
                if text_bytes > max(MAX_HELD_BYTES, MAX_RATIO * size_bytes):
                    said = (
                        f"{label} unpacks to more than {MAX_RATIO} times its {size_bytes:,} bytes"
                    )
                    yield Broken(
                        name, label, "broken_file", f"{said}; leave it out of the glob",
                        _left_bytes(size_bytes, read, total),
                    )  # fmt: skip
                    return
                read += len(texts)
                yield from (
                    Row(text or "", (*more,)) for text, *more in zip(texts, *also, strict=True)
                )
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        # Of damaged pages Arrow makes an OSError; what the system refuses has a number.
        if isinstance(error, StoreError) or getattr(error, "errno", None) is not None:
            raise
        said = f"{label} is not readable Parquet: {' '.join(str(error).split())}; write it again"
        yield Broken(name, label, "broken_file", said, _left_bytes(size_bytes, read, total))


def written(text: str) -> str:
    """The text without halves of surrogate pairs, which JSON can spell and no encoding write."""
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def not_utf8(label: str, byte: int, offset: int) -> str:
    """What is wrong with a file that has this byte so far into its content, and the remedy."""
    return (
        f"{label} has byte 0x{byte:02x} at offset {offset}, which is not UTF-8; convert the file "
        "to UTF-8, or leave it out of the glob"
    )


class _Unfit(Exception):
    """A line that is no row; says why."""


def _json_row(raw: bytes | bytearray, where: str, wanted: Wanted, *, is_first: bool) -> Row | None:
    """The row of one line, none if it is blank."""
    line = raw.decode("utf-8-sig" if is_first else "utf-8")
    if not line or line.isspace():
        return None
    try:
        record = _DECODER.decode(line)
    except RecursionError:
        raise _Unfit(f"{where} nests deeper than can be read; take the line out") from None
    except ValueError as error:
        raise _Unfit(f"{where} is not JSON: {error}; correct the line") from None
    found = None if wanted.text is None else _value(record, wanted.text)
    text = "" if found is None else found
    if not isinstance(text, str):
        fields = list(record) if isinstance(record, dict) else [type(record).__name__]
        raise _Unfit(_no_text(f"{where} has no text in", fields, "key", wanted))
    values: tuple[Any, ...] = ()
    if wanted.also:
        also = (_value(record, field) for field in wanted.also)
        values = tuple(None if one is _MISSING else one for one in also)
    if b"\\u" not in raw:
        return Row(text, values)
    return Row(written(text), tuple(written(v) if isinstance(v, str) else v for v in values))


def _batch_rows(group: pq.RowGroupMetaData, columns: Sequence[str]) -> int:
    """As many rows of a row group as take about `_BATCH_BYTES` in these columns."""
    chunks = [group.column(index) for index in range(group.num_columns)]
    used = [chunk for chunk in chunks if chunk.path_in_schema in columns]
    unpacked_bytes = sum(chunk.total_uncompressed_size for chunk in used)
    rows = _BATCH_BYTES * group.num_rows // max(unpacked_bytes, 1)
    return max(1, min(int(rows), _BATCH_ROWS))


def _at(batch: pa.RecordBatch, path: Sequence[str] | None) -> pa.Array:
    """What stands at a path; nulls without one."""
    if path is None:
        return pa.nulls(len(batch))
    column = batch.column(path[0])
    return pc.struct_field(column, path[1:]) if path[1:] else column


def _values(column: pa.Array) -> list[Any]:
    """The values of a column, none for one that Python cannot hold: a date of the year 10000."""
    try:
        values: list[Any] = column.to_pylist()
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError):
        values = [_value_or_none(one) for one in column]
    return values


def _value_or_none(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError:
        raise
    except (OverflowError, ValueError):
        return None


def _left_bytes(size_bytes: int, read: int, total: int) -> int:
    """The part of a file that rows make up which were not read."""
    return size_bytes - size_bytes * read // total if read < total else size_bytes


def _value(record: object, field: str) -> object:
    """What stands in a field, where `null` holds nothing but nulls; `_MISSING` without one."""
    if not isinstance(record, dict):
        return _MISSING
    if field in record:
        return record[field]
    outer, _, inner = field.partition(".")
    if not inner or outer not in record:
        return _MISSING
    return None if record[outer] is None else _value(record[outer], inner)


def _path(fields: pa.Schema | pa.StructType, field: str) -> list[str] | None:
    """Names from the outermost column to the text in a field; none if there is no text."""
    path = _column(fields, field)
    if path is None:
        return None
    kind = fields.field(fields.get_field_index(path[0])).type
    for one in path[1:]:
        kind = kind.field(kind.get_field_index(one)).type
    return path if _is_text(kind) else None


def _column(fields: pa.Schema | pa.StructType, field: str) -> list[str] | None:
    """Names from the outermost column to what stands in a field; none if there is no such field."""
    if fields.get_field_index(field) >= 0:
        return [field]
    outer, _, inner = field.partition(".")
    if not inner or (index := fields.get_field_index(outer)) < 0:
        return None
    kind = fields.field(index).type
    if pa.types.is_null(kind):
        return [outer]
    below = _column(kind, inner) if pa.types.is_struct(kind) else None
    return None if below is None else [outer, *below]


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text, each value on its own or in a dictionary, or
    nothing at all."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return pa.types.is_null(kind) or any(test(kind) for test in tests)


def _no_text(what: str, fields: Sequence[str], place: str, wanted: Wanted) -> str:
    """That there is no text where the recipe says; `fields` is what there is."""
    shown = ", ".join(fields[:_SHOWN_FIELDS]).encode("utf-8", "backslashreplace").decode()
    more = f", and {len(fields) - _SHOWN_FIELDS} more" if len(fields) > _SHOWN_FIELDS else ""
    return (
        f"{what} {wanted.text!r}, only: {shown}{more}; set {wanted.setting} to the {place} that "
        "holds the text"
    )

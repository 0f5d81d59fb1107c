"""The texts of rows: lines of JSON and Parquet tables, under one set of rules.

The text stands under the name that the recipe gives, or, where no field bears that name as a whole,
inside other fields: `meta.text`. A row without a value there has an empty text, which the quality
rules judge. Anything else that is no text is an error, as it shows that the name is wrong.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import IO

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from configs.data import FilesSource
from configs.errors import DataError
from stages.data.faults import fault, not_utf8

_SHOWN_FIELDS = 10
_MISSING = object()


def json_texts(name: str, source: FilesSource, label: str, lines: Iterable[bytes]) -> Iterator[str]:
    """The text of each line that is not blank."""
    offset = 0
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode("utf-8-sig" if offset == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise not_utf8(name, source, label, error, offset) from None
        offset += len(raw)
        if not line.strip():
            continue
        where = f"{label} line {number}"
        try:
            # Whole numbers of any length are JSON, but Python reads no more than 4,300 digits.
            record = json.loads(line, parse_int=float)
        except RecursionError:
            raise fault(
                name, source, f"{where} nests deeper than can be read", "take the line out"
            ) from None
        except ValueError as error:
            raise fault(name, source, f"{where} is not JSON: {error}", "correct the line") from None
        text = "" if (found := _value(record, source.text_field)) is None else found
        if not isinstance(text, str):
            fields = list(record) if isinstance(record, dict) else [type(record).__name__]
            raise _no_text(name, source, f"{where} has no text in", fields, "key")
        # JSON can spell half a surrogate pair, which no encoding can write.
        yield text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


def table_texts(name: str, source: FilesSource, label: str, file: IO[bytes]) -> Iterator[str]:
    """The text of each row of a Parquet file."""
    try:
        table = pq.ParquetFile(file, page_checksum_verification=True)
        path = _path(table.schema_arrow, source.text_field)
        if path is None:
            columns = [f"{column.name} ({column.type})" for column in table.schema_arrow]
            raise _no_text(name, source, f"{label} has no text column", columns, "column")
        for batch in table.iter_batches(columns=[".".join(path)]):
            column = batch.column(path[0])
            texts = pc.struct_field(column, path[1:]) if path[1:] else column
            yield from (text or "" for text in texts.to_pylist())
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        # Of damaged pages Arrow makes an OSError; what the system refuses has a number.
        if getattr(error, "errno", None) is not None:
            raise
        said = " ".join(str(error).split())
        raise fault(
            name, source, f"{label} is not readable Parquet: {said}", "write it again"
        ) from error


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
    outer, _, inner = field.partition(".")
    if (index := fields.get_field_index(field)) >= 0:
        return [field] if _is_text(fields.field(index).type) else None
    if not inner or (index := fields.get_field_index(outer)) < 0:
        return None
    kind = fields.field(index).type
    if pa.types.is_null(kind):
        return [outer]
    below = _path(kind, inner) if pa.types.is_struct(kind) else None
    return None if below is None else [outer, *below]


def _is_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds text, each value on its own or in a dictionary, or
    nothing at all."""
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (pa.types.is_string, pa.types.is_large_string, pa.types.is_string_view)
    return pa.types.is_null(kind) or any(test(kind) for test in tests)


def _no_text(
    name: str, source: FilesSource, what: str, fields: Sequence[str], place: str
) -> DataError:
    """The error that there is no text where the recipe says; `fields` is what there is."""
    shown = ", ".join(fields[:_SHOWN_FIELDS]).encode("utf-8", "backslashreplace").decode()
    more = f", and {len(fields) - _SHOWN_FIELDS} more" if len(fields) > _SHOWN_FIELDS else ""
    return fault(
        name,
        source,
        f"{what} {source.text_field!r}, only: {shown}{more}",
        f"set data.sources.{name}.text_field to the {place} that holds the text",
    )

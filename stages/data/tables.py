"""Documents and drops as they lie on disk between steps: Arrow for texts, Parquet for reasons.

A folder's documents are mapped into memory and read where they are needed; no step holds them all.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from stages.data.drops import Drop

DOCUMENTS, DROPS, KEPT = "documents.arrow", "drops.parquet", "documents.parquet"
_ROWS_AT_A_TIME = 1024
_DROPS = pa.schema(
    [
        ("source", pa.string()),
        ("document", pa.string()),
        ("rule", pa.string()),
        ("value", pa.float64()),
        ("threshold", pa.float64()),
        ("start", pa.string()),
        ("of", pa.string()),
        ("cut_chars", pa.int64()),
        ("reason", pa.string()),
        ("key", pa.string()),
    ]
)


class Writer:
    """Rows written a batch at a time, to Arrow IPC or to Parquet by the file's name."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        """Begin the file `path`."""
        self._schema = schema
        self._sink = pa.OSFile(str(path), "wb")
        is_arrow = path.suffix == ".arrow"
        make = pa.ipc.new_file if is_arrow else pq.ParquetWriter
        self._writer = make(self._sink, schema)

    def write(self, columns: Mapping[str, Sequence[Any]]) -> None:
        """One batch, a column a name; nothing for no rows."""
        if not len(next(iter(columns.values()))):
            return
        arrays = [pa.array(columns[one.name], one.type) for one in self._schema]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))

    def __enter__(self) -> Self:
        """The writer."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End the file."""
        self._writer.close()
        self._sink.close()


def open_table(path: Path, *columns: str) -> pa.Table:
    """An Arrow file, mapped into memory: a column is read from the disk when it is looked at."""
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    table = reader.read_all()
    return table.select(list(columns)) if columns else table


def batches(path: Path, *columns: str) -> Iterator[dict[str, list[Any]]]:
    """The rows of an Arrow file, some at a time, as lists by column."""
    # Read, not mapped: mapped pages would count as memory long after they were used.
    with pa.OSFile(str(path), "rb") as file, pa.ipc.open_file(file) as reader:
        for number in range(reader.num_record_batches):
            yield reader.get_batch(number).select(list(columns)).to_pydict()


class Texts:
    """Single texts of an Arrow file, by row."""

    def __init__(self, path: Path, column: str = "text") -> None:
        """Map the file."""
        self._chunks = open_table(path, column).column(column).chunks
        self._ends = np.cumsum([len(one) for one in self._chunks])

    def __getitem__(self, row: int) -> str:
        """The text of a row."""
        chunk = int(np.searchsorted(self._ends, row, side="right"))
        first = int(self._ends[chunk]) - len(self._chunks[chunk])
        return str(self._chunks[chunk][row - first].as_py())


def write_drops(path: Path, drops: Iterable[Drop]) -> None:
    """One row a reason."""
    with Writer(path, _DROPS) as writer:
        waiting: list[Drop] = []
        for drop in drops:
            waiting.append(drop)
            if len(waiting) == _ROWS_AT_A_TIME:
                writer.write(_columns(waiting))
                waiting.clear()
        writer.write(_columns(waiting))


def read_drops(path: Path) -> Iterator[Drop]:
    """The drops of a file, in order."""
    for batch in pq.ParquetFile(path).iter_batches(_ROWS_AT_A_TIME):
        yield from (Drop(**row) for row in batch.to_pylist())


def _columns(drops: Sequence[Drop]) -> dict[str, list[Any]]:
    rows = [asdict(drop) for drop in drops]
    return {one.name: [row[one.name] for row in rows] for one in fields(Drop)}


def save(folder: Path, **arrays: npt.NDArray[Any]) -> None:
    """Each array as a file of its own, which can be mapped."""
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array, allow_pickle=False)


def load(folder: Path, name: str) -> npt.NDArray[Any]:
    """One array of a folder, mapped; empty ones are read."""
    path = folder / f"{name}.npy"
    try:
        found: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError:
        # Nothing cannot be mapped.
        found = np.load(path, allow_pickle=False)
    return found

"""Token rows on disk, and the order in which training reads them.

Axes: N rows, S tokens of a row.

A document is packed as BOS, its tokens, EOS. Documents follow one another and are cut into rows
of one length, so that a row may begin inside a document. A held-out row that is not full ends in
BOS tokens; a target that is BOS is never scored, so padding costs nothing.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.errors import DataError
from configs.seed import derive

_COLUMN = "tokens"

Int64 = npt.NDArray[np.int64]


def write_rows(
    folder: str | Path, rows: npt.NDArray[np.integer], *, rows_per_shard: int = 65536
) -> None:
    """Write `rows` [N, S] as Arrow IPC files `00000.arrow`, ...: a fixed-size list `tokens`.

    Tokens of a file are stored as uint16 when every id fits, else as int32.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    for shard, start in enumerate(range(0, len(rows), rows_per_shard)):
        write_shard(target / shard_name(shard), rows[start : start + rows_per_shard])


def shard_name(number: int) -> str:
    """The file of a folder's shard; names sort as numbers do."""
    return f"{number:05}.arrow"


def write_shard(path: Path, rows: npt.NDArray[np.integer]) -> None:
    """Write `rows` [N, S] as one file."""
    fits = rows.size == 0 or int(rows.max()) < 1 << 16
    values = pa.array(rows.reshape(-1).astype(np.uint16 if fits else np.int32))
    column = pa.FixedSizeListArray.from_arrays(values, rows.shape[1])
    batch = pa.RecordBatch.from_arrays([column], names=[_COLUMN])
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, batch.schema) as writer:
        writer.write_batch(batch)


class Rows:
    """The rows of a folder that `write_rows` filled, mapped into memory and read on demand."""

    def __init__(self, folder: str | Path) -> None:
        """Map every shard; DataError if the folder has none."""
        paths = sorted(Path(folder).glob("*.arrow"))
        if not paths:
            raise DataError(f"{folder}: no .arrow files, so there are no rows; rebuild the corpus")
        self._shards = [_map_shard(path) for path in paths]
        self._ends = np.cumsum([len(shard) for shard in self._shards])
        self.sequence_tokens = int(self._shards[0].shape[1])

    def __len__(self) -> int:
        """Rows in all shards."""
        return int(self._ends[-1])

    def take(self, indices: npt.NDArray[np.integer]) -> Int64:
        """The rows at `indices` [N], in that order, as int64 [N, S]; IndexError beyond the end."""
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= int(wanted.min()) <= int(wanted.max()) < len(self):
            raise IndexError(f"rows {wanted.min()}..{wanted.max()} asked, {len(self)} exist")
        out = np.empty((len(wanted), self.sequence_tokens), dtype=np.int64)
        shard_of = np.searchsorted(self._ends, wanted, side="right")
        for number in np.unique(shard_of):
            here = shard_of == number
            first = int(self._ends[number]) - len(self._shards[number])
            out[here] = self._shards[number][wanted[here] - first]
        return out


def row_order(total_rows: int, start: int, count: int, *, seed: int) -> Int64:
    """Row indices of the training sequences number `start` .. `start + count`.

    The first pass reads rows in the order they were packed, which holds the mixture; each later
    pass is a permutation of its own. A pure function, so that a loader's position is one number.
    """
    if total_rows < 1:
        raise DataError(f"a corpus of {total_rows} rows cannot be trained on; rebuild it")
    parts = [np.empty(0, dtype=np.int64)]
    position, end = start, start + count
    while position < end:
        epoch, first = divmod(position, total_rows)
        stop = min(total_rows, first + end - position)
        parts.append(_epoch_order(total_rows, epoch, seed=seed)[first:stop])
        position += stop - first
    return np.concatenate(parts)


def consumed_rows(total_rows: int, sequences_seen: int, *, seed: int) -> Int64:
    """Row indices of every sequence seen so far, in order, repeats included."""
    return row_order(total_rows, 0, sequences_seen, seed=seed)


def _epoch_order(total_rows: int, epoch: int, *, seed: int) -> Int64:
    if epoch == 0:
        return np.arange(total_rows)
    return np.random.default_rng(derive(seed, "epoch", epoch)).permutation(total_rows)


def _map_shard(path: Path) -> npt.NDArray[np.integer]:
    """One shard as an array [N, S] over the mapped file."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    column = table.column(_COLUMN).combine_chunks()
    width: int = column.type.list_size
    values: npt.NDArray[np.integer] = column.flatten().to_numpy(zero_copy_only=True)
    return values.reshape(-1, width)

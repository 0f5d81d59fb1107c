"""The step behind the tokenizer, a shard at a time: texts become one stream of framed documents.

The streams of a source's shards, one after another, are the source's *stream*; row j of it is the
tokens from j S to (j + 1) S, wherever shards end. So each row can be fetched by its number, and
which worker made what bears on nothing.

Axes: N rows, S tokens of a row.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from configs.data import PackConfig
from configs.seed import derive
from stages.data.bulk import bulk_encoder
from stages.data.drops import SHOWN_CHARS, Drop
from stages.data.pack import Int32, best_fit_rows, fill_in_middle, frame, is_fim
from stages.data.tables import DOCUMENTS, DROPS, batches, write_drops
from stages.names import TOKENIZER
from stages.tokens import load_tokenizer, read_record

REVISION = 1
STREAM = "tokens.bin"
SHORT = "min_document_tokens"
"""Why a document is left out: it has fewer tokens than are asked for, framing included."""
_TOKEN = np.dtype("<i4")
_OPEN_FILES = 64
CHECKED_DOCUMENTS, CHECKED_CHARS = 100, 2_000
"""On the beginnings of so many documents of each shard a faster encoder must agree with the one
that defines."""


@dataclass(frozen=True)
class Encode:
    """Which texts are encoded, and how."""

    source: str
    shard: Path
    """What `clean.py` made of it."""
    tokenizer: Path
    """The folder that holds `tokenizer.json`."""
    encoder: Literal["tokenizers", "gigatoken"]
    pack: PackConfig
    sequence_tokens: int
    fim: tuple[int, int, int] | None
    """The control tokens of filling in the middle."""
    seed: int

    def key(self) -> dict[str, Any]:
        """All that bears on what comes of it, besides the shard and the tokenizer."""
        return {
            "revision": REVISION,
            "source": self.source,
            "pack": self.pack.model_dump(mode="json"),
            "length": self.sequence_tokens if self.pack.method == "best-fit" else None,
            "seed": self.seed if self.fim else None,
        }

    def __call__(self, out: Path) -> Mapping[str, Any]:
        """Encode the shard into the folder `out`; what was counted."""
        counts = {"documents": 0, "bytes": 0, "tokens": 0, "short_documents": 0, "fim_documents": 0}
        chosen: list[str] = []
        short: list[Drop] = []
        documents = self._framed(counts, chosen, short)
        if self.pack.method == "best-fit":
            blocks: Iterable[Int32] = best_fit_rows(documents, sequence_tokens=self.sequence_tokens)
        else:
            blocks = documents
        counts["tokens"] = write_stream(out / STREAM, blocks)
        write_drops(out / DROPS, short)
        return counts | {"encoder": chosen[0] if chosen else "nothing to encode"}

    def _framed(
        self, counts: dict[str, int], chosen: list[str], short: list[Drop]
    ) -> Iterator[Int32]:
        """The documents as they are packed; those that are too `short` for it are not."""
        least = self.pack.min_document_tokens
        encode: Callable[[Sequence[str]], list[Int32]] | None = None
        for batch in batches(self.shard / DOCUMENTS, "id", "key", "text"):
            if encode is None:
                encode, told = _encoder(self.tokenizer, self.encoder, batch["text"])
                chosen.append(told)
            counts["bytes"] += sum(len(text.encode()) for text in batch["text"])
            columns = (batch["id"], batch["key"], batch["text"], encode(batch["text"]))
            for name, key, text, token_ids in zip(*columns, strict=True):
                framed = frame(self._filled(name, token_ids, counts))
                if len(framed) < least:
                    start = text[:SHOWN_CHARS]
                    short.append(Drop(self.source, name, SHORT, len(framed), least, start, key=key))
                    counts["short_documents"] += 1
                    continue
                counts["documents"] += 1
                yield framed

    def _filled(self, name: str, token_ids: Int32, counts: dict[str, int]) -> Int32:
        """The document with its middle to be filled in, if it is drawn for that."""
        if self.fim is None or not is_fim(self.seed, f"{self.source}/{name}", self.pack.fim_rate):
            return token_ids
        counts["fim_documents"] += 1
        seed = derive(self.seed, "data", self.source, "fim", name)
        return fill_in_middle(token_ids, self.fim, seed=seed)


def _encoder(
    folder: Path, kind: Literal["tokenizers", "gigatoken"], texts: Sequence[str]
) -> tuple[Callable[[Sequence[str]], list[Int32]], str]:
    """What encodes, and why it was chosen."""
    tokenizer, record = _loaded(folder / TOKENIZER)
    check = [text[:CHECKED_CHARS] for text in texts[:CHECKED_DOCUMENTS]]
    return bulk_encoder(record, tokenizer, kind, check)


@lru_cache(maxsize=1)
def _loaded(path: Path) -> tuple[Tokenizer, Mapping[str, Any]]:
    return load_tokenizer(path), read_record(path)


def write_stream(path: Path, blocks: Iterable[Int32]) -> int:
    """Write tokens as a stream; how many."""
    total = 0
    with path.open("wb") as file:
        for block in blocks:
            total += block.size
            file.write(block.astype(_TOKEN, copy=False).tobytes())
    return total


class Stream:
    """Rows of the streams of some shards, read by number."""

    def __init__(self, paths: Sequence[Path], sequence_tokens: int) -> None:
        """Of files that hold tokens."""
        self._paths, self._width = paths, sequence_tokens
        sizes = [path.stat().st_size // _TOKEN.itemsize for path in paths]
        self._ends = np.cumsum([0, *sizes])
        self.tokens = int(self._ends[-1])

    def __len__(self) -> int:
        """Whole rows."""
        return self.tokens // self._width

    def take(self, rows_N: npt.NDArray[np.integer]) -> Int32:
        """These rows [N, S], in the order asked."""
        out = np.empty((len(rows_N), self._width), np.int32)
        with ExitStack() as stack:
            reader = _Reader(self._paths, stack)
            for at in np.argsort(rows_N, kind="stable").tolist():
                self._read(reader, int(rows_N[at]) * self._width, out[at])
        return out

    def _read(self, reader: "_Reader", start: int, row: Int32) -> None:
        """Fill a row from the token `start` on, through as many files as it spans."""
        shard = int(np.searchsorted(self._ends, start, side="right")) - 1
        filled = 0
        while filled < len(row):
            count = min(len(row) - filled, int(self._ends[shard + 1]) - start)
            if count:
                first = start - int(self._ends[shard])
                reader.read(shard, first, row[filled : filled + count])
            filled, start, shard = filled + count, start + count, shard + 1


class _Reader:
    """Reads parts of files in the order of the files, few of which are open at a time."""

    def __init__(self, paths: Sequence[Path], stack: ExitStack) -> None:
        self._paths, self._stack = paths, stack
        self._open: dict[int, io.FileIO] = {}

    def read(self, number: int, first: int, part: Int32) -> None:
        """Fill `part` with the file's tokens from `first` on."""
        # Read, not mapped: mapped pages would count as memory long after they were used.
        if number not in self._open:
            if len(self._open) == _OPEN_FILES:
                self._open.pop(min(self._open)).close()
            opened = self._stack.enter_context(io.FileIO(self._paths[number]))
            self._open[number] = opened
        file = self._open[number]
        file.seek(first * _TOKEN.itemsize)
        view = part.view(np.uint8)
        if file.readinto(view.data) != len(view):
            raise OSError(f"{self._paths[number]} ends before its last token")

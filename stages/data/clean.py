"""The step that leaves out of a shard what is dropped, and cuts what training may not hold.

Cut is what repeats an earlier paragraph, or stands in anything that is held out.

The held-out side stays as it is, since what is measured should not depend on what is trained on.
A folder of this step holds the training documents in the order in which they are packed
(`documents.arrow`), every reason so far (`drops.parquet`), and what there is to know of each
document that stayed, on whichever side (`documents.parquet`).
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from configs.seed import derive
from stages.data.apart import HeldOut
from stages.data.cutting import Cleaner, Counts, Training
from stages.data.dedup import EXACT, NEAR
from stages.data.drops import SHOWN_CHARS, Drop
from stages.data.join import Int64, shard_of
from stages.data.tables import (
    DOCUMENTS,
    DROPS,
    KEPT,
    Texts,
    Writer,
    batches,
    load,
    open_table,
    read_drops,
    write_drops,
)
from stages.overlap import Span

REVISION = 2
RULES = {EXACT: "exact_duplicate", NEAR: "near_duplicate"}
_BLOCK_CHARS = 1_000_000
"""So much text is searched and written at a time."""
_SCHEMA = pa.schema([("id", pa.string()), ("key", pa.string()), ("text", pa.large_string())])


@dataclass(frozen=True)
class Clean:
    """Which shard is cleaned, by what was decided of it. All documents are numbered across the
    shards of all sources, of which this is number `at`."""

    source: str
    number: int
    """Among the shards of its source."""
    at: int
    folders: tuple[Path, ...]
    """What `extract.py` made of every shard."""
    offsets: tuple[int, ...]
    """The number of each shard's first document, and the number of all behind the last."""
    decided: Path
    """Fates, sides, paragraphs to be cut, and what is held out."""
    names: tuple[str, ...]
    """The source of every shard."""
    min_chars: int
    min_jaccard: float
    seed: int

    def __call__(self, out: Path) -> Mapping[str, Any]:
        """Clean the shard into the folder `out`; what was counted."""
        first, last = self.offsets[self.at], self.offsets[self.at + 1]
        extracted = self.folders[self.at]
        fates = np.asarray(load(self.decided, "fates")[first:last])
        held = np.asarray(load(self.decided, "held_out")[first:last])
        counts = Counts(Counter(drop.rule for drop in read_drops(extracted / DROPS)))
        counts.dropped += Counter(RULES[int(fate)] for fate in fates if fate)
        apart = HeldOut.open(self.decided)
        cleaner = Cleaner(apart, self._paragraphs(), self.source, self.min_chars, counts)
        drops = [*read_drops(extracted / DROPS), *self._repeats(fates, first)]
        gone: set[int] = set()
        with Writer(out / DOCUMENTS, _SCHEMA) as writer:
            for block in _in_blocks(self._training(fates, held, first)):
                kept: dict[str, list[str]] = {"id": [], "key": [], "text": []}
                for one, (less, why) in zip(block, cleaner.clean(block), strict=True):
                    drops += why
                    if less is None:
                        gone.add(one.number - first)
                    else:
                        kept["id"].append(one.id)
                        kept["key"].append(one.key)
                        kept["text"].append(less)
                        counts.kept(less)
                writer.write(kept)
        write_drops(out / DROPS, drops)
        told = self._write_kept(out, fates, held, gone)
        apart.save(out)
        return counts.facts() | told | {"held_out": int((held & (fates == 0)).sum())}

    def _training(self, fates: Any, held: Any, first: int) -> Iterator[Training]:
        """The documents to train on, shuffled."""
        rows = np.flatnonzero((fates == 0) & ~held)
        seed = derive(self.seed, "data", self.source, "documents", self.number)
        order = np.random.default_rng(seed).permutation(len(rows))
        path = self.folders[self.at] / DOCUMENTS
        names, texts = open_table(path, "id", "key").to_pydict(), Texts(path)
        for row in rows[order].tolist():
            yield Training(first + row, names["id"][row], names["key"][row], texts[row])

    def _repeats(self, fates: Any, first: int) -> Iterator[Drop]:
        """The drops of documents that repeat others."""
        numbers = np.flatnonzero(fates) + first
        of, values = load(self.decided, "of")[numbers], load(self.decided, "values")[numbers]
        names = self._names(of)
        here = open_table(self.folders[self.at] / DOCUMENTS, "id", "key")
        texts = Texts(self.folders[self.at] / DOCUMENTS)
        for number, value, name in zip(numbers.tolist(), values.tolist(), names, strict=True):
            row = number - first
            fate = int(fates[row])
            yield Drop(
                self.source,
                here.column("id")[row].as_py(),
                RULES[fate],
                value,
                self.min_jaccard if fate == NEAR else None,
                texts[row][:SHOWN_CHARS],
                of=name,
                key=here.column("key")[row].as_py(),
            )

    def _names(self, numbers: Int64) -> list[str]:
        """`source/document` of each number."""
        shards = shard_of(numbers, self.offsets)
        tables = {
            shard: open_table(self.folders[shard] / DOCUMENTS, "id").column("id")
            for shard in np.unique(shards).tolist()
        }
        return [
            f"{self.names[shard]}/{tables[shard][number - self.offsets[shard]].as_py()}"
            for number, shard in zip(numbers.tolist(), shards.tolist(), strict=True)
        ]

    def _paragraphs(self) -> dict[int, list[tuple[Span, str]]]:
        """By document, the paragraphs to be cut, and who has them first."""
        cuts = load(self.decided, "cuts")
        first, last = np.searchsorted(
            cuts[:, 1], [self.offsets[self.at], self.offsets[self.at + 1]], side="left"
        )
        mine = np.asarray(cuts[first:last])
        if not len(mine):
            return {}
        spans = load(self.folders[self.at], "paragraph_spans")
        begin = int(load(self.decided, "paragraphs")[self.at])
        found: dict[int, list[tuple[Span, str]]] = {}
        for (number, document, _), name in zip(mine.tolist(), self._names(mine[:, 2]), strict=True):
            _, start, end = spans[number - begin].tolist()
            found.setdefault(document, []).append(((start, end), name))
        return found

    def _write_kept(self, out: Path, fates: Any, held: Any, gone: set[int]) -> dict[str, Any]:
        """One row for each document that is trained on or held out; what they say of themselves."""
        source = self.folders[self.at] / DOCUMENTS
        columns = ("id", "key", "licence", "timestamp", "measures")
        measures = open_table(source).schema.field("measures").type
        plain = [(name, pa.string()) for name in ("source", "document", *columns[1:4], "side")]
        schema = pa.schema([*plain, ("chars", pa.int64()), ("measures", measures)])
        chars = load(self.folders[self.at], "chars")
        row, licences, written = 0, Counter[str](), set[str]()
        with Writer(out / KEPT, schema) as writer:
            for batch in batches(source, *columns):
                numbers = range(row, row + len(batch["id"]))
                row += len(numbers)
                some = [n - numbers[0] for n in numbers if not fates[n] and n not in gone]
                kept = {name: [batch[name][at] for at in some] for name in columns}
                licences.update(kept["licence"])
                known = [*filter(None, kept["timestamp"]), *written]
                written = {min(known), max(known)} if known else set()
                writer.write(
                    {
                        **{name: kept[name] for name in columns[1:]},
                        "source": [self.source] * len(some),
                        "document": kept["id"],
                        "side": ["held_out" if held[numbers[0] + at] else "train" for at in some],
                        "chars": [int(chars[numbers[0] + at]) for at in some],
                    }
                )
        return {"licences": dict(sorted(licences.items())), "written": sorted(written)}


def _in_blocks(documents: Iterator[Training]) -> Iterator[list[Training]]:
    """Some documents at a time."""
    block: list[Training] = []
    size = 0
    for one in documents:
        block.append(one)
        size += len(one.text)
        if size >= _BLOCK_CHARS:
            yield block
            block, size = [], 0
    if block:
        yield block

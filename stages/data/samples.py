"""A few documents of each fate, for people to look at: kept, and dropped or cut by each rule."""

import heapq
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from cluster.shards import Done
from configs.seed import derive
from stages.data.tables import DOCUMENTS, DROPS, KEPT, batches, read_drops

SAMPLES = "samples.jsonl"
EACH = 5
"""As many of each."""
SHOWN_CHARS = 400
_ROWS_A_TIME = 1024

Ranked = tuple[int, str, int, dict[str, Any]]
"""Least first: minus the rank, the document, a number that no other has, and what is said."""


def write_samples(out: Path, cleaned: Sequence[Done], others: Sequence[Path]) -> None:
    """Write one line a sample: rule (`kept` for those that stayed), source, document, numbers, and
    the beginning of the text; of the cleaned shards, and of folders of further drops. Which they
    are is drawn by their names."""
    chosen: dict[str, list[Ranked]] = {}
    number = itertools.count()
    for at, folder in enumerate([*(done.folder for done in cleaned), *others]):
        for rule, rank, facts in _found(folder):
            facts["shard"] = at
            ranked = (-rank, f"{facts['source']}/{facts['document']}", next(number), facts)
            heap = chosen.setdefault(rule, [])
            if len(heap) < EACH:
                heapq.heappush(heap, ranked)
            elif ranked[:2] > heap[0][:2]:
                heapq.heapreplace(heap, ranked)
    _add_texts(chosen.get("kept", []), cleaned)
    with (out / SAMPLES).open("w", encoding="utf-8") as file:
        for rule, heap in sorted(chosen.items()):
            for *_, facts in sorted(heap, key=lambda one: (-one[0], *one[1:3])):
                del facts["shard"]
                file.write(json.dumps({"rule": rule, **facts}, ensure_ascii=False) + "\n")


def _found(folder: Path) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Rule, rank and facts of every document of a shard."""
    for drop in read_drops(folder / DROPS):
        facts = {
            "source": drop.source,
            "document": drop.document,
            "value": drop.value,
            "threshold": drop.threshold,
            "of": drop.of,
            "text": drop.start or drop.reason,
        }
        yield drop.rule, _rank(drop.source, drop.document), facts
    if not (folder / KEPT).exists():
        return
    columns = ["source", "document", "side", "chars"]
    for batch in pq.ParquetFile(folder / KEPT).iter_batches(_ROWS_A_TIME, columns=columns):
        for row in batch.to_pylist():
            if row["side"] == "train":
                yield "kept", _rank(row["source"], row["document"]), row


def _rank(source: str, document: str) -> int:
    return derive(0, "sample", source, document)


def _add_texts(heap: Sequence[Ranked], cleaned: Sequence[Done]) -> None:
    """Give samples of kept documents the beginning of their texts, as they are trained on."""
    for at in {facts["shard"] for *_, facts in heap}:
        wanted = {f["document"]: f for *_, f in heap if f["shard"] == at}
        for batch in batches(cleaned[at].folder / DOCUMENTS, "id", "text"):
            for name, text in zip(batch["id"], batch["text"], strict=True):
                if name in wanted:
                    wanted[name]["text"] = text[:SHOWN_CHARS]

"""Writes the artifact from what the steps left."""

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from cluster.shards import Done
from stages.data.card import write_card
from stages.data.clean import RULES
from stages.data.decide import Shards
from stages.data.drops import Drop
from stages.data.pack import Int32
from stages.data.questions import Posed
from stages.data.rows_out import ROWS, Mixed
from stages.data.samples import write_samples
from stages.data.tables import DROPS, KEPT, Writer, read_drops
from stages.names import TOKENIZER
from stages.shards import shard_name, write_rows
from stages.tokens import write_tokenizer
from stages.verifiers import write_problems

INDEX = "index.json"
DUPLICATES = "duplicates.parquet"
_CLUSTERS = pa.schema(
    [
        ("kept", pa.string()),
        ("document", pa.string()),
        ("rule", pa.string()),
        ("jaccard", pa.float64()),
    ]
)
_ROWS_A_TIME = 1024


@dataclass(frozen=True, slots=True)
class Made:
    """What the steps left."""

    shards: Shards
    cleaned: Sequence[Done]
    posed: Mapping[str, Posed]
    posed_apart: Mapping[str, Path]
    mixed: Mixed
    held_out: Mapping[str, Int32]
    tokenizer: Mapping[str, Any]


def publish(out: Path, made: Made, facts: Mapping[str, Any]) -> None:
    """Write the corpus into the folder `out`; its files are those of `stages.artifacts.Corpus`."""
    mixed, posed = made.mixed, made.posed
    (out / "train").mkdir()
    index = []
    for number, done in enumerate(mixed.shards):
        name = shard_name(number)
        put(done.folder / ROWS, out / "train" / name)
        index.append({"file": name, "rows": done.facts["rows"]})
    record = {"sequence_tokens": mixed.sequence_tokens, "shards": index}
    (out / "train" / INDEX).write_text(json.dumps(record, indent=2) + "\n")
    for name, block in made.held_out.items():
        write_rows(out / "held_out" / name, block)
    write_problems(
        out / "problems" / "train.parquet",
        [one for some in posed.values() for one in some.train_problems],
    )
    write_problems(
        out / "problems" / "held_out.parquet",
        [one for some in posed.values() for one in some.held_out],
    )
    write_tokenizer(out / TOKENIZER, made.tokenizer)
    (out / "drops").mkdir()
    (out / "documents").mkdir()
    shards = made.shards
    for done, source, number in zip(made.cleaned, shards.names, shards.numbers, strict=True):
        name = f"{source}-{number:05}.parquet"
        put(done.folder / DROPS, out / "drops" / name)
        put(done.folder / KEPT, out / "documents" / name)
    for source, folder in made.posed_apart.items():
        put(folder / DROPS, out / "drops" / f"{source}-{0:05}.parquet")
    for number, folder in enumerate(mixed.short):
        put(folder / DROPS, out / "drops" / f"too-short-{number:05}.parquet")
    _write_duplicates(out / DUPLICATES, made.cleaned)
    (out / "statistics.json").write_text(json.dumps(facts, indent=2) + "\n")
    write_samples(out, made.cleaned, [*made.posed_apart.values(), *mixed.short])
    write_card(out, facts)


def put(source: Path, target: Path) -> None:
    """Have a file at `target` too, without a second copy of its bytes where the disk can."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def _write_duplicates(path: Path, cleaned: Sequence[Done]) -> None:
    """Who repeats whom: one row for each document that went, by the one that stayed."""
    with Writer(path, _CLUSTERS) as writer:
        waiting: list[Drop] = []
        for drop in _repeats(cleaned):
            waiting.append(drop)
            if len(waiting) == _ROWS_A_TIME:
                writer.write(_columns(waiting))
                waiting.clear()
        writer.write(_columns(waiting))


def _repeats(cleaned: Sequence[Done]) -> Iterator[Drop]:
    rules = set(RULES.values())
    for done in cleaned:
        yield from (drop for drop in read_drops(done.folder / DROPS) if drop.rule in rules)


def _columns(drops: Sequence[Drop]) -> dict[str, list[Any]]:
    return {
        "kept": [drop.of for drop in drops],
        "document": [f"{drop.source}/{drop.document}" for drop in drops],
        "rule": [drop.rule for drop in drops],
        "jaccard": [drop.value for drop in drops],
    }

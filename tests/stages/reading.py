"""Reads a source as the data stage does, with rules that let everything pass."""

import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from configs.data import DataConfig, FilesSource, StdlibSource, TextSource
from stages.data.drops import Drop
from stages.data.files import Document
from stages.data.inputs import inputs_of
from stages.data.reading import read_sources
from stages.data.shop import Shop
from stages.data.tables import DOCUMENTS, DROPS, batches, read_drops
from stages.hashing import Hashes
from tests.conftest import Recorder, workspace_at

EVERYTHING = {
    "normalise": "none",
    "min_chars": 0,
    "max_chars": 10**9,
    "max_control_share": 1,
    "max_repeated_line_share": 1,
    "min_letter_share": 0,
    "max_line_chars": 10**9,
}


@dataclass(frozen=True, slots=True)
class Reading:
    """What one source gave, and what its `max_bytes` kept out."""

    documents: list[Document]
    unread_files: int
    unread_bytes: int
    broken: list[Drop]


def read_source(
    name: str, source: TextSource, hashes: Hashes, *, seed: int = 0, shard_bytes: int = 10**6
) -> Reading:
    """Every document of a source, and what was set aside."""
    root = Path(tempfile.mkdtemp())
    try:
        work = replace(workspace_at(root / "slot", Recorder()), hashes=hashes)
        spec = DataConfig.model_validate(
            {"sources": {name: source}, "train_tokens": 1, "quality": EVERYTHING}
        )
        inputs = inputs_of(name, source, hashes, shard_bytes=shard_bytes, seed=seed)
        read = read_sources(spec, {name: inputs}, Shop(work, 1))[name]
        columns = ("id", "text", "key", "licence", "timestamp")
        documents = [
            Document(name, *row)
            for done in read.shards
            for batch in batches(done.folder / DOCUMENTS, *columns)
            for row in zip(*(batch[column] for column in columns), strict=True)
        ]
        broken = [drop for done in read.shards for drop in read_drops(done.folder / DROPS)]
        return Reading(documents, read.unread_files, read.unread_bytes, broken)
    finally:
        shutil.rmtree(root)


def read_files(name: str, source: FilesSource, hashes: Hashes) -> Reading:
    """Of files."""
    return read_source(name, source, hashes)


def read_stdlib(name: str, source: StdlibSource, *, seed: int) -> Reading:
    """Of the standard library."""
    return read_source(name, source, Hashes(), seed=seed)

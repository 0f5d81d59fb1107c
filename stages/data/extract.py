"""The first step: reads a shard, judges its documents, and takes down what they are compared by.

A folder of this step holds the documents that passed (`documents.arrow`), a record of each that did
not (`drops.parquet`), and of the documents, numbered as they stand there:

    digests [N, 2] uint64       equal for equal documents
    id_keys uint64              hashes of the documents' own ids, of those that have one
    chars [N] int64             how long each text is
    bands_keys, bands_rows      entries of MinHash (see `join.py`), where near-duplicates are sought
    sketch_keys, sketch_rows    entries of sampled windows (see `stages/overlap.py`)
    sketch_sizes [N] int64      how many of these each document has
    paragraphs_keys, ..._rows   entries of paragraphs, by number, where these are compared
    paragraph_spans [P, 3]      of each paragraph its document, and where it begins and ends
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from configs.data import DedupConfig, FilesSource, QualityConfig, TextSource
from stages.data.dedup import digest
from stages.data.drops import SHOWN_CHARS, Drop
from stages.data.faults import Broken
from stages.data.files import Document, read_documents
from stages.data.inputs import InputFile, InputShard, decode_python
from stages.data.join import save_entries
from stages.data.minhash import band_keys, signatures
from stages.data.paragraphs import paragraphs
from stages.data.quality import judge_all, normalise, rules
from stages.data.tables import DOCUMENTS, DROPS, Writer, save, write_drops
from stages.overlap import sketches
from stages.rolling import mixed

REVISION = 1
"""Raised whenever this step makes something else of the same input."""
_BLOCK_BYTES = 2_000_000
"""So much text is judged, compared and written at a time."""
FIELDS = ("key", "licence", "timestamp")
"""What documents may say of themselves; it is counted how many do."""
_FIRST_BROKEN = 3
"""So many broken places are told in an error."""

Uint64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Extract:
    """What a shard is read for, and how far."""

    source: TextSource
    shard: InputShard
    quality: QualityConfig
    dedup: DedupConfig
    limit_bytes: int
    """No more text than this is read."""

    def key(self) -> dict[str, Any]:
        """All that bears on what comes of it, as JSON values."""
        left_out = {"glob", "share", "max_bytes", "max_epochs", "quality", "max_broken_share"}
        asked = self.source.model_dump(mode="json", exclude=left_out)
        dedup: dict[str, int] = {"near": self.dedup.near, "paragraphs": self.dedup.paragraphs}
        if self.dedup.paragraphs:
            dedup["min_paragraph_chars"] = self.dedup.min_paragraph_chars
        return {
            "step": "extract",
            "revision": REVISION,
            "name": self.shard.source,
            "source": asked,
            "files": [[file.label, file.bytes, file.version] for file in self.shard.files],
            "quality": self.quality.model_dump(mode="json"),
            "dedup": dedup,
            "limit_bytes": self.limit_bytes,
        }

    def __call__(self, out: Path) -> Mapping[str, Any]:
        """Read the shard into the folder `out`; what was counted."""
        keeper = _Keeper(self.quality, self.dedup)
        # One row group at a time, as drops come: of a bad source there may be as many as rows.
        with Writer(out / DOCUMENTS, documents_schema(self.quality)) as writer:
            write_drops(out / DROPS, self._drops(writer, keeper))
        keeper.save(out)
        return keeper.facts()

    def _drops(self, writer: Writer, keeper: "_Keeper") -> Iterator[Drop]:
        """Write what passes; what does not."""
        block: list[Document] = []
        size = 0
        for found in self._read(keeper):
            if isinstance(found, Broken):
                yield from keeper.set_aside(found)
                continue
            block.append(found)
            size += len(found.text)
            if size >= _BLOCK_BYTES:
                yield from keeper.sift(block, writer)
                block, size = [], 0
        yield from keeper.sift(block, writer)

    def _read(self, keeper: "_Keeper") -> Iterator[Document | Broken]:
        """What the files hold, until there is too much of it."""
        left_bytes = self.limit_bytes
        for file in self.shard.files:
            for found in self._documents(file):
                if isinstance(found, Document):
                    size = len(found.text.encode("utf-8", "surrogatepass"))
                    left_bytes -= size
                    if left_bytes < 0:
                        keeper.is_cut = True
                        return
                    keeper.read["bytes"] += size
                    keeper.read["documents"] += 1
                yield found
            keeper.read["files"] += 1

    def _documents(self, file: InputFile) -> Iterator[Document | Broken]:
        name = self.shard.source
        if isinstance(self.source, FilesSource):
            known = {"bytes": file.bytes, "sha256": file.version}
            yield from read_documents(name, self.source, file.path, file.label, known)
        else:
            yield Document(name, file.label, decode_python(Path(file.path)))


def documents_schema(quality: QualityConfig) -> pa.Schema:
    """Columns of `documents.arrow`: what a document is, and what was measured of it."""
    measures = pa.struct([(rule, pa.float64()) for rule in rules(quality)])
    return pa.schema(
        [
            ("id", pa.string()),
            ("key", pa.string()),
            ("licence", pa.string()),
            ("timestamp", pa.string()),
            ("text", pa.large_string()),
            ("measures", measures),
        ]
    )


@dataclass
class _Keeper:
    """Sifts documents, and remembers of those it keeps what they are compared by."""

    quality: QualityConfig
    dedup: DedupConfig
    read: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    firsts: list[dict[str, Any]] = field(default_factory=list)
    is_cut: bool = False
    count: int = 0
    digests: list[bytes] = field(default_factory=list)
    ids: list[bytes] = field(default_factory=list)
    chars: list[int] = field(default_factory=list)
    bands: list[Uint64] = field(default_factory=list)
    sketched: list[Uint64] = field(default_factory=list)
    spans: list[npt.NDArray[np.int64]] = field(default_factory=list)
    paragraph_keys: list[Uint64] = field(default_factory=list)

    def set_aside(self, broken: Broken) -> Iterator[Drop]:
        """The record of what could not be read."""
        self.read["broken_bytes"] += broken.bytes
        self.dropped[broken.rule] += 1
        if len(self.firsts) < _FIRST_BROKEN:
            self.firsts.append(
                {"place": broken.place, "rule": broken.rule, "reason": broken.reason}
            )
        yield Drop(broken.source, broken.place, broken.rule, reason=broken.reason)

    def sift(self, block: Sequence[Document], writer: Writer) -> Iterator[Drop]:
        """Write the documents of a block that pass the rules; those that do not."""
        normal = [normalise(document.text, self.quality) for document in block]
        self.read["normalised"] += sum(
            text != one.text for one, text in zip(block, normal, strict=True)
        )
        judged = judge_all(normal, self.quality)
        kept = [document for document, one in zip(block, judged, strict=True) if one.rule is None]
        texts = [text for text, one in zip(normal, judged, strict=True) if one.rule is None]
        measured = [one.measures for one in judged if one.rule is None]
        for document, text, one in zip(block, normal, judged, strict=True):
            if one.rule is not None:
                self.dropped[one.rule] += 1
                yield Drop(
                    document.source,
                    document.id,
                    one.rule,
                    one.value,
                    one.threshold,
                    text[:SHOWN_CHARS],
                    key=document.key,
                )
        self._note(texts)
        self.ids += (_hash(one.key) for one in kept if one.key)
        for name in FIELDS:
            self.read[name] += sum(bool(getattr(one, name)) for one in block)
        writer.write(
            {
                "id": [one.id for one in kept],
                "key": [one.key for one in kept],
                "licence": [one.licence for one in kept],
                "timestamp": [one.timestamp for one in kept],
                "text": texts,
                "measures": measured,
            }
        )

    def _note(self, texts: Sequence[str]) -> None:
        """Take down what the texts are compared by."""
        self.digests += map(digest, texts)
        self.chars += map(len, texts)
        self.sketched += sketches(texts)
        if self.dedup.near and texts:
            self.bands.append(band_keys(signatures(texts)))
        if self.dedup.paragraphs:
            for number, text in enumerate(texts, self.count):
                spans, keys = paragraphs(text, self.dedup.min_paragraph_chars)
                self.paragraph_keys.append(keys)
                self.spans.append(np.c_[np.full(len(spans), number, np.int64), spans])
        self.count += len(texts)

    def save(self, out: Path) -> None:
        """Write what was taken down."""
        digests = np.frombuffer(b"".join(self.digests), np.uint64).reshape(-1, 2)
        sizes = np.array([len(one) for one in self.sketched], np.int64)
        save(out, id_keys=np.frombuffer(b"".join(self.ids), np.uint64))
        save(out, digests=digests, chars=np.array(self.chars, np.int64), sketch_sizes=sizes)
        # Sampled are windows of small hashes; mixed once more they fill the range of keys evenly.
        sketch = mixed(_joined(self.sketched))
        save_entries(out, "sketch", sketch, np.repeat(np.arange(self.count), sizes))
        if self.dedup.near:
            bands = _joined([one.reshape(-1) for one in self.bands])
            rows = np.repeat(np.arange(self.count), len(bands) // max(1, self.count))
            save_entries(out, "bands", bands, rows)
        if self.dedup.paragraphs:
            keys = _joined(self.paragraph_keys)
            save_entries(out, "paragraphs", keys, np.arange(len(keys)))
            empty = np.empty((0, 3), np.int64)
            save(out, paragraph_spans=np.concatenate([empty, *self.spans]))

    def facts(self) -> dict[str, Any]:
        """What was counted."""
        return {
            **{name: self.read[name] for name in ("files", "documents", "bytes", "broken_bytes")},
            "normalised": self.read["normalised"],
            "kept": self.count,
            "dropped": dict(sorted(self.dropped.items())),
            "fields": {name: self.read[name] for name in FIELDS},
            "broken": self.firsts,
            "is_cut": self.is_cut,
        }


def _joined(parts: Sequence[Uint64]) -> Uint64:
    return np.concatenate([np.empty(0, np.uint64), *parts])


def _hash(key: str) -> bytes:
    return hashlib.blake2b(key.encode("utf-8", "surrogatepass"), digest_size=8).digest()

"""Reads all text sources, shard by shard, no further than each source's `max_bytes`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.shards import Done
from configs.data import DataConfig, FilesSource, StdlibSource, TextSource
from configs.errors import DataError
from stages.data.extract import Extract
from stages.data.faults import BROKEN, Broken, require_unchanged, require_whole
from stages.data.inputs import Inputs, InputShard
from stages.data.reads import identify
from stages.data.shop import Shop

STEP = "read"


@dataclass
class Read:
    """What was read of one source."""

    source: TextSource
    inputs: Inputs
    shards: list[Done] = field(default_factory=list)
    """What `extract.py` made of each shard, in order."""
    left_bytes: int = 0
    is_over: bool = False
    unread_files: int = 0
    """Files that `max_bytes` kept from being read to their end."""
    unread_bytes: int = 0
    """Size of those files on disk."""

    def total(self, name: str) -> int:
        """The sum of a figure over the shards."""
        return sum(int(done.facts[name]) for done in self.shards)

    def counted(self, name: str) -> Counter[str]:
        """The sum of a table of figures over the shards."""
        return sum((Counter(done.facts[name]) for done in self.shards), Counter[str]())

    @property
    def broken(self) -> int:
        """Places that could not be read."""
        return sum(self.counted("dropped")[rule] for rule in BROKEN)

    def wave(self) -> Iterator[InputShard]:
        """Shards to read next: as many as have room, going by their size on disk."""
        left = self.left_bytes
        for shard in self.inputs.shards[len(self.shards) :]:
            yield shard
            left -= shard.bytes
            if left <= 0:
                return

    def stop(self, shard: InputShard, whole_files: int) -> None:
        """Read no more behind so many files of `shard`."""
        self.is_over = True
        later = [*shard.files[whole_files:]]
        for one in self.inputs.shards[shard.number + 1 :]:
            later += one.files
        self.unread_files += len(later)
        self.unread_bytes += sum(file.bytes for file in later)


def read_sources(spec: DataConfig, inputs: Mapping[str, Inputs], shop: Shop) -> dict[str, Read]:
    """What every text source holds, by name.

    DataError if a source changes meanwhile, or more of it is broken than it may be.
    """
    found = {}
    for name, one in inputs.items():
        source = spec.sources[name]
        assert isinstance(source, TextSource)
        found[name] = Read(source, one, left_bytes=source.max_bytes)
        found[name].unread_files, found[name].unread_bytes = one.unread_files, one.unread_bytes
    while any(not read.is_over for read in found.values()):
        asked = [
            (read, shard) for read in found.values() if not read.is_over for shard in read.wave()
        ]
        tasks = [_task(spec, read, shard, shop, read.source.max_bytes) for read, shard in asked]
        for (read, shard), done in zip(asked, shop.run(tasks), strict=True):
            _take(spec, read, shard, done, shop)
        for read in found.values():
            read.is_over |= len(read.shards) == len(read.inputs.shards)
    for name, read in found.items():
        if isinstance(read.source, FilesSource):
            known = read.inputs.known
            require_unchanged(
                name, read.source, known, identify(name, read.source, shop.work.hashes)
            )
            firsts = [one for done in read.shards for one in done.facts["broken"]]
            broken = [Broken(name, one["place"], one["rule"], one["reason"], 0) for one in firsts]
            lost, count = read.total("broken_bytes"), read.broken
            whole = sum(shard.bytes for shard in read.inputs.shards[: len(read.shards)])
            require_whole(name, read.source, lost, whole, broken, count=count)
    return found


def require_documents(name: str, read: Read, repeats: Mapping[str, int]) -> None:
    """DataError unless at least two documents are left, without those that repeat others, counted
    by rule: one to train on, one to hold out."""
    kept = read.total("kept") - sum(repeats.values())
    if kept >= 2:
        return
    match read.source:
        case FilesSource():
            field = f"glob = {read.source.glob!r}"
        case StdlibSource():
            field = f"max_bytes = {read.source.max_bytes}"
    dropped = sorted((read.counted("dropped") + Counter(repeats)).items())
    reasons = ", ".join(f"{count} by {rule}" for rule, count in dropped)
    raise DataError(
        f"data.sources.{name}.{field}: yields {kept} usable documents of "
        f"{read.total('documents')} read (dropped: {reasons or 'none'}), but training and held-out "
        f"text need one each; give more text (max_bytes = {read.source.max_bytes} now), or relax "
        "data.quality"
    )


def _task(spec: DataConfig, read: Read, shard: InputShard, shop: Shop, limit_bytes: int) -> Any:
    quality = read.source.quality or spec.quality
    extract = Extract(read.source, shard, quality, spec.dedup, limit_bytes)
    return shop.task(STEP, extract.key(), extract)


def _take(spec: DataConfig, read: Read, shard: InputShard, done: Done, shop: Shop) -> None:
    """Add a shard to what was read, as far as there is room for it."""
    if read.is_over:
        return
    if done.facts["bytes"] > read.left_bytes:
        # Where it ends is known only now: the shard is read again, and no further than that.
        (done,) = shop.run([_task(spec, read, shard, shop, read.left_bytes)], here=True)
    read.left_bytes -= done.facts["bytes"]
    read.shards.append(done)
    if done.facts["is_cut"]:
        read.stop(shard, done.facts["files"])
    elif read.left_bytes <= 0 and shard.number + 1 < len(read.inputs.shards):
        read.stop(shard, len(shard.files))

"""Decides over all shards what becomes of every document: who repeats another, who is held out.

Holds some 100 bytes a document in memory, and no text but what is held out.
"""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from configs.data import DataConfig
from stages.data import clean, dedup, held_out
from stages.data.apart import TEXT, Apart, write_apart
from stages.data.dedup import Fates, Float64
from stages.data.evaluations import read_items
from stages.data.join import Int64, buckets_for, link_bucket, shard_of, tally
from stages.data.questions import Posed
from stages.data.reading import Read
from stages.data.shop import Shop
from stages.data.tables import DOCUMENTS, Texts, load, save

REVISION = 2
DEDUP, DECIDE = "dedup", "decide"
_FEW_PAIRS = 2_000
"""So many are judged by this process: to travel would take longer."""


@dataclass(frozen=True, slots=True)
class Shards:
    """The shards of all sources, in the order in which their documents are numbered."""

    folders: tuple[Path, ...]
    names: tuple[str, ...]
    """Each one's source."""
    numbers: tuple[int, ...]
    """Each one's place among those of its source."""
    offsets: tuple[int, ...]
    """The number of each one's first document, and of all documents."""

    @classmethod
    def of(cls, reads: Mapping[str, Read]) -> "Shards":
        """Those that were read."""
        every = [(n, at, one) for n, read in reads.items() for at, one in enumerate(read.shards)]
        offsets = np.cumsum([0, *(one.facts["kept"] for _, _, one in every)]).tolist()
        return cls(
            tuple(one.folder for _, _, one in every),
            tuple(name for name, _, _ in every),
            tuple(at for _, at, _ in every),
            tuple(offsets),
        )

    @property
    def count(self) -> int:
        """Documents."""
        return self.offsets[-1]

    @property
    def begins(self) -> Int64:
        """The number of each shard's first document."""
        return np.array(self.offsets[:-1], np.int64)

    def gather(self, name: str) -> Any:
        """An array of all shards; of none, one without rows."""
        found = [load(folder, name) for folder in self.folders]
        return np.concatenate(found) if found else np.empty((0, 2), np.uint64)

    def texts(self, numbers: Int64) -> Iterator[tuple[str, str]]:
        """The source and the text of each of these documents."""
        found: dict[int, Texts] = {}
        for number, shard in zip(numbers, shard_of(numbers, self.begins), strict=True):
            at = int(shard)
            if at not in found:
                found[at] = Texts(self.folders[at] / DOCUMENTS)
            yield self.names[at], found[at][int(number) - self.offsets[at]]


@dataclass(frozen=True, slots=True)
class Decided:
    """What was decided."""

    folder: Path
    fates: Fates
    sides: held_out.Sides
    evaluations: Mapping[str, tuple[int, int]]
    """Items of each set, and how many are too short to be searched for."""


def decide(
    spec: DataConfig, shards: Shards, posed: Mapping[str, Posed], shop: Shop, *, seed: int
) -> Decided:
    """What becomes of each document, in a folder that every worker of the next step reads."""
    problems = [problem for one in posed.values() for problem in one.held_out]
    # Of problems that were read the answers are texts as well.
    told = [(n, text) for n, one in posed.items() if one.is_read for text in one.held_out_documents]
    digests = shards.gather("digests")
    fates = Fates.of(shards.count)
    if spec.dedup.exact:
        dedup.drop_equal(fates, digests)
    if spec.dedup.near:
        candidates, _ = _linked("bands", shards, fates, shop)
        judge = partial(_judge, shards, shop)
        dedup.drop_near(fates, candidates, judge, spec.dedup.min_jaccard)
    cuts, paragraphs = _paragraphs(spec, shards, fates, shop)
    pairs, counts = _linked("sketch", shards, fates, shop)
    corpus = held_out.Corpus(
        names := list(dict.fromkeys(shards.names)),
        np.repeat([names.index(name) for name in shards.names], np.diff(shards.offsets)),
        digests[:, 0],
        shards.gather("chars").reshape(-1).astype(np.int64),
        shards.gather("sketch_sizes").reshape(-1).astype(np.int64),
        fates.fate_N == dedup.KEPT,
    )
    sides = held_out.part(
        corpus,
        pairs,
        counts,
        spec.held_out_share,
        max_tokens=spec.max_held_out_tokens,
        seed=seed,
    )
    order = held_out.by_place(np.flatnonzero(sides.held_out_N), digests[:, 0], seed)
    read = {n: read_items(n, one, shop.work.hashes) for n, one in spec.evaluations.items()}
    items = {name: some for name, (some, _) in sorted(read.items())}

    def make(out: Path) -> Mapping[str, Any]:
        save(
            out,
            fates=fates.fate_N,
            of=fates.of_N,
            values=fates.value_N,
            held_out=sides.held_out_N,
            cuts=cuts,
            paragraphs=paragraphs,
        )
        write_apart(out, _apart(shards, order, told, items), problems)
        return {}

    key = {
        "revision": REVISION,
        "held_out": [spec.held_out_share, spec.max_held_out_tokens, seed],
        "dedup": spec.dedup.model_dump(mode="json"),
        "evaluations": _digest(repr(sorted(items.items()))),
        "problems": _digest(repr((problems, told))),
    }
    done = shop.one(DECIDE, key, make, *shards.folders)
    evaluations = {name: (len(some), short) for name, (some, short) in read.items()}
    return Decided(done.folder, fates, sides, evaluations)


def repeated_ids(shards: Shards, name: str) -> int:
    """How many documents of a source bear an id that an earlier one bears."""
    keys = [
        load(folder, "id_keys")
        for folder, of in zip(shards.folders, shards.names, strict=True)
        if of == name
    ]
    every = np.concatenate(keys)
    return len(every) - len(np.unique(every))


def repeats(shards: Shards, fates: Fates, name: str) -> Counter[str]:
    """How many of a source's documents repeat others, by rule."""
    found: Counter[str] = Counter()
    for at, of in enumerate(shards.names):
        if of == name:
            here = fates.fate_N[shards.offsets[at] : shards.offsets[at + 1]]
            found += Counter(
                {rule: int((here == fate).sum()) for fate, rule in clean.RULES.items()}
            )
    return found


def clean_tasks(spec: DataConfig, shards: Shards, decided: Path, shop: Shop, *, seed: int) -> Any:
    """One task for each shard, in order."""
    tasks = []
    for at, (name, number) in enumerate(zip(shards.names, shards.numbers, strict=True)):
        source = spec.sources[name]
        quality = getattr(source, "quality", None) or spec.quality
        make = clean.Clean(
            source=name,
            number=number,
            at=at,
            folders=shards.folders,
            offsets=shards.offsets,
            decided=decided,
            names=shards.names,
            min_chars=quality.min_chars,
            min_jaccard=spec.dedup.min_jaccard,
            seed=seed,
        )
        key = {"revision": clean.REVISION, "at": at, "min_chars": quality.min_chars}
        tasks.append(shop.task("clean", key, make, decided, reads=shards.folders))
    return tasks


def _linked(name: str, shards: Shards, fates: Fates, shop: Shop) -> tuple[Int64, Int64]:
    """Pairs [P, 2] of documents that share keys of this name, and how many keys each."""
    link = partial(link_bucket, name=name, offsets=shards.offsets[:-1])
    found = _bucket_by_bucket(name, link, shards, fates, shop)
    pairs = np.concatenate([load(folder, "pairs") for folder in found])
    return tally(pairs, np.concatenate([load(folder, "counts") for folder in found]))


def _bucket_by_bucket(
    name: str, work: Callable[..., Mapping[str, Any]], shards: Shards, fates: Fates, shop: Shop
) -> list[Path]:
    """What `work` makes of each bucket of the keys of this name."""
    alive = _alive(shards, fates, shop)
    buckets = buckets_for(shards.folders, name)
    tasks = []
    for bucket in range(buckets):
        key = {"revision": REVISION, "name": name, "bucket": [bucket, buckets]}
        make = partial(work, folders=shards.folders, bucket=bucket, buckets=buckets, alive=alive)
        tasks.append(shop.task(DEDUP, key, make, alive, reads=shards.folders))
    return [one.folder for one in shop.run(tasks)]


def _alive(shards: Shards, fates: Fates, shop: Shop) -> Path:
    """A folder that says which documents are left."""
    alive = fates.fate_N == dedup.KEPT

    def make(out: Path) -> Mapping[str, Any]:
        save(out, alive=alive)
        return {}

    return shop.one(DEDUP, {"alive": _digest(alive.tobytes())}, make, *shards.folders).folder


def _judge(shards: Shards, shop: Shop, pairs: Int64) -> Float64:
    """The Jaccard similarity of each pair, judged in parts."""
    if not len(pairs):
        return np.empty(0)

    def make(out: Path) -> Mapping[str, Any]:
        save(out, pairs=pairs)
        return {}

    key = {"revision": REVISION, "pairs": _digest(pairs.tobytes())}
    asked = shop.one(DEDUP, key, make, *shards.folders).folder
    parts = range(0, len(pairs), dedup.PAIRS_A_TASK)
    tasks = [
        shop.task(
            DEDUP,
            {"revision": REVISION, "judge": first},
            partial(
                dedup.judge_pairs,
                pairs=asked,
                first=first,
                last=min(len(pairs), first + dedup.PAIRS_A_TASK),
                folders=shards.folders,
                offsets=shards.begins,
            ),
            asked,
            reads=shards.folders,
        )
        for first in parts
    ]
    done = shop.run(tasks, here=len(pairs) <= _FEW_PAIRS)
    return np.concatenate([load(one.folder, "jaccard") for one in done])


def _paragraphs(spec: DataConfig, shards: Shards, fates: Fates, shop: Shop) -> tuple[Int64, Int64]:
    """Paragraphs to be cut [P, 3], by document, and the number of each shard's first one."""
    if not spec.dedup.paragraphs:
        return np.empty((0, 3), np.int64), np.zeros(len(shards.folders), np.int64)
    counts = [len(load(folder, "paragraph_spans")) for folder in shards.folders]
    begins = np.cumsum([0, *counts])[:-1]
    cut = partial(dedup.cut_bucket, offsets=shards.begins, paragraphs=begins)
    folders = _bucket_by_bucket("paragraphs", cut, shards, fates, shop)
    found = [load(folder, "cuts") for folder in folders]
    cuts = np.concatenate(found)
    return cuts[np.lexsort((cuts[:, 0], cuts[:, 1]))], begins


def _apart(
    shards: Shards,
    order: Int64,
    told: Sequence[tuple[str, str]],
    items: Mapping[str, Sequence[str]],
) -> Iterator[Apart]:
    """Held-out text as it is packed, then the items of evaluations."""
    for source, text in chain(shards.texts(order), told):
        yield TEXT, source, text
    for name, texts in items.items():
        for text in texts:
            yield name, "", text


def _digest(data: bytes | str) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()

"""The data stage: raw sources in, a packed and tokenised corpus with checkable problems out.

read → dedup → decide → clean → tokenizer → encode → rows. Each step takes shards and leaves shards,
in folders named by what they were made from (`shop.py`); no step holds the corpus in memory.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from cluster.shards import Done, workers_for
from configs.data import (
    DataConfig,
    DataSpec,
    TextSource,
)
from configs.seed import derive
from stages.artifacts import Corpus
from stages.contract import Workspace, fills
from stages.data import face
from stages.data.decide import Decided, Shards, clean_tasks, decide, repeats
from stages.data.encode import Encode
from stages.data.inputs import inputs_of
from stages.data.publish import Made, publish
from stages.data.questions import Posed, keep_apart, pose
from stages.data.reading import Read, read_sources, require_documents
from stages.data.record import require_training_text, shortfalls, statistics, unread
from stages.data.rows_out import Mixed, held_out_rows, mix
from stages.data.shop import Shop
from stages.data.tables import DOCUMENTS, batches
from stages.data.tokenizer import fim_ids, sample, train_tokenizer
from stages.names import TOKENIZER
from stages.tokens import Adopted, adopt_tokenizer, load_tokenizer, vocabulary_size, write_tokenizer

PARALLEL_BYTES = 64_000_000
"""Sources of less text than this are prepared by the driver: starting workers would take longer."""
TOKENIZER_REVISION = 1
_PHASES = 6


@fills(face.data)
def data(config: DataSpec, work: Workspace, *, tokenizer: Corpus | None = None) -> Corpus:
    """Read, clean, tokenise and pack the sources. Equal inputs give equal bytes, on however many
    workers, and what an interrupted build has done is not done again.

    With another corpus as `tokenizer`, that one's encodes this one too. DataError if a source
    cannot be read, or leaves nothing to train on or to hold out.
    """
    # Said aloud, because workers forked after the first parallel call would otherwise warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    spec, seed = config.data, config.seed
    work.tracker.start(steps=_PHASES, unit="phase")

    inputs = {
        name: inputs_of(name, source, work.hashes, shard_bytes=spec.shard_bytes, seed=seed)
        for name, source in sorted(spec.sources.items())
        if isinstance(source, TextSource)
    }
    total = sum(shard.bytes for one in inputs.values() for shard in one.shards)
    workers = workers_for(work.machines, total, least_bytes=PARALLEL_BYTES)
    line = _Line(spec, seed, work, Shop(work, workers))

    posed = pose(spec, work.hashes, seed=seed)
    line.texts = read_sources(spec, inputs, line.shop)
    for name, read in line.texts.items():
        require_documents(name, read, {})
    line.tell(1, line.read_figures())
    for note in unread(spec, line.texts):
        work.tracker.note(note)

    shards = Shards.of(line.texts)
    decided = decide(spec, shards, posed, line.shop, seed=seed)
    for name, read in line.texts.items():
        require_documents(name, read, repeats(shards, decided.fates, name))
    line.tell(2, {"duplicates": int((decided.fates.fate_N > 0).sum())})

    line.cleaned = line.clean(shards, decided)
    posed, line.posed_apart = keep_apart(posed, decided.folder, line.shop)
    line.tell(3, {"documents": sum(one.facts["documents"] for one in line.cleaned)})

    adopted = line.tokenizer(shards, posed, tokenizer)
    for told in adopted.said:
        work.tracker.note(f"data.tokenizer.file = {spec.tokenizer.file}: {told}")
    line.tell(4, {"vocab_size": vocabulary_size(adopted.tokenizer)})

    encoded = line.encode(shards, adopted)
    mixed = mix(spec, line.shop, encoded, posed, line.encoder, seed=seed)
    if spec.tokenizer.encoder != "tokenizers":
        for told in mixed.encoders:
            work.tracker.note(f"data.tokenizer.encoder = {spec.tokenizer.encoder!r}: {told}")
    line.tell(5, {"train_rows": mixed.total_rows, "train_tokens": mixed.total_tokens})
    apart = held_out_rows(spec, decided.folder, posed, load_tokenizer(line.encoder / TOKENIZER))
    return line.finish(shards, decided, posed, adopted, mixed, apart)


@dataclass
class _Line:
    """One build of a corpus, as far as it is."""

    spec: DataConfig
    seed: int
    work: Workspace
    shop: Shop
    texts: dict[str, Read] = field(default_factory=dict)
    cleaned: list[Done] = field(default_factory=list)
    posed_apart: dict[str, Path] = field(default_factory=dict)
    """For each source of problems the folder that says which of them stand in what is held out."""
    encoder: Path = Path()
    """The folder of the tokenizer."""

    def tell(self, step: int, figures: Mapping[str, Any]) -> None:
        """Log a phase, with how long its steps took."""
        seconds = {f"{name}_seconds": round(took, 3) for name, took in self.shop.seconds.items()}
        self.work.tracker.log({**figures, **seconds}, step=step)

    def read_figures(self) -> dict[str, int]:
        """What was read."""
        reads = self.texts.values()
        dropped = sum(read.counted("dropped").total() for read in reads)
        figures = {name: sum(one.total(name) for one in reads) for name in ("documents", "bytes")}
        return {**figures, "documents_dropped": dropped}

    def clean(self, shards: Shards, decided: Decided) -> list[Done]:
        """Every shard without what is dropped or held out. DataError if a source has nothing to be
        trained on."""
        tasks = clean_tasks(self.spec, shards, decided.folder, self.shop, seed=self.seed)
        found = self.shop.run(tasks)
        for name in self.texts:
            here = [one for one, of in zip(found, shards.names, strict=True) if of == name]
            held_out = sum(one.facts["held_out"] for one in here)
            require_training_text(name, sum(one.facts["documents"] for one in here), held_out)
        return found

    def ordered(self, shards: Shards, name: str) -> list[Done]:
        """A source's cleaned shards in the order in which they are packed."""
        here = [one for one, of in zip(self.cleaned, shards.names, strict=True) if of == name]
        rng = np.random.default_rng(derive(self.seed, "data", name, "shards"))
        return [here[at] for at in rng.permutation(len(here))]

    def tokenizer(
        self, shards: Shards, posed: Mapping[str, Posed], other: Corpus | None
    ) -> Adopted:
        """That of another corpus, the one that the config names, or one trained on the texts."""
        config = self.spec.tokenizer
        if other is not None:
            adopted = adopt_tokenizer(other.path(TOKENIZER))
        elif config.file is not None:
            adopted = adopt_tokenizer(Path(config.file))
        else:
            trained = self._trained(shards, posed)
            record = json.loads((trained / TOKENIZER).read_text(encoding="utf-8"))
            adopted = Adopted(load_tokenizer(trained / TOKENIZER), record, ())

        def make(out: Path) -> Mapping[str, Any]:
            write_tokenizer(out / TOKENIZER, adopted.record)
            return {}

        record = hashlib.sha256(json.dumps(adopted.record, sort_keys=True).encode()).hexdigest()
        self.encoder = self.shop.one("tokenizer", {"record": record}, make).folder
        return adopted

    def _trained(self, shards: Shards, posed: Mapping[str, Posed]) -> Path:
        """The folder of a tokenizer trained on texts of each source by its share of the bytes."""
        config = self.spec.tokenizer
        texts = {name: self.ordered(shards, name) for name in self.texts}

        def learned() -> Iterator[str]:
            for name, source in sorted(self.spec.sources.items()):
                left = round(source.share * config.training_bytes)
                if name in posed:
                    yield from sample(posed[name].train, left)
                # As much of each shard, for files of one kind often stand together.
                for number, shard in enumerate(texts.get(name, ())):
                    size = left // (len(texts[name]) - number)
                    left -= min(size, int(shard.facts["bytes"]))
                    yield from sample(_texts(shard), size)

        def make(out: Path) -> Mapping[str, Any]:
            made = train_tokenizer(learned(), config)
            write_tokenizer(out / TOKENIZER, json.loads(made.to_str()))
            return {}

        key = {
            "revision": TOKENIZER_REVISION,
            "config": config.model_dump(mode="json", exclude={"encoder"}),
            "shares": {name: one.share for name, one in sorted(self.spec.sources.items())},
            "posed": {name: one.digest for name, one in sorted(posed.items())},
        }
        needs = [one.folder for some in texts.values() for one in some]
        return self.shop.one("tokenizer", key, make, *needs).folder

    def encode(self, shards: Shards, adopted: Adopted) -> dict[str, list[Done]]:
        """Streams of each text source, shard by shard, until there are enough tokens of it."""
        spec = self.spec
        wanted = {
            name: round(spec.sources[name].share * spec.train_tokens) + 2 * spec.sequence_tokens
            for name in self.texts
        }
        waiting = {name: self.ordered(shards, name) for name in self.texts}
        found: dict[str, list[Done]] = {name: [] for name in self.texts}
        fim = fim_ids(adopted.tokenizer, spec.pack.fim_rate) if spec.pack.fim_rate else None
        while asked := [
            (name, shard)
            for name, some in waiting.items()
            for shard in _wave(some, wanted[name], found[name])
        ]:
            tasks = [self._encode_task(name, shard, fim) for name, shard in asked]
            for (name, _), done in zip(asked, self.shop.run(tasks), strict=True):
                found[name].append(done)
                waiting[name].pop(0)
        return found

    def _encode_task(self, name: str, shard: Done, fim: tuple[int, int, int] | None) -> Any:
        spec = self.spec
        make = Encode(
            source=name,
            shard=shard.folder,
            tokenizer=self.encoder,
            encoder=spec.tokenizer.encoder,
            pack=spec.pack,
            sequence_tokens=spec.sequence_tokens,
            fim=fim,
            seed=self.seed,
        )
        return self.shop.task("encode", make.key(), make, shard.folder, self.encoder)

    def finish(
        self,
        shards: Shards,
        decided: Decided,
        posed: Mapping[str, Posed],
        adopted: Adopted,
        mixed: Mixed,
        apart: Mapping[str, Any],
    ) -> Corpus:
        """Write the artifact."""
        spec, work = self.spec, self.work
        searched = [*(done.folder for done in self.cleaned), *self.posed_apart.values()]
        facts = statistics(
            spec, self.texts, shards, decided, self.cleaned, searched, posed, mixed, apart
        )
        facts["vocab_size"] = vocabulary_size(adopted.tokenizer)
        for note in (*facts.pop("notes"), *shortfalls(spec, mixed)):
            work.tracker.note(note)
        work.lease.check()
        made = Made(shards, self.cleaned, posed, self.posed_apart, mixed, apart, adopted.record)
        publish(Path(work.out), made, facts)
        held_out = {name: len(block) for name, block in apart.items()}
        self.tell(_PHASES, {"held_out_rows": sum(held_out.values())})
        return Corpus(
            uri=work.out,
            train_rows=mixed.total_rows,
            held_out_rows=held_out,
            sequence_tokens=spec.sequence_tokens,
            vocab_size=vocabulary_size(adopted.tokenizer),
            train_problems=sum(len(one.train_problems) for one in posed.values()),
            held_out_problems=sum(len(one.held_out) for one in posed.values()),
        )


def _texts(shard: Done) -> Iterator[str]:
    """The training texts of a shard, in the order in which they are packed."""
    for batch in batches(shard.folder / DOCUMENTS, "text"):
        yield from batch["text"]


def _wave(waiting: Sequence[Done], wanted: int, done: Sequence[Done]) -> Iterator[Done]:
    """The shards to be encoded next: as many as are likely to hold the tokens that lack."""
    tokens = sum(int(one.facts["tokens"]) for one in done)
    read = sum(int(one.facts["bytes"]) for one in done)
    # Of a byte no more than a token is made; the first shards tell how many it takes.
    left = (wanted - tokens) * (max(1.0, read / tokens) if tokens else 1.0)
    for one in waiting:
        if left <= 0:
            return
        yield one
        left -= int(one.facts["bytes"])

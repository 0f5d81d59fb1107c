"""The data stage: raw sources in, a packed and tokenised corpus with checkable problems out."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from configs.data import (
    ArithmeticSource,
    DataConfig,
    DataSpec,
    FilesSource,
    StdlibSource,
)
from configs.errors import DataError
from configs.seed import derive
from stages.artifacts import Corpus
from stages.contract import Workspace, fills
from stages.data import face
from stages.data.arithmetic import Split, make_problems, training_documents
from stages.data.dedup import Seen
from stages.data.files import Document
from stages.data.held_out import Overlap, keep_apart, part
from stages.data.ingest import (
    Reading,
    read_files,
    read_stdlib,
    require_documents,
    require_training_text,
)
from stages.data.pack import (
    Int32,
    frame,
    interleave,
    mixable_rows,
    pack,
    row_budget,
    take_until,
)
from stages.data.quality import Drop, judge
from stages.data.record import Texts, shortfalls, statistics, unread, write_dropped
from stages.data.tokenizer import encode, sample, train_tokenizer
from stages.hashing import Hashes
from stages.names import TOKENIZER
from stages.shards import write_rows
from stages.tokens import Adopted, adopt_tokenizer, vocabulary_size, write_tokenizer
from stages.verifiers import Problem, write_problems

MIN_ROWS = 8
"""Fewer training rows than this are no corpus but a mistake in the sources."""

_DOCUMENTS_PER_BATCH = 64


@fills(face.data)
def data(config: DataSpec, work: Workspace, *, tokenizer: Corpus | None = None) -> Corpus:
    """Read, clean, tokenise and pack the sources. Equal inputs give equal bytes.

    With another corpus as `tokenizer`, that one's encodes this one too. DataError if a source
    cannot be read, or leaves nothing to train on or to hold out.
    """
    # Said aloud, because workers forked after the first parallel call would otherwise warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    out, spec = Path(work.out), config.data
    work.tracker.start(steps=4, unit="phase")

    generated = {n: s for n, s in spec.sources.items() if isinstance(s, ArithmeticSource)}
    problems = make_problems(generated, seed=config.seed)
    asked = [problem for _, split in sorted(problems.items()) for problem in split.held_out]
    texts, drops, overlap = _clean(spec, work.hashes, asked, seed=config.seed)
    texts |= {
        name: _spell(split, generated[name], seed=derive(config.seed, "data", name))
        for name, split in problems.items()
    }
    total = sum((source.read for source in texts.values()), Counter[str]())
    work.tracker.log({**total, "documents_dropped": len(drops)}, step=1)
    for note in (*unread(spec, texts), *overlap.notes()):
        work.tracker.note(note)

    adopted = _tokenizer(spec, texts, tokenizer)
    encoder = adopted.tokenizer
    for line in adopted.said:
        work.tracker.note(f"data.tokenizer.file = {spec.tokenizer.file}: {line}")
    work.tracker.log({"vocab_size": vocabulary_size(encoder)}, step=2)

    train = _train_rows(spec, texts, encoder, seed=config.seed)
    held_out = _held_out_rows(spec, texts, encoder)
    rows = interleave(train, seed=config.seed)
    work.tracker.log({"train_rows": len(rows), "train_tokens": rows.size}, step=3)
    for shortfall in shortfalls(spec, train):
        work.tracker.note(shortfall)

    work.lease.check()
    write_rows(out / "train", rows)
    for name, block in held_out.items():
        write_rows(out / "held_out" / name, block)
    splits = [problems[name] for name in sorted(problems)]
    train_problems = [problem for split in splits for problem in split.train]
    held_out_problems = [problem for split in splits for problem in split.held_out]
    write_problems(out / "problems" / "train.parquet", train_problems)
    write_problems(out / "problems" / "held_out.parquet", held_out_problems)
    write_tokenizer(out / TOKENIZER, adopted.record)
    write_dropped(out / "dropped.jsonl", drops)
    facts = statistics(spec, texts, train, held_out, encoder, overlap)
    (out / "statistics.json").write_text(json.dumps(facts, indent=2) + "\n")
    work.tracker.log({"held_out_rows": sum(map(len, held_out.values()))}, step=4)
    return Corpus(
        uri=work.out,
        train_rows=len(rows),
        held_out_rows={name: len(block) for name, block in held_out.items()},
        sequence_tokens=spec.sequence_tokens,
        vocab_size=vocabulary_size(encoder),
        train_problems=len(train_problems),
        held_out_problems=len(held_out_problems),
    )


def _clean(
    spec: DataConfig, hashes: Hashes, problems: Sequence[Problem], *, seed: int
) -> tuple[dict[str, Texts], list[Drop], Overlap]:
    """The text sources, in name order, without what a rule took out or what is held out."""
    drops: list[Drop] = []
    seen = Seen()
    readings: dict[str, Reading] = {}
    kept: dict[str, list[Document]] = {}
    for name, source in sorted(spec.sources.items()):
        if isinstance(source, ArithmeticSource):
            continue
        reading = readings[name] = _read(name, source, hashes, seed=seed)
        passed = []
        for document in reading.documents:
            if found := judge(document, spec.quality) or seen.check(document):
                drops.append(found)
            else:
                passed.append(document)
        require_documents(name, source, passed, reading, _rules(drops, name))
        rng = np.random.default_rng(derive(seed, "data", name, "documents"))
        kept[name] = [passed[index] for index in rng.permutation(len(passed))]
    parted, overlap = part(kept, spec.held_out_share, seed=seed)
    parted, cuts = keep_apart(parted, problems, overlap, min_chars=spec.quality.min_chars)
    texts = {
        name: Texts(
            [one.text for one in sides.train],
            [one.text for one in sides.held_out],
            Counter(documents=len(readings[name].documents), bytes=readings[name].read_bytes),
            _rules([*drops, *(cut for cut in cuts if cut.cut_chars is None)], name),
            _rules([cut for cut in cuts if cut.cut_chars is not None], name),
            unread_files=readings[name].unread_files,
            unread_bytes=readings[name].unread_bytes,
        )
        for name, sides in parted.items()
    }
    for name, found_texts in texts.items():
        require_training_text(name, found_texts.train, found_texts.held_out)
    return texts, [*drops, *cuts], overlap


def _rules(drops: Sequence[Drop], source: str) -> Counter[str]:
    """How many of a source's documents each rule is the reason for."""
    return Counter(drop.rule for drop in drops if drop.source == source)


def _read(name: str, source: StdlibSource | FilesSource, hashes: Hashes, *, seed: int) -> Reading:
    match source:
        case StdlibSource():
            return read_stdlib(name, source, seed=seed)
        case FilesSource():
            return read_files(name, source, hashes)


def _spell(split: Split, source: ArithmeticSource, *, seed: int) -> Texts:
    """Problems as documents: the prompt and its answer."""
    train = training_documents(split.train, source, seed=seed)
    held_out = [one.prompt + one.answer for one in split.held_out]
    total_bytes = sum(map(len, train)) + sum(map(len, held_out))
    read = Counter(documents=len(train) + len(held_out), bytes=total_bytes)
    return Texts(train, held_out, read, Counter(), repeats=True)


def _tokenizer(spec: DataConfig, texts: Mapping[str, Texts], other: Corpus | None) -> Adopted:
    """That of another corpus, the one that the config names, or one trained on the texts."""
    if other is not None:
        return adopt_tokenizer(other.path(TOKENIZER))
    if spec.tokenizer.file is not None:
        return adopt_tokenizer(Path(spec.tokenizer.file))
    made = train_tokenizer(_training_sample(spec, texts), spec.tokenizer)
    return Adopted(made, json.loads(made.to_str()), ())


def _training_sample(spec: DataConfig, texts: Mapping[str, Texts]) -> Iterator[str]:
    """What the tokenizer learns from: training texts of each source by its share of the bytes."""
    for name, source in sorted(spec.sources.items()):
        yield from sample(texts[name].train, round(source.share * spec.tokenizer.training_bytes))


def _train_rows(
    spec: DataConfig, texts: Mapping[str, Texts], tokenizer: Tokenizer, *, seed: int
) -> dict[str, Int32]:
    """Packed rows of each source, in the proportions that the recipe asks for.

    Text is never repeated: where a source is shorter than its share, all shrink alike.
    """
    shares = {name: source.share for name, source in sorted(spec.sources.items())}
    length, wanted = spec.sequence_tokens, spec.train_tokens // spec.sequence_tokens
    budget = row_budget(shares, wanted)
    finite = {
        name: pack(
            take_until(_framed(tokenizer, texts[name].train), (budget[name] + 1) * length),
            sequence_tokens=length,
            max_rows=budget[name],
        )
        for name in shares
        if not texts[name].repeats
    }
    available = {name: len(finite[name]) if name in finite else wanted for name in shares}
    short = {name for name in finite if available[name] < budget[name]}
    total_rows = mixable_rows({n: shares[n] for n in short}, available, wanted)
    if total_rows < MIN_ROWS:
        lacking = min(short, key=lambda name: available[name] / shares[name], default="")
        cause = (
            f"data.sources.{lacking} has text for {available[lacking]} rows of its share of "
            f"{shares[lacking]}; give it more text or a smaller share"
            if lacking
            else f"data.train_tokens = {spec.train_tokens} is too small; raise it"
        )
        raise DataError(
            f"data.sequence_tokens = {length}: the sources fill {total_rows} rows of that length, "
            f"but training needs {MIN_ROWS}; {cause}"
        )
    budget = row_budget(shares, total_rows)
    return {
        name: finite[name][: budget[name]]
        if name in finite
        else _drawn_rows(
            tokenizer,
            texts[name].train,
            budget[name],
            length,
            seed=derive(seed, "data", name, "draws"),
        )
        for name in shares
    }


def _drawn_rows(
    tokenizer: Tokenizer, texts: Sequence[str], num_rows: int, length: int, *, seed: int
) -> Int32:
    """Exactly `num_rows` rows of texts drawn with replacement."""
    framed = list(_framed(tokenizer, texts))
    enough = -(-num_rows * length // min(map(len, framed)))
    picks = np.random.default_rng(seed).integers(len(framed), size=enough)
    documents = take_until((framed[pick] for pick in picks), num_rows * length)
    return pack(documents, sequence_tokens=length, max_rows=num_rows)


def _held_out_rows(
    spec: DataConfig, texts: Mapping[str, Texts], tokenizer: Tokenizer
) -> dict[str, Int32]:
    """Packed held-out rows of each source: at least one, the last filled up with padding."""
    max_rows = max(1, spec.max_held_out_tokens // spec.sequence_tokens)
    return {
        name: pack(
            take_until(_framed(tokenizer, source.held_out), spec.max_held_out_tokens),
            sequence_tokens=spec.sequence_tokens,
            max_rows=max_rows,
            pad=True,
        )
        for name, source in sorted(texts.items())
    }


def _framed(tokenizer: Tokenizer, texts: Sequence[str]) -> Iterator[Int32]:
    """Texts as they are packed, encoded a few at a time: who stops early pays for little more."""
    for start in range(0, len(texts), _DOCUMENTS_PER_BATCH):
        for token_ids in encode(tokenizer, texts[start : start + _DOCUMENTS_PER_BATCH]):
            yield frame(token_ids)

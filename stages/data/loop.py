"""The data stage: raw sources in, a packed and tokenised corpus with checkable problems out."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from configs.data import (
    ArithmeticSource,
    DataConfig,
    DataSpec,
    FilesSource,
    Source,
    StdlibSource,
)
from configs.errors import DataError
from configs.seed import derive
from stages.artifacts import Corpus
from stages.contract import Workspace, stage
from stages.data.arithmetic import Split, make_problems, training_documents, wrong_share
from stages.data.dedup import Seen, hold_out
from stages.data.ingest import Reading, identify, read_files, read_stdlib, require_documents
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
from stages.data.tokenizer import encode, identify_tokenizer, sample, train_tokenizer
from stages.shards import BOS_ID, write_rows
from stages.tokens import read_tokenizer, vocabulary_size
from stages.verifiers import write_problems

MIN_ROWS = 8
"""Fewer training rows than this are no corpus but a mistake in the sources."""

_DOCUMENTS_PER_BATCH = 64


@dataclass(frozen=True, slots=True)
class _Texts:
    """One source, as training and held-out texts in the order in which they are packed."""

    train: Sequence[str]
    held_out: Sequence[str]
    read: Counter[str]
    """`documents` and `bytes`, before any was dropped."""
    dropped: Counter[str]
    """Documents by the rule that took them out."""
    unread_files: int = 0
    """Files that the source's `max_bytes` kept from being read to their end."""
    unread_bytes: int = 0
    """Size of those files on disk."""
    repeats: bool = False
    """Whether training draws from the texts with replacement, as often as it needs."""


def reads(config: DataSpec) -> Mapping[str, Any]:
    """What the corpus depends on besides its config: files by content, the Python version."""
    found = {name: identify(name, source) for name, source in config.data.sources.items()}
    known = {name: facts for name, facts in sorted(found.items()) if facts}
    return known | identify_tokenizer(config.data.tokenizer)


@stage(revision=1, reads=reads)
def data(config: DataSpec, work: Workspace) -> Corpus:
    """Read, clean, tokenise and pack the sources. Equal inputs give equal bytes.

    DataError if a source cannot be read, or leaves nothing to train on or to hold out.
    """
    # Said aloud, because workers forked after the first parallel call would otherwise warn.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    out, spec = Path(work.out), config.data
    work.tracker.start(steps=4, unit="phase")

    texts, drops = _clean(spec, seed=config.seed)
    generated = {n: s for n, s in spec.sources.items() if isinstance(s, ArithmeticSource)}
    problems = make_problems(generated, seed=config.seed)
    texts |= {
        name: _spell(split, generated[name], seed=derive(config.seed, "data", name))
        for name, split in problems.items()
    }
    total = sum((source.read for source in texts.values()), Counter[str]())
    work.tracker.log({**total, "documents_dropped": len(drops)}, step=1)
    for cut in _cuts(spec, texts):
        work.tracker.note(cut)

    tokenizer = _tokenizer(spec, texts)
    work.tracker.log({"vocab_size": vocabulary_size(tokenizer)}, step=2)

    train = _train_rows(spec, texts, tokenizer, seed=config.seed)
    held_out = _held_out_rows(spec, texts, tokenizer)
    rows = interleave(train, seed=config.seed)
    work.tracker.log({"train_rows": len(rows), "train_tokens": rows.size}, step=3)
    for shortfall in _shortfalls(spec, train):
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
    tokenizer.save(str(out / "tokenizer.json"))
    _write_dropped(out / "dropped.jsonl", drops)
    statistics = _statistics(spec, texts, train, held_out, tokenizer)
    (out / "statistics.json").write_text(json.dumps(statistics, indent=2) + "\n")
    work.tracker.log({"held_out_rows": sum(map(len, held_out.values()))}, step=4)
    return Corpus(
        uri=work.out,
        train_rows=len(rows),
        held_out_rows={name: len(block) for name, block in held_out.items()},
        sequence_tokens=spec.sequence_tokens,
        vocab_size=vocabulary_size(tokenizer),
        train_problems=len(train_problems),
        held_out_problems=len(held_out_problems),
    )


def _clean(spec: DataConfig, *, seed: int) -> tuple[dict[str, _Texts], list[Drop]]:
    """The text sources, in name order, without the documents that a rule took out."""
    texts, drops, seen = {}, [], Seen()
    for name, source in sorted(spec.sources.items()):
        if isinstance(source, ArithmeticSource):
            continue
        kept, read, dropped = [], Counter(documents=0, bytes=0), Counter[str]()
        reading = _read(name, source, seed=seed)
        for document in reading.documents:
            read.update(documents=1, bytes=len(document.text.encode()))
            if drop := judge(document, spec.quality) or seen.check(document):
                drops.append(drop)
                dropped[drop.rule] += 1
            else:
                kept.append(document)
        require_documents(name, source, kept, read, dropped)
        rng = np.random.default_rng(derive(seed, "data", name, "documents"))
        shuffled = [kept[index] for index in rng.permutation(len(kept))]
        train, held_out = hold_out(shuffled, spec.held_out_share, seed=seed)
        texts[name] = _Texts(
            [one.text for one in train],
            [one.text for one in held_out],
            read,
            dropped,
            unread_files=reading.unread_files,
            unread_bytes=reading.unread_bytes,
        )
    return texts, drops


def _read(name: str, source: StdlibSource | FilesSource, *, seed: int) -> Reading:
    match source:
        case StdlibSource():
            return read_stdlib(name, source, seed=seed)
        case FilesSource():
            return read_files(name, source)


def _spell(split: Split, source: ArithmeticSource, *, seed: int) -> _Texts:
    """Problems as documents: the prompt and its answer."""
    train = training_documents(split.train, source, seed=seed)
    held_out = [one.prompt + one.answer for one in split.held_out]
    total_bytes = sum(map(len, train)) + sum(map(len, held_out))
    read = Counter(documents=len(train) + len(held_out), bytes=total_bytes)
    return _Texts(train, held_out, read, Counter(), repeats=True)


def _tokenizer(spec: DataConfig, texts: Mapping[str, _Texts]) -> Tokenizer:
    """The one that the config names, or one trained on the texts."""
    if spec.tokenizer.file is not None:
        return read_tokenizer(Path(spec.tokenizer.file))
    return train_tokenizer(_training_sample(spec, texts), spec.tokenizer)


def _training_sample(spec: DataConfig, texts: Mapping[str, _Texts]) -> Iterator[str]:
    """What the tokenizer learns from: training texts of each source by its share of the bytes."""
    for name, source in sorted(spec.sources.items()):
        yield from sample(texts[name].train, round(source.share * spec.tokenizer.training_bytes))


def _train_rows(
    spec: DataConfig, texts: Mapping[str, _Texts], tokenizer: Tokenizer, *, seed: int
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
    spec: DataConfig, texts: Mapping[str, _Texts], tokenizer: Tokenizer
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


def _cuts(spec: DataConfig, texts: Mapping[str, _Texts]) -> Iterator[str]:
    """One line for each source that holds more text than it may give."""
    for name, source in sorted(spec.sources.items()):
        if not isinstance(source, ArithmeticSource) and (files := texts[name].unread_files):
            yield (
                f"data.sources.{name}.max_bytes = {source.max_bytes:,}: files not read to their "
                f"end: {files:,}, of {texts[name].unread_bytes:,} bytes in all; raise it to have "
                "more of them"
            )


def _shortfalls(spec: DataConfig, train: Mapping[str, Int32]) -> Iterator[str]:
    """One line when the corpus is smaller than asked."""
    asked, total = spec.train_tokens, sum(block.size for block in train.values())
    if total < asked // spec.sequence_tokens * spec.sequence_tokens:
        yield (
            f"data.train_tokens = {asked:,}: the text sources fill only {total:,} tokens in the "
            "proportions asked; training will repeat them. Give more text to change that"
        )


def _write_dropped(path: Path, drops: Sequence[Drop]) -> None:
    lines = [json.dumps(drop.record(), ensure_ascii=False) + "\n" for drop in drops]
    path.write_text("".join(lines), encoding="utf-8")


def _statistics(
    spec: DataConfig,
    texts: Mapping[str, _Texts],
    train: Mapping[str, Int32],
    held_out: Mapping[str, Int32],
    tokenizer: Tokenizer,
) -> dict[str, Any]:
    """`statistics.json`: what was read, dropped, kept and packed, by source and in all."""
    train_tokens = sum(block.size for block in train.values())
    sources = {
        name: {
            "type": spec.sources[name].type,
            "share_asked": spec.sources[name].share,
            "share": train[name].size / train_tokens,
            **_slips(spec.sources[name]),
            "documents_read": source.read["documents"],
            "bytes_read": source.read["bytes"],
            "truncated": source.unread_files > 0,
            "unread_files": source.unread_files,
            "unread_bytes": source.unread_bytes,
            "documents_dropped": dict(sorted(source.dropped.items())),
            "train_documents": len(source.train),
            "train_bytes": sum(len(text.encode()) for text in source.train),
            "train_tokens": train[name].size,
            "train_documents_packed": int(np.count_nonzero(train[name] == BOS_ID)),
            "held_out_documents": len(source.held_out),
            "held_out_bytes": sum(len(text.encode()) for text in source.held_out),
            "held_out_tokens": held_out[name].size,
        }
        for name, source in sorted(texts.items())
    }
    return {
        "vocab_size": vocabulary_size(tokenizer),
        "sequence_tokens": spec.sequence_tokens,
        "train_tokens_asked": spec.train_tokens,
        "train_tokens": train_tokens,
        "train_tokens_missing": max(0, spec.train_tokens - train_tokens),
        "held_out_tokens": sum(block.size for block in held_out.values()),
        "sources": sources,
    }


def _slips(source: Source) -> dict[str, float]:
    """What makes a source's training text wrong on purpose."""
    return {"slip_share": wrong_share(source)} if isinstance(source, ArithmeticSource) else {}

"""What is recorded of a corpus: what was read, dropped, cut, kept and packed, and what to tell."""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from configs.data import ArithmeticSource, DataConfig, Source
from stages.data.arithmetic import wrong_share
from stages.data.held_out import Overlap
from stages.data.pack import Int32
from stages.data.quality import Drop
from stages.framing import BOS_ID
from stages.tokens import vocabulary_size


@dataclass(frozen=True, slots=True)
class Texts:
    """One source, as training and held-out texts in the order in which they are packed."""

    train: Sequence[str]
    held_out: Sequence[str]
    read: Counter[str]
    """`documents` and `bytes`, before any was dropped."""
    dropped: Counter[str]
    """Documents by the rule that took them out."""
    cut: Counter[str] = field(default_factory=Counter)
    """Documents of which a part was cut, by the reason."""
    unread_files: int = 0
    """Files that the source's `max_bytes` kept from being read to their end."""
    unread_bytes: int = 0
    """Size of those files on disk."""
    repeats: bool = False
    """Whether training draws from the texts with replacement, as often as it needs."""


def unread(spec: DataConfig, texts: Mapping[str, Texts]) -> Iterator[str]:
    """One line for each source that holds more text than it may give."""
    for name, source in sorted(spec.sources.items()):
        if not isinstance(source, ArithmeticSource) and (files := texts[name].unread_files):
            yield (
                f"data.sources.{name}: max_bytes = {source.max_bytes:,} is reached; {files:,} "
                f"files of {texts[name].unread_bytes:,} bytes are left out, or not read to their "
                "end. Raise it to have more of them"
            )


def shortfalls(spec: DataConfig, train: Mapping[str, Int32]) -> Iterator[str]:
    """One line when the corpus is smaller than asked."""
    asked, total = spec.train_tokens, sum(block.size for block in train.values())
    if total < asked // spec.sequence_tokens * spec.sequence_tokens:
        yield (
            f"data.train_tokens = {asked:,}: the text sources fill only {total:,} tokens in the "
            "proportions asked; training will repeat them. Give more text to change that"
        )


def write_dropped(path: Path, drops: Sequence[Drop]) -> None:
    lines = [json.dumps(drop.record(), ensure_ascii=False) + "\n" for drop in drops]
    path.write_text("".join(lines), encoding="utf-8")


def statistics(
    spec: DataConfig,
    texts: Mapping[str, Texts],
    train: Mapping[str, Int32],
    held_out: Mapping[str, Int32],
    tokenizer: Tokenizer,
    overlap: Overlap,
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
            "documents_cut": dict(sorted(source.cut.items())),
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
        "held_out_in_training": overlap.record(),
        "sources": sources,
    }


def _slips(source: Source) -> dict[str, float]:
    """What makes a source's training text wrong on purpose."""
    return {"slip_share": wrong_share(source)} if isinstance(source, ArithmeticSource) else {}

"""What is recorded of a corpus: what was read, dropped, cut, kept and packed, and what to tell."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.shards import Done
from configs.data import ArithmeticSource, DataConfig, FilesSource, ProblemsSource, Source
from configs.errors import DataError
from stages.data.apart import PASSAGE, PROBLEM, TEXT, Found, found_in
from stages.data.arithmetic import wrong_share
from stages.data.decide import Decided, Shards, repeated_ids
from stages.data.encode import SHORT
from stages.data.held_out import share_of
from stages.data.pack import Int32
from stages.data.questions import Posed
from stages.data.reading import Read
from stages.data.rows_out import Mixed
from stages.overlap import LEAST_CHARS, WINDOW_CHARS

NOT_STATED = "not stated"
"""The licence of documents that say none."""


@dataclass
class Counted:
    """What the steps counted, of one source or of all."""

    dropped: Counter[str] = field(default_factory=Counter)
    """Documents, and rows and files that could not be read, by the rule that took them out."""
    cuts: Counter[str] = field(default_factory=Counter)
    """Passages or statements, by reason."""
    cut_chars: Counter[str] = field(default_factory=Counter)
    cut_documents: Counter[str] = field(default_factory=Counter)
    sets: dict[str, Counter[str]] = field(default_factory=dict)
    train_chars: int = 0
    """Of all training texts, before any was cut."""
    documents: int = 0
    """To train on."""
    bytes: int = 0
    held_out: int = 0
    licences: Counter[str] = field(default_factory=Counter)
    """Of documents that stayed, on either side."""
    written: set[str] = field(default_factory=set)
    """When they were written: among others the first and the last."""

    def add(self, done: Done) -> None:
        """Count a cleaned shard."""
        self.written.update(done.facts["written"])
        for name in ("dropped", "cuts", "cut_chars", "cut_documents", "licences"):
            getattr(self, name).update(done.facts[name])
        for name in ("train_chars", "documents", "bytes", "held_out"):
            setattr(self, name, getattr(self, name) + done.facts[name])
        for name, counts in done.facts["sets"].items():
            self.sets.setdefault(name, Counter()).update(counts)


def require_training_text(name: str, documents: int, held_out: int) -> None:
    """DataError if nothing is left to train on once what is held out was cut from it."""
    if not documents:
        raise DataError(
            f"data.sources.{name}: all of its training text stands in its {held_out} held-out "
            "documents too, as copies of one another do; give text that repeats itself less"
        )


def unread(spec: DataConfig, texts: Mapping[str, Read]) -> Iterator[str]:
    """One line for each source that holds more text than it may give, or that is broken in part."""
    for name, read in texts.items():
        if read.unread_files:
            yield (
                f"data.sources.{name}: max_bytes = {read.source.max_bytes:,} is reached; "
                f"{read.unread_files:,} files of {read.unread_bytes:,} bytes are left out, or not "
                "read to their end. Raise it to have more of them"
            )
        yield from _unnamed(name, read)
        if lost := read.total("broken_bytes"):
            first = next(one for done in read.shards for one in done.facts["broken"])
            yield (
                f"data.sources.{name}: {lost:,} bytes could not be read and are set aside, the "
                f"first in {first['place']}: {first['reason']}"
            )


def _unnamed(name: str, read: Read) -> Iterator[str]:
    """One line for each field that no document of a source has."""
    found = sum((Counter(done.facts["fields"]) for done in read.shards), Counter[str]())
    if not isinstance(read.source, FilesSource) or not read.total("documents"):
        return
    source = read.source
    asked = {
        "key": ("id_field", source.id_field),
        "timestamp": ("timestamp_field", source.timestamp_field),
    }
    if source.licence is None:
        asked["licence"] = ("licence_field", source.licence_field)
    for meaning, (setting, value) in asked.items():
        if value is not None and not found[meaning]:
            yield (
                f"data.sources.{name}.{setting} = {value!r}: no document has anything there; "
                "correct it, or leave it out"
            )


def shortfalls(spec: DataConfig, mixed: Mixed) -> Iterator[str]:
    """One line when the corpus is smaller than asked."""
    asked, total_tokens = spec.train_tokens, mixed.total_tokens
    if total_tokens < asked // spec.sequence_tokens * spec.sequence_tokens:
        yield (
            f"data.train_tokens = {asked:,}: the text sources fill only {total_tokens:,} tokens in "
            f"the proportions asked, for want of {', '.join(mixed.lacking)}; give more text there, "
            "or raise max_epochs. Training that asks for more passes over all of them again"
        )


def statistics(
    spec: DataConfig,
    texts: Mapping[str, Read],
    shards: Shards,
    decided: Decided,
    cleaned: Sequence[Done],
    searched: Sequence[Path],
    posed: Mapping[str, Posed],
    mixed: Mixed,
    held_out: Mapping[str, Int32],
) -> dict[str, Any]:
    """`statistics.json`: what was read, dropped, kept and packed, by source and in all; and under
    `notes` what to tell, which is no part of the file."""
    counted = {name: Counted() for name in texts}
    ids = {name: repeated_ids(shards, name) for name in texts}
    every = Counted()
    for name, done in zip(shards.names, cleaned, strict=True):
        counted[name].add(done)
        every.add(done)
    sets, problems = found_in(decided.folder, searched)
    sources = {
        name: {
            "type": spec.sources[name].type,
            "share_asked": spec.sources[name].share,
            "share": mixed.rows[name] / mixed.total_rows,
            **_slips(spec.sources[name]),
            **(
                {
                    **_of_text(texts[name], counted[name], mixed.short_documents[name]),
                    "repeated_ids": ids[name],
                    "epochs": mixed.epochs[name],
                    "fim_documents": mixed.fim_documents[name],
                }
                if name in texts
                else _of_problems(spec.sources[name], posed[name])
            ),
            "train_tokens": mixed.rows[name] * mixed.sequence_tokens,
            "train_documents_packed": mixed.documents[name],
            "held_out_tokens": held_out[name].size,
        }
        for name in sorted(spec.sources)
    }
    overlap = _overlap(decided, every, sets[TEXT], problems)
    return {
        "sequence_tokens": spec.sequence_tokens,
        "train_tokens_asked": spec.train_tokens,
        "train_tokens": mixed.total_tokens,
        "train_tokens_missing": max(0, spec.train_tokens - mixed.total_tokens),
        "padding_tokens": mixed.padding_tokens,
        "documents_too_short_to_pack": sum(mixed.short_documents.values()),
        "held_out_tokens": sum(block.size for block in held_out.values()),
        "duplicates": {
            "near_duplicate_clusters": decided.fates.clusters,
            "pairs_compared": decided.fates.candidates,
            "min_jaccard": spec.dedup.min_jaccard if spec.dedup.near else None,
        },
        "held_out_in_training": overlap,
        "evaluations": {
            name: _evaluation(*decided.evaluations[name], every, found, name)
            for name, found in sets.items()
            if name != TEXT
        },
        "sources": sources,
        "notes": [
            *_notes(every, overlap, sets, decided),
            *_of_ids(texts, ids),
            *_of_problems_left_out(posed),
        ],
    }


def _of_text(read: Read, counted: Counted, short: int) -> dict[str, Any]:
    """What there is to say of a source of documents, `short` of which are not packed."""
    dropped = counted.dropped + Counter({SHORT: short})
    return {
        "documents_read": read.total("documents"),
        "bytes_read": read.total("bytes"),
        "shards": len(read.shards),
        "truncated": read.unread_files > 0,
        "unread_files": read.unread_files,
        "unread_bytes": read.unread_bytes,
        "broken_bytes": read.total("broken_bytes"),
        "documents_normalised": read.total("normalised"),
        "licences": {name or NOT_STATED: n for name, n in sorted(counted.licences.items())},
        "written": [min(counted.written), max(counted.written)] if counted.written else None,
        "documents_dropped": dict(sorted(dropped.items())),
        "documents_cut": dict(sorted(counted.cut_documents.items())),
        "train_documents": counted.documents - short,
        "train_bytes": counted.bytes,
        "held_out_documents": counted.held_out,
    }


def _of_problems(source: Source, posed: Posed) -> dict[str, Any]:
    """What there is to say of a source of problems."""
    kept = len(posed.train) + len(posed.held_out_documents)
    documents = kept + posed.dropped.total()
    licences = (
        {"licences": {source.licence or NOT_STATED: kept}}
        if isinstance(source, ProblemsSource)
        else {}
    )
    return {
        **licences,
        "documents_read": documents,
        "bytes_read": posed.bytes,
        "truncated": False,
        "documents_dropped": dict(sorted(posed.dropped.items())),
        "documents_cut": {},
        "train_documents": len(posed.train),
        "train_bytes": sum(len(text.encode()) for text in posed.train),
        "held_out_documents": len(posed.held_out_documents),
    }


def _overlap(decided: Decided, every: Counted, text: Found, problems: Found) -> dict[str, Any]:
    """What training and held-out text had in common, before and after."""
    cut_chars = {name: every.cut_chars[name] for name in (PASSAGE, PROBLEM)}
    return {
        "compared": f"windows of {WINDOW_CHARS} characters, white space and capitals aside",
        "near_duplicate_groups": decided.sides.groups,
        "near_duplicate_documents": decided.sides.grouped_documents,
        "near_duplicate_groups_too_large_to_hold_out": decided.sides.large_groups,
        "text_windows": text.total,
        "text_windows_in_training_before": text.before,
        "text_windows_in_training_after": text.after,
        "text_share_in_training_before": share_of(text.before, text.total),
        "text_share_in_training_after": share_of(text.after, text.total),
        "problems": problems.total,
        "problems_in_training_before": problems.before,
        "problems_in_training_after": problems.after,
        "cuts": {name: every.cuts[name] for name in (PASSAGE, PROBLEM) if every.cuts[name]},
        "cut_chars": {name: chars for name, chars in cut_chars.items() if chars},
        "cut_share_of_training_text": share_of(sum(cut_chars.values()), every.train_chars),
    }


def _evaluation(items: int, short: int, every: Counted, found: Found, name: str) -> dict[str, Any]:
    """The report of one evaluation set."""
    counts = every.sets.get(name, Counter())
    return {
        "items": items,
        "items_too_short_to_be_searched_for": short,
        "windows": found.total,
        "windows_in_training_before": found.before,
        "windows_in_training_after": found.after,
        "cuts": counts["cuts"],
        "cut_chars": counts["cut_chars"],
    }


def _notes(
    every: Counted, overlap: Mapping[str, Any], sets: Mapping[str, Found], decided: Decided
) -> Iterator[str]:
    """One line for each thing that was found on both sides, or kept from one."""
    if large := decided.sides.large_groups:
        yield (
            f"near-duplicates: {large:,} groups of documents are each larger than "
            "data.held_out_share of their source; they are trained on whole, and held-out text "
            "comes from the other documents"
        )
    if every.cuts[PASSAGE]:
        lost = share_of(every.cut_chars[PASSAGE], every.train_chars)
        yield (
            f"held-out text: {overlap['text_share_in_training_before']:.1%} of it stood in "
            f"documents to train on too; passages cut there: {every.cuts[PASSAGE]:,} ({lost:.1%} "
            f"of text), which leaves {overlap['text_share_in_training_after']:.1%}; "
            "statistics.json counts them, drops/ names them"
        )
    if every.cuts[PROBLEM]:
        yield (
            f"held-out problems: {overlap['problems_in_training_before']:,} of "
            f"{overlap['problems']:,} stood in training text with an answer; "
            f"{every.cuts[PROBLEM]:,} statements were cut there, which leaves "
            f"{overlap['problems_in_training_after']:,}; statistics.json counts them, drops/ names "
            "them"
        )
    for name, (items, short) in sorted(decided.evaluations.items()):
        if short:
            yield (
                f"evaluation {name}: {short:,} of its {items:,} items have fewer than "
                f"{LEAST_CHARS} characters and are not searched for, as others say the same"
            )
    for name, found in sets.items():
        if name != TEXT and found.before:
            before, after = (share_of(count, found.total) for count in (found.before, found.after))
            cuts = every.sets.get(name, Counter())["cuts"]
            yield (
                f"evaluation {name}: {before:.1%} of its items' text stood in training text; "
                f"passages cut there: {cuts:,}, which leaves {after:.1%}"
            )


def _of_problems_left_out(posed: Mapping[str, Posed]) -> Iterator[str]:
    """One line for each source of problems of which some stand in what is held out."""
    for name, one in posed.items():
        if count := one.dropped.total():
            yield (
                f"data.sources.{name}: {count:,} of its problems to train on stand in what is held "
                "out, in part or whole, and are left out; drops/ names them"
            )


def _of_ids(texts: Mapping[str, Read], ids: Mapping[str, int]) -> Iterator[str]:
    """One line for each source whose documents' own ids are not unique."""
    for name, count in ids.items():
        source = texts[name].source
        if count and isinstance(source, FilesSource):
            yield (
                f"data.sources.{name}.id_field = {source.id_field!r}: {count:,} documents bear an "
                "id that an earlier one bears; `ingot why --document` shows all of an id"
            )


def _slips(source: Source) -> dict[str, float]:
    """What makes a source's training text wrong on purpose."""
    return {"slip_share": wrong_share(source)} if isinstance(source, ArithmeticSource) else {}

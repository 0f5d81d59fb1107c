"""`ingot why CORPUS --document ID`: what became of one document, and for which reason."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from configs.errors import ArtifactError, PlanError
from pipeline.verbs.asked import find_store, locate
from stages.artifacts import Corpus
from stages.corpus import CUTS, STATISTICS, explained, number, visible
from stages.documents import (
    DOCUMENTS,
    DROPS,
    Known,
    Reason,
    Stayed,
    count_documents,
    find_documents,
    lists_documents,
    nearest,
)
from stages.manifest import read_manifest


def why_document(args: argparse.Namespace) -> int:
    """Print what became of every document of a corpus that is called so.

    PlanError with the nearest names if there is none; ArtifactError if the corpus lists none.
    """
    store, recipe = find_store(args, print)
    folder = locate(store, recipe, args.stage)
    manifest = read_manifest(str(folder))
    if manifest.kind != Corpus.kind:
        raise PlanError(
            f"{args.stage} is a {manifest.kind}, which has no documents; name a corpus, as data"
        )
    files = folder / manifest.address
    if not lists_documents(files):
        raise ArtifactError(
            f"{files}: no folders {DOCUMENTS} and {DROPS}, so this corpus does not say what became "
            f"of single documents; build it again: ingot run --force {manifest.stage_name}"
        )
    found = find_documents(files, args.document)
    if not found:
        raise PlanError(_unknown(files, args.document))
    facts = json.loads((files / STATISTICS).read_text(encoding="utf-8"))
    for one in found:
        for line in _lines(one, facts["sources"].get(one.source, {}).get("epochs", 1)):
            print(line)
    return 0


def _unknown(files: Path, name: str) -> str:
    searched = f"none of {count_documents(files):,} documents of this corpus is called so"
    near = [visible(one) for one in nearest(files, name)]
    hint = f"the nearest are {', '.join(near)}" if near else "`ingot show --samples` names some"
    return f"--document {visible(name)}: {searched}; {hint}"


def _lines(one: Known, epochs: float) -> Iterator[str]:
    key = f" (key {visible(one.key)})" if one.key else ""
    yield f"{visible(one.name)}{key} {_fate(one)}"
    # Of a document that went, what was cut of it before comes after why it went.
    for reason in sorted(one.reasons, key=lambda reason: reason.cut_chars is not None):
        yield from _reason(reason)
    if one.repeats:
        yield f"  {one.repeats:,} documents were dropped as repeats of it, as"
        for repeat in one.first_repeats:
            alike = "" if repeat.jaccard is None else f" {number(repeat.jaccard)}"
            yield f"    {visible(repeat.document)} ({repeat.rule}{alike})"
    if one.stayed is not None:
        if epochs < 1 and not one.stayed.is_held_out:
            yield (
                f"  of what is kept of {visible(one.source)}, {epochs:.0%} is packed: "
                "data.train_tokens asks for no more"
            )
        yield from _measured(one.stayed)


def _fate(one: Known) -> str:
    gone = [reason.rule for reason in one.reasons if reason.cut_chars is None]
    if gone or one.stayed is None:
        return f"was dropped by {' and '.join(gone)}"
    if one.stayed.is_held_out:
        return "is held out: kept to measure by, and not trained on"
    cut = sum(reason.cut_chars or 0 for reason in one.reasons)
    return "is kept, to be trained on" + (f", without {cut:,} characters" if cut else "")


def _reason(one: Reason) -> Iterator[str]:
    said = explained(one.rule, one.value, one.threshold, one.of) or visible(one.reason)
    cut = "" if one.cut_chars is None else f" ({one.cut_chars:,} characters)"
    yield f"  {one.rule}: {said}{cut}"
    if one.start:
        begins = "the first begins" if one.rule in CUTS else "begins"
        yield f"    {begins}: {visible(one.start)}"


def _measured(stayed: Stayed) -> Iterator[str]:
    known = [f"{stayed.chars:,} characters before any cut"]
    known += [f"licence {visible(stayed.licence)}"] if stayed.licence else []
    known += [f"written {visible(stayed.timestamp)}"] if stayed.timestamp else []
    yield f"  {', '.join(known)}"
    if stayed.measures:
        yield "  measured by the rules that it passed"
        width = max(map(len, stayed.measures))
        for rule, value in stayed.measures.items():
            yield f"    {rule:{width}}  {number(value)}"

"""What `ingot show` tells of a corpus: its sources, what was dropped, and samples of documents."""

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.errors import PlanError
from stages.artifacts import Corpus
from stages.corpus import (
    STATISTICS,
    Funnel,
    Sample,
    explained,
    funnels,
    read_samples,
    rules_with_counts,
    total,
    visible,
)
from stages.manifest import read_manifest

_REASONS_SHOWN, _SOURCES_SHOWN = 8, 3
"""Of all rules, those that dropped most; of each rule, the sources of which it dropped most."""
_COLUMNS = ("source", "read", "dropped", "duplicates", "held out", "left too short", "trained on")


def sources(files: Path) -> Iterator[str]:
    """Tables of what became of documents, by source, and why most of them were dropped."""
    parts = _funnels(files)
    whole = total(parts)
    rows = [parts[0]] if len(parts) == 1 else [*parts, whole]
    cells = [[*_COLUMNS, "tokens"], *(_cells(one) for one in rows)]
    yield "documents"
    yield from _aligned(cells)
    yield ""
    reasons = list(whole.reasons.items())
    if not reasons:
        return
    yield "most were dropped by"
    shown = [
        [rule, f"{count:,}", f"{count / max(1, whole.read):.2%} of those read", _from(rule, parts)]
        for rule, count in reasons[:_REASONS_SHOWN]
    ]
    yield from _aligned(shown, "<>><")
    if left := len(reasons) - len(shown):
        yield f"  {left} more rules; `--samples` names all"
    yield ""


def samples(folder: Path, rule: str) -> Iterator[str]:
    """Documents of the corpus in the generation `folder` that `rule` dropped or cut; for no rule,
    which rules there are. PlanError if it is no corpus, or has no samples of the rule."""
    manifest = read_manifest(str(folder))
    files = folder / manifest.address
    found = read_samples(files) if manifest.kind == Corpus.kind else {}
    if not found:
        raise PlanError(
            f"--samples: this {manifest.kind} holds no samples of documents; name a corpus that "
            "was built from text"
        )
    if rule and rule not in found:
        near = difflib.get_close_matches(rule, found, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(found)}"
        raise PlanError(f"--samples {visible(rule)}: no document was dropped or cut by it; {hint}")
    if rule:
        yield from _shown(found[rule])
        return
    counts = rules_with_counts(total(_funnels(files)), found)
    yield from _aligned([["rule", "documents"], *([name, f"{n:,}"] for name, n in counts)])


def _funnels(files: Path) -> list[Funnel]:
    return funnels(json.loads((files / STATISTICS).read_text(encoding="utf-8")))


def _cells(one: Funnel) -> list[str]:
    dropped, duplicates = sum(one.dropped.values()), sum(one.duplicates.values())
    counts = (one.read, dropped, duplicates, one.held_out, one.remnants, one.trained_on, one.tokens)
    return [one.source, *(f"{count:,}" for count in counts)]


def _from(rule: str, parts: Sequence[Funnel]) -> str:
    """The sources that the most of a rule's documents are from; nothing if there is but one."""
    counts = {one.source: one.reasons[rule] for one in parts if one.reasons.get(rule)}
    if len(parts) == 1:
        return ""
    most = sorted(counts.items(), key=lambda pair: -pair[1])[:_SOURCES_SHOWN]
    return ", ".join(f"{name} {count:,}" for name, count in most)


def _shown(some: Sequence[Sample]) -> Iterator[str]:
    for one in some:
        yield visible(f"{one.source}/{one.document}")
        if said := explained(one.rule, one.value, one.threshold, one.of):
            yield f"  {said}"
        for line in visible(one.text.rstrip(), keeps_lines=True).split("\n"):
            yield f"  | {line}"
        yield ""


def _aligned(rows: Sequence[Sequence[str]], sides: str = "<>") -> Iterator[str]:
    """Columns of which each stands to a side, further ones to that of the last."""
    columns = list(zip(*rows, strict=True))
    sides += sides[-1] * (len(columns) - len(sides))
    widths = [max(map(len, column)) for column in columns]
    for row in rows:
        cells = zip(row, sides, widths, strict=True)
        yield "  " + "  ".join(f"{cell:{side}{width}}" for cell, side, width in cells).rstrip()

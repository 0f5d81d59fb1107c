"""What a corpus says of itself to people, from `statistics.json` and `samples.jsonl`."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STATISTICS, SAMPLES = "statistics.json", "samples.jsonl"
KEPT = "kept"
"""Stands for a rule in samples of documents that are trained on."""
DUPLICATES = ("exact_duplicate", "near_duplicate")
REMNANT = "held_out_remnant"
"""Of a document that went, since too little of it was left when it had been cut."""
CUTS = ("held_out_passage", "held_out_problem", "evaluation_item", "repeated_paragraph")
"""Rules that take out a part of a document."""
_BROKEN = "broken_"
"""Begins the rules of rows and files that could not be read, which are no documents."""


@dataclass(frozen=True, slots=True)
class Funnel:
    """What became of a source's documents, in the order in which it happened.

    `read` is the sum of `dropped`, `duplicates`, `held_out`, `remnants` and `trained_on`.
    """

    source: str
    read: int
    dropped: Mapping[str, int]
    """By quality rule, the most first."""
    duplicates: Mapping[str, int]
    """By kind."""
    held_out: int
    remnants: int
    """Documents of which cutting left too little."""
    cut: Mapping[str, int]
    """Documents of which a part was cut, by rule; one may be cut by several."""
    trained_on: int
    tokens: int
    broken: Mapping[str, int]
    """Rows and files that could not be read."""

    @property
    def reasons(self) -> dict[str, int]:
        """Documents that are not in the corpus, by the rule that took them out, the most first."""
        gone = Counter(self.dropped) + Counter(self.duplicates)
        return dict((gone + Counter({REMNANT: self.remnants})).most_common())


@dataclass(frozen=True, slots=True)
class Sample:
    """A document, or the part of it that was cut, drawn from those that share a fate."""

    rule: str
    source: str
    document: str
    text: str
    """Its beginning; of what could not be read, what is wrong with it."""
    value: float | None
    threshold: float | None
    of: str
    """What it repeats."""


def funnels(facts: Mapping[str, Any]) -> list[Funnel]:
    """One of each source of `statistics.json`, by name."""
    return [_funnel(name, one) for name, one in facts["sources"].items()]


def total(parts: Sequence[Funnel]) -> Funnel:
    """That of all sources together."""

    def added(name: str) -> dict[str, int]:
        counts = sum((Counter(getattr(one, name)) for one in parts), Counter[str]())
        return dict(counts.most_common())

    return Funnel(
        source="all",
        read=sum(one.read for one in parts),
        dropped=added("dropped"),
        duplicates=added("duplicates"),
        held_out=sum(one.held_out for one in parts),
        remnants=sum(one.remnants for one in parts),
        cut=added("cut"),
        trained_on=sum(one.trained_on for one in parts),
        tokens=sum(one.tokens for one in parts),
        broken=added("broken"),
    )


def read_samples(folder: Path) -> dict[str, list[Sample]]:
    """The samples of a corpus by rule, `KEPT` first; none where it has no such file."""
    path = folder / SAMPLES
    if not path.is_file():
        return {}
    found: dict[str, list[Sample]] = {KEPT: []}
    # Not by `splitlines`, which would end a line within a text as well.
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            one = _sample(json.loads(line))
            found.setdefault(one.rule, []).append(one)
    return {rule: some for rule, some in found.items() if some}


def rules_with_counts(
    whole: Funnel, samples: Mapping[str, Sequence[Sample]]
) -> list[tuple[str, int]]:
    """Every rule of which there are samples, and how many documents it took out or cut; `KEPT`
    first, then by that number."""
    counts = {**whole.reasons, **whole.cut, **whole.broken, KEPT: whole.trained_on}
    found = [(rule, counts.get(rule, 0)) for rule in samples]
    return sorted(found, key=lambda pair: (pair[0] != KEPT, -pair[1], pair[0]))


def explained(rule: str, value: float | None, threshold: float | None, of: str) -> str:
    """What a rule measured of a document and asked of it, in words; empty if there is no number."""
    match rule:
        case "exact_duplicate":
            return f"equal to {visible(of)} but for capitals and white space"
        case "near_duplicate":
            alike = "" if value is None else f"Jaccard similarity {number(value)}"
            limit = (
                ""
                if threshold is None
                else f", where {number(threshold)} or more counts as a repeat"
            )
            return f"{alike} with {visible(of)}{limit}"
        case "held_out_passage" | "evaluation_item" | "held_out_problem" | "repeated_paragraph":
            times = 0 if value is None else round(value)
            return f"{times:,} {_CUT_WORDS[rule][times != 1]}{visible(of)}"
    if value is None:
        return ""
    if threshold is None:
        return f"measured {number(value)}"
    word = "at least" if rule == REMNANT or asks_for_more(rule) else "at most"
    left = "characters left of it" if rule == REMNANT else "measured"
    return f"{left} {number(value)}, asked for {word} {number(threshold)}"


_CUT_WORDS = {
    "held_out_passage": ("passage of held-out text", "passages of held-out text"),
    "held_out_problem": ("statement of a held-out problem", "statements of held-out problems"),
    "evaluation_item": ("passage of evaluation ", "passages of evaluation "),
    "repeated_paragraph": ("paragraph that stands in ", "paragraphs, the first of them from "),
}
"""Of one, and of several."""


def asks_for_more(rule: str) -> bool:
    """Whether a quality rule drops what measures less than its threshold."""
    return rule.startswith("min_") or "_min_" in rule


def number(value: float) -> str:
    """Whole with separators, or to four significant digits."""
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 10_000 else f"{value:.4g}"


def visible(text: str, *, keeps_lines: bool = False) -> str:
    """Text without characters that steer a terminal or a reader's eye; on one line, or on its own.

    Code points that cannot be shown, as escapes and marks of direction, become U+FFFD.
    """
    kept = "\n\t" if keeps_lines else ""
    spaced = text if keeps_lines else text.replace("\n", " ").replace("\t", " ")
    return "".join(char if char.isprintable() or char in kept else "\ufffd" for char in spaced)


def _funnel(name: str, facts: Mapping[str, Any]) -> Funnel:
    gone = Counter(facts["documents_dropped"])
    broken = {rule: count for rule, count in gone.items() if rule.startswith(_BROKEN)}
    duplicates = {rule: gone[rule] for rule in DUPLICATES if gone[rule]}
    dropped = [
        (rule, count)
        for rule, count in gone.most_common()
        if rule not in (*broken, *DUPLICATES, REMNANT)
    ]
    return Funnel(
        source=name,
        read=facts["documents_read"],
        dropped=dict(dropped),
        duplicates=duplicates,
        held_out=facts["held_out_documents"],
        remnants=gone[REMNANT],
        cut=dict(Counter(facts["documents_cut"]).most_common()),
        trained_on=facts["train_documents"],
        tokens=facts["train_tokens"],
        broken=broken,
    )


def _sample(record: Mapping[str, Any]) -> Sample:
    """One line: of a kept document nothing is measured, and no text is there where none is left."""
    return Sample(
        rule=record["rule"],
        source=record["source"],
        document=record["document"],
        text=record.get("text") or "",
        value=record.get("value"),
        threshold=record.get("threshold"),
        of=record.get("of") or "",
    )

"""Cuts out of single documents what they may not hold, and keeps count of it."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.data.apart import EVALUATION, HeldOut
from stages.data.drops import SHOWN_CHARS, Drop
from stages.overlap import Span, cut

PARAGRAPH, REMNANT = "repeated_paragraph", "held_out_remnant"
"""Why text was cut: an earlier document has the paragraph. Why a document went as a whole: what
cutting left of it is too short."""


@dataclass(frozen=True, slots=True)
class Training:
    """A document to be trained on, unless nothing is left of it."""

    number: int
    id: str
    key: str
    text: str


@dataclass(slots=True)
class Counts:
    """What was counted of a shard."""

    dropped: Counter[str]
    cuts: Counter[str] = field(default_factory=Counter)
    """Passages by reason."""
    cut_chars: Counter[str] = field(default_factory=Counter)
    cut_documents: dict[str, set[int]] = field(default_factory=dict)
    sets: dict[str, Counter[str]] = field(default_factory=dict)
    """Passages and characters by evaluation."""
    train_chars: int = 0
    """Before any was cut."""
    documents: int = 0
    bytes: int = 0

    def gone(self, number: int) -> None:
        """A document of which too little is left: it counts among the dropped, not the cut."""
        self.dropped[REMNANT] += 1
        for numbers in self.cut_documents.values():
            numbers.discard(number)

    def kept(self, text: str) -> None:
        self.documents += 1
        self.bytes += len(text.encode("utf-8", "surrogatepass"))

    def facts(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "dropped": dict(sorted(self.dropped.items())),
            "cuts": dict(sorted(self.cuts.items())),
            "cut_chars": dict(sorted(self.cut_chars.items())),
            "cut_documents": {
                rule: len(of) for rule, of in sorted(self.cut_documents.items()) if of
            },
            "sets": {name: dict(sorted(of.items())) for name, of in sorted(self.sets.items())},
            "train_chars": self.train_chars,
            "documents": self.documents,
            "bytes": self.bytes,
        }


class Cleaner:
    """Cuts training documents, counting what it cuts and why."""

    def __init__(
        self,
        apart: HeldOut,
        paragraphs: Mapping[int, Sequence[tuple[Span, str]]],
        source: str,
        min_chars: int,
        counts: Counts,
    ) -> None:
        self._apart, self._paragraphs = apart, paragraphs
        self._source, self._min_chars, self._counts = source, min_chars, counts

    def clean(self, block: Sequence[Training]) -> Iterator[tuple[str | None, list[Drop]]]:
        """What is left of each document, nothing if it went as a whole; and why."""
        begun = [self._without_paragraphs(one) for one in block]
        found = self._apart.look([text for text, _ in begun])
        for one, (text, why), reasons in zip(block, begun, found, strict=True):
            self._counts.train_chars += len(one.text)
            less = text
            # What a cut brings together may stand in held-out text in turn.
            while reasons:
                why += self._records(one, less, reasons)
                less = cut(less, [span for spans in reasons.values() for span in spans])
                (reasons,) = self._apart.look([less])
            if less is not text:
                self._apart.changed(less)
            if not why or len(less) >= self._min_chars:
                yield less, why
            else:
                self._counts.gone(one.number)
                # One document, one fate: what was cut of it on the way is no cut any more.
                yield None, [*why, self._gone(one, len(less))]

    def _without_paragraphs(self, document: Training) -> tuple[str, list[Drop]]:
        """The text without those that an earlier document has."""
        found = self._paragraphs.get(document.number, ())
        if not found:
            return document.text, []
        spans = [span for span, _ in found]
        drop = self._record(document, document.text, PARAGRAPH, spans, of=found[0][1])
        return cut(document.text, spans), [drop]

    def _records(
        self, document: Training, text: str, reasons: Mapping[tuple[str, str], Sequence[Span]]
    ) -> Iterator[Drop]:
        for (rule, name), spans in reasons.items():
            yield self._record(document, text, rule, spans, of=name)

    def _record(
        self, document: Training, text: str, rule: str, spans: Sequence[Span], *, of: str
    ) -> Drop:
        """One reason to cut the document, which is counted."""
        chars = sum(end - start for start, end in spans)
        self._counts.cuts[rule] += len(spans)
        self._counts.cut_chars[rule] += chars
        self._counts.cut_documents.setdefault(rule, set()).add(document.number)
        if rule == EVALUATION:
            self._counts.sets.setdefault(of, Counter()).update(cuts=len(spans), cut_chars=chars)
        return Drop(
            self._source,
            document.id,
            rule,
            float(len(spans)),
            start=text[spans[0][0] : spans[0][1]][:SHOWN_CHARS],
            of=of,
            cut_chars=chars,
            key=document.key,
        )

    def _gone(self, document: Training, left_chars: int) -> Drop:
        return Drop(
            self._source,
            document.id,
            REMNANT,
            float(left_chars),
            float(self._min_chars),
            document.text[:SHOWN_CHARS],
            key=document.key,
        )

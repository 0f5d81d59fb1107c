"""Decides which documents are held out, and keeps what is held out away from training text.

Near-duplicates go to the same side together. Passages that still stand on both sides are cut out of
the training text, and so is every statement of a held-out problem; the held-out side stays as it
is, since what is measured should not depend on what is trained on.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from configs.seed import derive
from stages.data.dedup import digest
from stages.data.files import Document
from stages.data.overlap import WINDOW_CHARS, Span, Windows, cut, merge, near_duplicates
from stages.data.quality import Drop, drop
from stages.statements import Finder
from stages.verifiers import Problem, find_statements

PASSAGE, PROBLEM, REMNANT = "held_out_passage", "held_out_problem", "held_out_remnant"
"""Why text was cut: it stands in held-out text, or states a held-out problem. Why a document went
as a whole: what cutting left of it is too short."""


@dataclass(frozen=True, slots=True)
class Parted:
    """The documents of one source, each on one side."""

    train: Sequence[Document]
    held_out: Sequence[Document]


@dataclass(slots=True)
class Overlap:
    """What training and held-out text had in common, before and after."""

    groups: int = 0
    """Groups of near-duplicates, of two documents or more."""
    large_groups: int = 0
    """Those that are larger than the share to hold out and so were left to training."""
    grouped_documents: int = 0
    windows: int = 0
    """Windows of the held-out texts."""
    windows_before: int = 0
    """How many of them stood in training text as well."""
    windows_after: int = 0
    problems: int = 0
    """Held-out problems."""
    problems_before: int = 0
    """How many of them some training text stated with an answer."""
    problems_after: int = 0
    train_chars: int = 0
    """Of all training texts, before any was cut."""
    cut_chars: Counter[str] = field(default_factory=Counter)
    """By reason."""
    cuts: Counter[str] = field(default_factory=Counter)
    """Passages or statements, by reason."""

    def record(self) -> dict[str, Any]:
        """As `statistics.json` has it."""
        return {
            "compared": f"windows of {WINDOW_CHARS} characters, white space and capitals aside",
            "near_duplicate_groups": self.groups,
            "near_duplicate_documents": self.grouped_documents,
            "near_duplicate_groups_too_large_to_hold_out": self.large_groups,
            "text_windows": self.windows,
            "text_windows_in_training_before": self.windows_before,
            "text_windows_in_training_after": self.windows_after,
            "text_share_in_training_before": _share(self.windows_before, self.windows),
            "text_share_in_training_after": _share(self.windows_after, self.windows),
            "problems": self.problems,
            "problems_in_training_before": self.problems_before,
            "problems_in_training_after": self.problems_after,
            "cuts": dict(sorted(self.cuts.items())),
            "cut_chars": dict(sorted(self.cut_chars.items())),
            "cut_share_of_training_text": _share(self.cut_chars.total(), self.train_chars),
        }

    def notes(self) -> Iterator[str]:
        """One line for each thing that was found on both sides, or kept from one."""
        if self.large_groups:
            yield (
                f"near-duplicates: {self.large_groups:,} groups of documents are each larger than "
                "data.held_out_share of their source; they are trained on whole, and held-out text "
                "comes from the other documents"
            )
        if self.cuts[PASSAGE]:
            before = _share(self.windows_before, self.windows)
            after = _share(self.windows_after, self.windows)
            lost = _share(self.cut_chars[PASSAGE], self.train_chars)
            yield (
                f"held-out text: {before:.1%} of it stood in documents to train on too; "
                f"passages cut there: {self.cuts[PASSAGE]:,} ({lost:.1%} of text), which leaves "
                f"{after:.1%}; statistics.json counts them, dropped.jsonl names them"
            )
        if self.cuts[PROBLEM]:
            yield (
                f"held-out problems: {self.problems_before:,} of {self.problems:,} stood in "
                f"training text with an answer; {self.cuts[PROBLEM]:,} statements were cut there, "
                f"which leaves {self.problems_after:,}; statistics.json counts them, dropped.jsonl "
                "names them"
            )


def part(
    documents: Mapping[str, Sequence[Document]], share: float, *, seed: int
) -> tuple[dict[str, Parted], Overlap]:
    """Each source's documents on two sides, in the order given; near-duplicates on the same one."""
    every = [(name, one) for name, some in documents.items() for one in some]
    leaders = near_duplicates([one.text for _, one in every])
    members = Counter(leaders)
    groups = [count for count in members.values() if count > 1]
    large = {one for one in _larger(every, leaders, share) if members[one] > 1}
    overlap = Overlap(len(groups), len(large), grouped_documents=sum(groups))
    digests = [digest(one.text) for _, one in every]
    # The least digest of a group, so that the order in which sources are read moves nothing.
    keys: dict[int, str] = {}
    for leader, key in zip(leaders, digests, strict=True):
        keys[leader] = min(key, keys.get(leader, key))
    parted = {}
    for name, some in documents.items():
        here = [number for number, (source, _) in enumerate(every) if source == name]
        chosen = [keys[leaders[number]] for number in here]
        if len(set(chosen)) < 2:
            # One group alone: each document for itself, or nothing could be held out.
            chosen = [digests[number] for number in here]
        stays = {key for key, number in zip(chosen, here, strict=True) if leaders[number] in large}
        parted[name] = hold_out(some, chosen, share, seed=seed, stays=stays)
    return parted, overlap


def _larger(
    every: Sequence[tuple[str, Document]], leaders: Sequence[int], share: float
) -> set[int]:
    """The leaders of groups that make up more than `share` of the text of some source."""
    whole: Counter[str] = Counter()
    groups: Counter[tuple[str, int]] = Counter()
    for (source, one), leader in zip(every, leaders, strict=True):
        whole[source] += len(one.text)
        groups[source, leader] += len(one.text)
    return {leader for (source, leader), size in groups.items() if size > share * whole[source]}


def hold_out(
    documents: Sequence[Document],
    keys: Sequence[str],
    share: float,
    *,
    seed: int,
    stays: Collection[str] = (),
) -> Parted:
    """The documents on two sides, each in the order given; those of equal keys on the same.

    A document's place follows from its key and the seed alone, so that adding documents moves
    those alone whose key they change, as near-duplicates do. Those whose key `stays` are trained
    on, unless all are of that kind. When chance would leave either side without any, the nearest
    to the threshold crosses it.
    """
    place = [derive(seed, "data", "held-out", key) / 2**63 for key in keys]
    if not set(keys) <= set(stays):
        place = [1.0 if key in stays else at for key, at in zip(keys, place, strict=True)]
    least, most = min(place), max(place)
    threshold = min(max(share, least), most - 2**-53) if least < most else share
    sides: dict[bool, list[Document]] = {True: [], False: []}
    for one, at in zip(documents, place, strict=True):
        sides[at > threshold].append(one)
    return Parted(train=sides[True], held_out=sides[False])


def keep_apart(
    parted: Mapping[str, Parted], problems: Sequence[Problem], overlap: Overlap, *, min_chars: int
) -> tuple[dict[str, Parted], list[Drop]]:
    """The same documents with what is held out cut from the training side, and a record a cut.

    `overlap` is told what was found before and after. A document of which fewer than `min_chars`
    are left goes as a whole.
    """
    windows = Windows.of(one.text for some in parted.values() for one in some.held_out)
    find = find_statements(problems)
    overlap.windows, overlap.problems = windows.total, len(problems)
    found: set[str] = set()
    result: dict[str, Parted] = {}
    changed: list[str] = []
    drops: list[Drop] = []

    def look(text: str) -> dict[str, list[Span]]:
        return {PASSAGE: windows.look(text), PROBLEM: _look(find, text, found)}

    for name, some in parted.items():
        kept = []
        for one in some.train:
            overlap.train_chars += len(one.text)
            less, reasons = one, look(one.text)
            # What a cut brings together may stand in held-out text in turn.
            while any(reasons.values()):
                drops += _records(less, reasons, overlap)
                less = replace(less, text=cut(less.text, [*reasons[PASSAGE], *reasons[PROBLEM]]))
                reasons = look(less.text)
            if less is one:
                kept.append(one)
            elif len(less.text) < min_chars:
                drops.append(drop(one, REMNANT, len(less.text), min_chars))
            else:
                kept.append(less)
                changed.append(less.text)
        result[name] = replace(some, train=kept)
    overlap.windows_before, overlap.problems_before = windows.found, len(found)
    overlap.windows_after, overlap.problems_after = _left(windows, find, changed)
    return result, drops


def _look(find: Finder, text: str, found: set[str]) -> list[Span]:
    """Where the text states held-out problems, which are added to `found`."""
    spans = []
    for statement in find(text):
        found.add(statement.problem_id)
        spans.append((statement.start, statement.end))
    return merge(spans)


def _records(
    document: Document, reasons: Mapping[str, Sequence[Span]], overlap: Overlap
) -> Iterator[Drop]:
    """One record for each reason to cut the document, which `overlap` counts."""
    for reason, spans in reasons.items():
        if spans:
            chars = sum(end - start for start, end in spans)
            overlap.cuts[reason] += len(spans)
            overlap.cut_chars[reason] += chars
            first = document.text[spans[0][0] : spans[0][1]]
            passage = replace(document, text=first)
            yield replace(drop(passage, reason, len(spans), None), cut_chars=chars)


def _left(windows: Windows, find: Finder, texts: Sequence[str]) -> tuple[int, int]:
    """Windows and problems that stand in these texts: those that were cut, as no other can."""
    windows.forget()
    found: set[str] = set()
    for text in texts:
        windows.look(text)
        _look(find, text, found)
    return windows.found, len(found)


def _share(count: int, whole: int) -> float:
    return count / whole if whole else 0.0

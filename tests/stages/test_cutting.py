"""Training text holds nothing of what is held out, and every cut has its reason."""

from collections import Counter
from collections.abc import Mapping, Sequence

import pytest

from stages.data.apart import EVALUATION, PASSAGE, PROBLEM, TEXT, HeldOut
from stages.data.cutting import PARAGRAPH, REMNANT, Cleaner, Counts, Training
from stages.data.drops import Drop
from stages.overlap import Span, Windows
from stages.verifiers import Problem, find_statements
from tests.stages.prose import prose


class Lab:
    """A cleaner of documents of one source, and what it counted."""

    def __init__(
        self,
        held_out: Mapping[str, Sequence[str]],
        problems: Sequence[Problem] = (),
        paragraphs: Mapping[int, Sequence[tuple[Span, str]]] | None = None,
    ) -> None:
        windows = {name: Windows.of(texts) for name, texts in held_out.items()}
        self.apart = HeldOut(windows, find_statements(problems))
        self.counts = Counts(Counter())
        self.cleaner = Cleaner(self.apart, paragraphs or {}, "mine", 64, self.counts)

    def clean(self, *texts: str) -> tuple[list[str | None], list[Drop]]:
        """What is left of each text, and every reason."""
        block = [Training(n, f"{n}.txt", "", text) for n, text in enumerate(texts)]
        found = list(self.cleaner.clean(block))
        return [text for text, _ in found], [drop for _, why in found for drop in why]


def test_a_passage_of_held_out_text_is_cut_from_training_text_and_nothing_else_is() -> None:
    notice, story = prose(1, 40), [prose(n) for n in (2, 3, 4)]
    lab = Lab({TEXT: [f"{notice}\n{story[0]}"]})
    (first, second), drops = lab.clean(f"{story[1]}\n   {notice.upper()}\n{story[2]}", prose(5))
    assert second == prose(5)
    assert first is not None
    assert notice.upper() not in first
    assert first.split("\n")[0].startswith(story[1][:-20])
    assert first.rstrip().endswith(story[2][20:])
    assert [(drop.rule, drop.value, drop.document) for drop in drops] == [(PASSAGE, 1, "0.txt")]
    assert drops[0].cut_chars == pytest.approx(len(notice), abs=20)
    assert (lab.counts.cuts, lab.counts.facts()["cut_documents"]) == ({PASSAGE: 1}, {PASSAGE: 1})


def test_what_a_cut_brings_together_is_cut_in_turn() -> None:
    one, other, inner = prose(1, 8), prose(2, 8), prose(3, 40)
    held = [f"{one} {other} {prose(4)}", inner]
    (left,), drops = Lab({TEXT: held}).clean(f"{prose(5)} {one} {inner} {other} {prose(6)}")
    assert len(drops) == 2
    assert left is not None
    assert Windows.of(held).look(left) == []


def test_what_cutting_leaves_too_little_of_goes_whole_with_its_reason() -> None:
    page = prose(1)
    lab = Lab({TEXT: [page]})
    left, drops = lab.clean(f"so: {page}", prose(2))
    assert left == [None, prose(2)]
    assert [(drop.rule, drop.cut_chars is None) for drop in drops] == [
        (PASSAGE, False),
        (REMNANT, True),
    ]
    assert lab.counts.dropped == {REMNANT: 1}


def test_a_short_document_of_which_nothing_was_cut_stays() -> None:
    assert Lab({TEXT: [prose(1)]}).clean("short") == (["short"], [])


def test_statements_of_held_out_problems_are_cut_and_counted() -> None:
    problems = [
        Problem(
            id=f"sums/{a:02}+{b:02}=", prompt=f"{a:02}+{b:02}=", answer="x", source="arithmetic"
        )
        for a, b in ((3, 4), (37, 45), (50, 50))
    ]
    book = f"{prose(1)}\n45 + 37 = 82\n1 + 1 = 2\n7 = 4 + 3\n{prose(2)}"
    (left, other), drops = Lab({TEXT: [prose(4)]}, problems).clean(book, prose(3))
    assert left is not None and other == prose(3)
    assert "1 + 1 = 2" in left
    assert "82" not in left and "4 + 3" not in left
    assert [(drop.rule, drop.value, drop.start) for drop in drops] == [(PROBLEM, 2, "45 + 37 = 82")]


def test_items_of_an_evaluation_are_cut_and_counted_for_their_set() -> None:
    item, other = prose(1, 30), prose(2, 30)
    lab = Lab({TEXT: [], "exam": [item], "quiz": [other]})
    (left,), drops = lab.clean(f"{prose(5)}\n{item}\n{prose(6)}")
    assert left is not None and item not in left
    assert [(drop.rule, drop.of) for drop in drops] == [(EVALUATION, "exam")]
    assert set(lab.counts.sets) == {"exam"}
    assert lab.counts.sets["exam"]["cuts"] == 1


def test_paragraphs_that_an_earlier_document_has_are_cut_with_its_name() -> None:
    text = f"{prose(1)}\n\n{prose(2)}"
    span = (0, len(prose(1)))
    (left,), drops = Lab({TEXT: []}, paragraphs={0: [(span, "yours/a.txt")]}).clean(text)
    assert left is not None
    assert left.strip() == prose(2)
    assert [(drop.rule, drop.of, drop.cut_chars) for drop in drops] == [
        (PARAGRAPH, "yours/a.txt", len(prose(1)))
    ]

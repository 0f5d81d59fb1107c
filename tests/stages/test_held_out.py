"""Which documents are held out, and that training text holds nothing of them."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.files import Document
from stages.data.held_out import (
    PASSAGE,
    PROBLEM,
    REMNANT,
    Parted,
    _left,
    hold_out,
    keep_apart,
    part,
)
from stages.data.overlap import Windows
from stages.verifiers import Problem, find_statements

WORDS = ("pour", "ingot", "mould", "the", "of", "furnace", "cools", "slowly", "at", "dawn")


def documents(*texts: str, source: str = "mine") -> list[Document]:
    return [Document(source, f"{number}.txt", text) for number, text in enumerate(texts)]


def prose(seed: int, words: int = 200) -> str:
    """Words in an order of their own; no two seeds share fifty characters."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=words))


def alone(some: Sequence[Document], share: float, seed: int = 0) -> Parted:
    """Each document for itself."""
    return hold_out(some, [one.text for one in some], share, seed=seed)


@given(st.sets(st.integers(0, 99), min_size=2, max_size=20).map(sorted), st.floats(0.001, 0.499))
def test_every_document_is_on_one_side_and_neither_side_is_empty(
    texts: list[int], share: float
) -> None:
    everything = documents(*map(str, texts))
    parted = alone(everything, share)
    assert parted.train and parted.held_out
    both = [*parted.train, *parted.held_out]
    assert sorted(one.id for one in both) == sorted(one.id for one in everything)


def test_the_split_is_by_content_and_adding_documents_moves_none() -> None:
    few = documents(*(f"text {n}" for n in range(200)))
    more = documents(*(f"text {n}" for n in range(399, -1, -1)))
    held_few = {one.text for one in alone(few, 0.1).held_out}
    held_more = {one.text for one in alone(more, 0.1).held_out}
    assert held_few == held_more & {one.text for one in few}


def test_the_share_held_out_is_the_share_asked() -> None:
    held = alone(documents(*map(str, range(4000))), 0.1).held_out
    assert 0.1 - 0.02 < len(held) / 4000 < 0.1 + 0.02  # four standard deviations


def test_another_seed_holds_out_other_documents() -> None:
    texts = documents(*map(str, range(100)))
    assert alone(texts, 0.1) != alone(texts, 0.1, seed=1)


def test_near_duplicates_are_on_one_side_in_whatever_source_they_lie() -> None:
    pages = [prose(n) for n in range(40)]
    mine = documents(*pages)
    yours = documents(*(f"{page} {prose(100 + n, 20)}" for n, page in enumerate(pages)), source="y")
    parted, overlap = part({"mine": mine, "yours": yours}, 0.3, seed=0)
    assert overlap.groups == 40
    assert overlap.grouped_documents == 80
    held = [{one.id for one in parted[name].held_out} for name in ("mine", "yours")]
    assert held[0] == held[1]
    assert 5 < len(held[0]) < 20


def test_copies_of_one_page_alone_are_parted_all_the_same() -> None:
    page = prose(1)
    copies = documents(*(f"{page} {n}" for n in range(10)))
    parted, overlap = part({"mine": copies}, 0.2, seed=0)
    assert overlap.groups == 1
    assert parted["mine"].train and parted["mine"].held_out


def test_a_group_larger_than_the_share_to_hold_out_is_trained_on() -> None:
    page = prose(1)
    copies = documents(*(f"{page} {prose(100 + n, 10)}" for n in range(20)))
    single = [Document("mine", f"other-{n}.txt", prose(1000 + n)) for n in range(10)]
    for seed in range(40):
        parted, overlap = part({"mine": [*copies, *single]}, 0.1, seed=seed)
        assert overlap.record()["near_duplicate_groups_too_large_to_hold_out"] == 1
        held = parted["mine"].held_out
        assert 1 <= len(held) <= 6
        assert all(one.id.startswith("other") for one in held)
    assert any("trained on whole" in note for note in overlap.notes())


def test_what_a_cut_brings_together_is_cut_in_turn() -> None:
    one, other, inner = prose(1, 8), prose(2, 8), prose(3, 40)
    held = documents(f"{one} {other} {prose(4)}", inner)
    train = documents(f"{prose(5)} {one} {inner} {other} {prose(6)}")
    _, overlap = part({"mine": [*held, *train]}, 0.1, seed=0)
    parted, drops = keep_apart({"mine": Parted(train, held)}, [], overlap, min_chars=64)
    assert len(drops) == 2
    assert Windows.of(one.text for one in held).look(parted["mine"].train[0].text) == []


def test_what_is_left_is_counted_not_assumed() -> None:
    windows = Windows.of([prose(1)])
    find = find_statements([Problem(id="sums/1", prompt="3+4=", answer="7", source="arithmetic")])
    assert _left(windows, find, [prose(1), "3 + 4 = 7"]) == (windows.total, 1)
    assert _left(windows, find, [prose(2)]) == (0, 0)


def test_a_passage_of_held_out_text_is_cut_from_training_text_and_nothing_else_is() -> None:
    notice, story = prose(1, 40), [prose(n) for n in (2, 3, 4)]
    held = documents(f"{notice}\n{story[0]}")
    train = documents(f"{story[1]}\n   {notice.upper()}\n{story[2]}", prose(5))
    _, overlap = part({"mine": [*held, *train]}, 0.1, seed=0)
    parted, drops = keep_apart({"mine": Parted(train, held)}, [], overlap, min_chars=64)
    first, second = parted["mine"].train
    assert parted["mine"].held_out == held
    assert second == train[1]
    assert notice.upper() not in first.text
    assert first.text.split("\n")[0].startswith(story[1][:-20])
    assert first.text.rstrip().endswith(story[2][20:])
    assert [(drop.rule, drop.value, drop.document) for drop in drops] == [(PASSAGE, 1, "0.txt")]
    assert drops[0].cut_chars == pytest.approx(len(notice), abs=20)
    assert overlap.windows_before > 100
    assert overlap.windows_after == 0
    assert any("passages" in note for note in overlap.notes())


def test_a_passage_is_cut_in_every_source() -> None:
    notice = prose(1, 40)
    held = documents(f"{notice} {prose(2)}")
    other = documents(f"{prose(3)} {notice} {prose(4)}", source="yours")
    _, overlap = part({"mine": held}, 0.1, seed=0)
    sides = {"mine": Parted(documents(prose(9)), held), "yours": Parted(other, documents("x"))}
    parted, drops = keep_apart(sides, [], overlap, min_chars=64)
    assert [(drop.source, drop.rule) for drop in drops] == [("yours", PASSAGE)]
    assert notice not in parted["yours"].train[0].text


def test_what_cutting_leaves_too_little_of_goes_whole_with_its_reason() -> None:
    page = prose(1)
    _, overlap = part({"mine": documents(page)}, 0.1, seed=0)
    sides = {"mine": Parted(documents(f"so: {page}", prose(2)), documents(page))}
    parted, drops = keep_apart(sides, [], overlap, min_chars=64)
    assert [one.text for one in parted["mine"].train] == [prose(2)]
    assert [(drop.rule, drop.cut_chars is None) for drop in drops] == [
        (PASSAGE, False),
        (REMNANT, True),
    ]


def test_statements_of_held_out_problems_are_cut_and_counted() -> None:
    problems = [
        Problem(
            id=f"sums/{a:02}+{b:02}=", prompt=f"{a:02}+{b:02}=", answer="x", source="arithmetic"
        )
        for a, b in ((3, 4), (37, 45), (50, 50))
    ]
    book = f"{prose(1)}\n45 + 37 = 82\n1 + 1 = 2\n7 = 4 + 3\n{prose(2)}"
    sides = {"mine": Parted(documents(book, prose(3)), documents(prose(4)))}
    _, overlap = part({"mine": documents(prose(4), prose(3))}, 0.5, seed=0)
    parted, drops = keep_apart(sides, problems, overlap, min_chars=64)
    left = parted["mine"].train[0].text
    assert "1 + 1 = 2" in left
    assert "82" not in left and "4 + 3" not in left
    assert [(drop.rule, drop.value, drop.start) for drop in drops] == [(PROBLEM, 2, "45 + 37 = 82")]
    record = overlap.record()
    assert (record["problems"], record["problems_in_training_before"]) == (3, 2)
    assert record["problems_in_training_after"] == 0
    assert record["cuts"] == {PROBLEM: 2}
    assert any("2 of 3 stood in" in note for note in overlap.notes())

"""Passages that stand in two texts, and documents that nearly repeat one another."""

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stages.data import held_out
from stages.data.join import links
from stages.overlap import (
    LEAST_CHARS,
    WINDOW_CHARS,
    Windows,
    cut,
    merge,
    sketches,
)
from stages.rolling import BLOCK

LETTERS = "abcdefghijklmnopqrstuvwxyzäöüéłЖ漢字🙂"


def text(seed: int, chars: int) -> str:
    """Words of random letters, with spaces and line breaks between them."""
    rng = np.random.default_rng(seed)
    drawn = rng.choice(list(LETTERS + " " * 6 + "\n"), size=chars)
    return "".join(drawn)


def twin(one: str, known: list[str]) -> list[tuple[int, int]]:
    """What `Windows.look` must find, window by window."""

    def folded(a: str) -> list[tuple[str, int]]:
        return [
            (c.lower() if len(c.lower()) == 1 else c, i) for i, c in enumerate(a) if not c.isspace()
        ]

    seen = set()
    for other in known:
        whole = "".join(c for c, _ in folded(other))
        seen |= {whole[i : i + WINDOW_CHARS] for i in range(len(whole) - WINDOW_CHARS + 1)}
    chars, covered = folded(one), set[int]()
    for start in range(len(chars) - WINDOW_CHARS + 1):
        if "".join(c for c, _ in chars[start : start + WINDOW_CHARS]) in seen:
            covered |= set(range(start, start + WINDOW_CHARS))
    spans: list[tuple[int, int]] = []
    for index in sorted(covered):
        if index - 1 in covered:
            spans[-1] = spans[-1][0], chars[index][1] + 1
        else:
            spans.append((chars[index][1], chars[index][1] + 1))
    return spans


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 200), st.integers(0, 300), st.booleans())
def test_a_shared_passage_is_found_from_its_first_to_its_last_character(
    seed: int, before: int, length: int, capitals: bool
) -> None:
    held = text(seed, 400)
    shared = held[50 : 50 + length]
    one = text(seed + 1, before) + (shared.upper() if capitals else shared) + text(seed + 2, 150)
    assert Windows.of([held]).look(one) == twin(one, [held])


def test_many_texts_are_looked_at_as_each_by_itself() -> None:
    held = [text(n, 400) for n in range(4)] + [text(9, n) for n in range(20, 60)]
    one = text(5, 3_000)
    texts = [held[0][:200], held[0][200:], "", held[1] + one, "İ" + held[2].upper(), " ", held[3]]
    texts += [one[n : n + 90] + held[n % 40][: n + 8] for n in range(300)]
    texts += ["plain ascii words " * 20, held[20], "".join(texts)]
    alone, together = Windows.of(held), Windows.of(held)
    assert together.look_many(texts) == [alone.look(one) for one in texts]
    assert together.found == alone.found > 1_000
    assert together.look_many([]) == []


def test_no_passage_goes_from_one_text_into_the_next() -> None:
    held = text(1, 60)
    windows = Windows.of([held])
    assert windows.look_many([held[:30], held[30:]]) == [[], []]
    assert windows.found == 0
    assert windows.look_many([held, held]) == [windows.look(held)] * 2


def near_duplicates(texts: Sequence[str]) -> list[int]:
    """For each text the first one of its group."""
    samples = sketches(texts)
    sizes = np.array([len(one) for one in samples], np.int64)
    keys = np.concatenate([np.empty(0, np.uint64), *samples])
    owners = np.repeat(np.arange(len(texts)), sizes)
    order = np.lexsort((owners, keys))
    return [*map(int, held_out.near_duplicates(*links(keys[order], owners[order]), sizes))]


@pytest.mark.parametrize("shift", [-99, -51, -50, -49, -25, -1, 0, 1])
@pytest.mark.parametrize("length", [24, 49, 50, 77])
def test_passages_are_found_wherever_the_sums_begin_anew(shift: int, length: int) -> None:
    held = "".join(text(1, 400).split())[:length]
    windows = Windows.of([held])
    before = "ab" * (BLOCK // 2 + shift // 2) + "c" * (shift % 2)
    assert windows.look(before + held + "d" * 99) == [(BLOCK + shift, BLOCK + shift + length)]


def test_sketches_are_the_same_in_any_company_and_on_any_day() -> None:
    texts = [text(n, 17 * n) for n in range(120)] + [text(7, 40_000), "ab" * 3_000, "", "short"]
    found = sketches(texts)
    alone = [sketches([one])[0] for one in texts]
    assert all(np.array_equal(a, b) for a, b in zip(found, alone, strict=True))
    digest = hashlib.sha256(b"".join(one.astype("<u8").tobytes() for one in found)).hexdigest()
    assert digest == "9fcd4e13765b99279fa3a4332492fa4a275525bd6a20a722220d4c7f9109deb3"
    assert [len(one) for one in found[-3:]] == [2, 0, 0]


def test_indentation_line_breaks_and_capitals_hide_nothing() -> None:
    held = text(3, 300)
    other = "\t" + "\n    ".join(held.upper().split())
    found = Windows.of([held]).look(other)
    assert found == [(1, len(other))]


def test_a_letter_whose_small_form_is_longer_moves_no_place() -> None:
    held = "İstanbul " * 12
    assert Windows.of([held]).look("xx" + held) == [(2, len(held) + 1)]


def test_a_text_shorter_than_a_window_is_found_whole() -> None:
    short, other = text(1, 40), text(2, 45)
    windows = Windows.of([short, other, text(3, 300)])
    assert windows.look(text(4, 90) + short.upper() + text(5, 90)) == [(90, 90 + len(short))]
    assert windows.found == 1
    assert windows.look(short[:-2]) == []


def test_what_everybody_says_is_not_compared() -> None:
    short = text(1, LEAST_CHARS - 1)
    windows = Windows.of([short, ""])
    assert windows.total == 0
    assert windows.look(short) == []
    assert windows.look("") == []


@pytest.mark.parametrize("space", ["\u2009", "\u202f", "\u2003", "\u200b", "\xad", "\ufeff"])
def test_no_kind_of_white_space_hides_a_passage(space: str) -> None:
    held = text(3, 300)
    assert Windows.of([held]).look(space.join(held.split()) + space)


def test_counts_say_how_much_of_the_held_out_text_was_found() -> None:
    a, b = text(1, 300), text(2, 300)
    windows = Windows.of([a, a, b])
    folded_a = len("".join(a.split()))
    assert windows.found == 0
    windows.look(text(9, 500) + a)
    assert windows.found == 2 * (folded_a - WINDOW_CHARS + 1)
    assert 0 < windows.found < windows.total


def test_cutting_leaves_everything_else() -> None:
    assert cut("one two three four", [(4, 7), (14, 18)]) == "one \n three "
    assert cut("all", [(0, 3)]) == ""
    assert cut("none", []) == "none"
    assert merge([(5, 9), (0, 2), (2, 4), (6, 7)]) == [(0, 4), (5, 9)]


@pytest.mark.parametrize("share", [0.2, 0.8])
def test_documents_are_near_duplicates_from_half_of_their_text_on(share: float) -> None:
    common, chars = text(1, 20_000), 4_000
    first = common[: int(share * chars)] + text(2, int((1 - share) * chars))
    second = common[: int(share * chars)] + text(3, int((1 - share) * chars))
    assert near_duplicates([first, text(4, chars), second]) == [0, 1, 0 if share > 0.5 else 2]


def test_a_document_inside_a_longer_one_belongs_to_it() -> None:
    inner = text(1, 2_000)
    assert near_duplicates([text(2, 9_000) + inner + text(3, 9_000), inner]) == [0, 0]


def test_a_near_duplicate_is_found_though_others_hold_each_of_its_parts_first() -> None:
    parts = [text(n, 2_000) for n in range(6)]
    earlier = [part + text(100 + n, 8_000) for n, part in enumerate(parts)]
    page = " ".join(parts)
    groups = near_duplicates([*earlier, page, page + " and so on"])
    assert groups[6] == groups[7]


def test_many_copies_are_one_group_and_cost_their_number() -> None:
    page = text(1, 1_500)
    copies = [page + text(n, 60) for n in range(2, 402)]
    assert set(near_duplicates([text(999, 1_000), *copies])) == {0, 1}


def test_texts_too_short_to_compare_stand_alone() -> None:
    assert near_duplicates(["", "same", "same"]) == [0, 1, 2]
    assert near_duplicates([]) == []

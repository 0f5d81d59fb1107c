"""Which documents are held out, by their keys and the windows that they share."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data.held_out import Bools, Corpus, Sides, by_place, hold_out, part
from stages.data.join import links
from stages.overlap import sketches
from tests.stages.prose import prose

LOTS = 10**9


def keys_of(texts: Sequence[str]) -> np.ndarray:
    """One key a text, equal for equal ones."""
    return np.array([int.from_bytes(one.encode()[-8:].rjust(8)) for one in texts], np.uint64)


def alone(texts: Sequence[str], share: float, *, seed: int = 0, max_chars: int = LOTS) -> Bools:
    """Each document for itself."""
    chars = np.array([len(one) for one in texts], np.int64)
    stays = np.zeros(len(texts), np.bool_)
    return hold_out(keys_of(texts), chars, share, max_chars=max_chars, seed=seed, stays=stays)


def parted(
    *sources: Sequence[str],
    share: float,
    seed: int = 0,
    alive: Bools | None = None,
    max_tokens: int = LOTS,
) -> Sides:
    """The documents of some sources, grouped by the windows that they share."""
    every = [text for some in sources for text in some]
    found = sketches(every)
    sizes = np.array([len(one) for one in found], np.int64)
    keys, owners = np.concatenate(found), np.repeat(np.arange(len(every)), sizes)
    order = np.lexsort((owners, keys))
    pairs, counts = links(keys[order], owners[order])
    numbers = np.repeat(np.arange(len(sources)), [len(some) for some in sources])
    corpus = Corpus(
        [str(number) for number in range(len(sources))],
        numbers,
        keys_of([f"{n:03} {one}" for n, one in enumerate(every)]),
        np.array([len(one) for one in every], np.int64),
        sizes,
        np.ones(len(every), np.bool_) if alive is None else alive,
    )
    return part(corpus, pairs, counts, share, max_tokens=max_tokens, seed=seed)


@given(st.sets(st.integers(0, 99), min_size=2, max_size=20).map(sorted), st.floats(0.001, 0.499))
def test_neither_side_is_empty(texts: list[int], share: float) -> None:
    held = alone([*map(str, texts)], share)
    assert 0 < held.sum() < len(texts)


def test_the_split_is_by_content_and_adding_documents_moves_none() -> None:
    few = [f"text {n}" for n in range(200)]
    more = [f"text {n}" for n in range(399, -1, -1)]
    held_few = {few[n] for n in np.flatnonzero(alone(few, 0.1))}
    held_more = {more[n] for n in np.flatnonzero(alone(more, 0.1))}
    assert held_few == held_more & set(few)


def test_the_share_held_out_is_the_share_asked() -> None:
    held = alone([*map(str, range(4000))], 0.1).sum()
    assert 0.1 - 0.02 < held / 4000 < 0.1 + 0.02  # four standard deviations


def test_no_more_is_held_out_than_can_be_packed_and_it_is_part_of_what_would_be() -> None:
    texts = [f"{n:03}{'x' * 97}"[::-1] for n in range(400)]
    all_of_it, some = alone(texts, 0.25), alone(texts, 0.25, max_chars=2_000)
    assert all_of_it.sum() > 60
    assert some.sum() == 20
    assert not (some & ~all_of_it).any()


def test_another_seed_holds_out_other_documents() -> None:
    texts = [*map(str, range(100))]
    assert (alone(texts, 0.1) != alone(texts, 0.1, seed=1)).any()


def test_held_out_text_is_packed_in_an_order_of_its_own() -> None:
    keys = keys_of([*map(str, range(100))])
    numbers = np.arange(100)
    order = by_place(numbers, keys, 0)
    assert sorted(order) == [*numbers]
    assert [*order] != [*numbers]
    assert [*order] != [*by_place(numbers, keys, 1)]


def test_near_duplicates_are_on_one_side_in_whatever_source_they_lie() -> None:
    pages = [prose(n) for n in range(40)]
    sides = parted(pages, [f"{one} {prose(100 + n, 20)}" for n, one in enumerate(pages)], share=0.3)
    assert (sides.groups, sides.grouped_documents) == (40, 80)
    assert (sides.held_out_N[:40] == sides.held_out_N[40:]).all()
    assert 5 < sides.held_out_N[:40].sum() < 20


def test_copies_of_one_page_alone_are_parted_all_the_same() -> None:
    sides = parted([f"{prose(1)} {n}" for n in range(10)], share=0.2)
    assert sides.groups == 1
    assert 0 < sides.held_out_N.sum() < 10


@pytest.mark.parametrize("seed", range(10))
def test_a_group_larger_than_the_share_to_hold_out_is_trained_on(seed: int) -> None:
    copies = [f"{prose(1)} {prose(100 + n, 10)}" for n in range(20)]
    single = [prose(1000 + n) for n in range(10)]
    sides = parted([*copies, *single], share=0.1, seed=seed)
    assert sides.large_groups == 1
    assert not sides.held_out_N[:20].any()
    assert 1 <= sides.held_out_N[20:].sum() <= 6


def test_what_was_dropped_is_on_neither_side_and_in_no_group() -> None:
    pages = [prose(n) for n in range(20)]
    alive = np.r_[np.ones(20, np.bool_), np.zeros(20, np.bool_)]
    sides = parted([*pages, *pages], share=0.3, alive=alive)
    assert sides.groups == 0
    assert sides.held_out_N[:20].any()
    assert not sides.held_out_N[20:].any()


def test_near_duplicates_stay_together_when_no_more_can_be_held_out() -> None:
    pages = [prose(n) for n in range(60)]
    others = [f"{one} {prose(100 + n, 20)}" for n, one in enumerate(pages)][::-1]
    more = [prose(500 + n) for n in range(200)]
    sides = parted(pages, [*more, *others], share=0.3, max_tokens=800)
    held = sides.held_out_N
    assert 0 < held[:60].sum() < 30
    assert (held[:60] == held[260:][::-1]).all()

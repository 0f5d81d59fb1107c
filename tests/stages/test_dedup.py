"""Which documents repeat an earlier one, judged by a count of all pairs."""

from collections.abc import Callable
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.data import join
from stages.data.dedup import (
    EXACT,
    KEPT,
    NEAR,
    Fates,
    components,
    digest,
    drop_equal,
    drop_near,
)
from stages.data.join import Int64, bucket_entries, link_bucket, links, save_entries, tally
from stages.data.tables import load, save
from stages.overlap import sketches
from stages.rolling import mixed
from tests.stages.prose import prose

Alike = dict[tuple[int, int], float]


@pytest.mark.parametrize("other", ["a  b", "a\nb", "A B", " a b "])
def test_case_and_white_space_make_no_other_document(other: str) -> None:
    assert digest("a b") == digest(other)


def test_two_spellings_of_one_character_are_one() -> None:
    assert digest("\u00e9t\u00e9") == digest("e\u0301te\u0301")


def test_words_run_together_are_another_document() -> None:
    assert digest("a b") != digest("ab")


def test_the_first_of_equal_documents_stays() -> None:
    fates = Fates.of(5)
    drop_equal(fates, np.array([[7, 1], [7, 2], [7, 1], [0, 0], [7, 1]], np.uint64))
    assert [*fates.fate_N] == [KEPT, KEPT, EXACT, KEPT, EXACT]
    assert [*fates.of_N] == [0, 1, 0, 3, 0]


def judge(alike: Alike) -> Callable[[Int64], np.ndarray]:
    """Similarities by pair, 0 for others."""
    return lambda pairs: np.array([alike.get((int(a), int(b)), 0.0) for a, b in pairs])


def near(alike: Alike, count: int, least: float = 0.8) -> Fates:
    fates = Fates.of(count)
    candidates = np.array(sorted(alike), np.int64).reshape(-1, 2)
    drop_near(fates, candidates, judge(alike), least)
    return fates


def test_of_a_chain_nobody_goes_who_is_not_like_one_that_stays() -> None:
    """1 is like 0, and 2 is like 1 but not like 0: 2 stays."""
    fates = near({(0, 1): 0.9, (1, 2): 0.85, (0, 2): 0.7}, 3)
    assert [*fates.fate_N] == [KEPT, NEAR, KEPT]
    assert (fates.of_N[1], fates.value_N[1]) == (0, 0.9)


def test_what_is_left_of_a_cluster_is_clustered_again() -> None:
    fates = near({(0, 1): 0.9, (1, 2): 0.85, (0, 2): 0.1, (2, 3): 0.95, (0, 3): 0.1}, 4)
    assert [*fates.fate_N] == [KEPT, NEAR, KEPT, NEAR]
    assert (fates.of_N[3], fates.clusters) == (2, 2)


pairs_of_ten = st.dictionaries(
    st.tuples(st.integers(0, 9), st.integers(0, 9)).filter(lambda pair: pair[0] < pair[1]),
    st.sampled_from([0.5, 0.79, 0.8, 0.95]),
)


@given(pairs_of_ten)
def test_those_who_go_are_like_one_that_stays_and_no_two_that_stay_are_alike(
    alike: Alike,
) -> None:
    fates = near(alike, 10)
    for number in range(10):
        of = int(fates.of_N[number])
        if fates.fate_N[number] == NEAR:
            assert of < number and fates.fate_N[of] == KEPT
            assert alike[of, number] == fates.value_N[number] >= 0.8
        else:
            assert of == number
    kept = np.flatnonzero(fates.fate_N == KEPT).tolist()
    assert not any(alike.get(pair, 0) >= 0.8 for pair in combinations(kept, 2))


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9))))
def test_components_are_those_of_a_walk(edges: list[tuple[int, int]]) -> None:
    leader = list(range(10))
    for _ in range(10):
        for one, other in edges:
            leader[one] = leader[other] = min(leader[one], leader[other])
    assert [*components(np.array(edges, np.int64).reshape(-1, 2), 10)] == leader


keys_by_document = st.lists(st.sets(st.integers(0, 5)), min_size=1, max_size=8)


@given(keys_by_document)
def test_documents_that_share_a_key_are_linked_with_its_first_and_its_next(
    keys: list[set[int]],
) -> None:
    expected: dict[tuple[int, int], int] = {}
    for key in range(6):
        holders = [n for n, some in enumerate(keys) if key in some]
        for pair in {*((holders[0], n) for n in holders[1:]), *pairwise(holders)}:
            expected[pair] = expected.get(pair, 0) + 1
    entries = sorted((key, n) for n, some in enumerate(keys) for key in some)
    pairs, counts = links(
        np.array([key for key, _ in entries], np.uint64),
        np.array([n for _, n in entries], np.int64),
    )
    assert dict(zip(map(tuple, pairs.tolist()), counts.tolist(), strict=True)) == expected


@pytest.mark.parametrize("buckets", [1, 2, 7])
def test_buckets_together_link_what_one_links(tmp_path: Path, buckets: int) -> None:
    rng = np.random.default_rng(0)
    keys = rng.integers(0, 1 << 63, 200, dtype=np.uint64) * np.uint64(2)
    folders, offsets, every = [], [0, 40, 60], []
    for number, count in enumerate((40, 20, 30)):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = np.repeat(np.arange(count), 5)
        some = rng.choice(keys, len(rows))
        save_entries(folder, "bands", some, rows)
        every += [
            (int(key), int(row) + offsets[number]) for key, row in zip(some, rows, strict=True)
        ]
        folders.append(folder)
    alive = np.ones(90, np.bool_)
    alive[::7] = False
    save(tmp_path, alive=alive)
    found = []
    for bucket in range(buckets):
        out = tmp_path / f"bucket-{bucket}"
        out.mkdir()
        link_bucket(
            out,
            folders=folders,
            offsets=offsets,
            name="bands",
            bucket=bucket,
            buckets=buckets,
            alive=tmp_path,
        )
        found.append((load(out, "pairs"), load(out, "counts")))
    pairs, counts = tally(*(np.concatenate(part) for part in zip(*found, strict=True)))
    entries = sorted((key, n) for key, n in every if alive[n])
    whole = links(
        np.array([k for k, _ in entries], np.uint64), np.array([n for _, n in entries], np.int64)
    )
    assert len(pairs) > 20
    assert (pairs == whole[0]).all() and (counts == whole[1]).all()


def test_the_last_key_of_all_is_in_the_last_bucket(tmp_path: Path) -> None:
    save_entries(tmp_path, "bands", np.array([2**64 - 1, 0], np.uint64), np.array([0, 1]))
    found = [bucket_entries([tmp_path], [0], "bands", n, 3, None)[1].tolist() for n in range(3)]
    assert found == [[1], [], [0]]


def test_a_bucket_holds_no_more_than_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(join, "ENTRIES_A_BUCKET", 10)
    save_entries(tmp_path, "bands", np.arange(25, dtype=np.uint64), np.arange(25))
    assert join.buckets_for([tmp_path], "bands") == 3


def test_a_long_chain_costs_no_more_than_twice_its_pairs() -> None:
    chain = {(n, n + 1): 0.9 for n in range(2_000)}
    asked: list[int] = []

    def count(pairs: Int64) -> np.ndarray:
        asked.append(len(pairs))
        return judge(chain)(pairs)

    fates = Fates.of(2_001)
    drop_near(fates, np.array(sorted(chain), np.int64), count, 0.8)
    assert sum(asked) <= 4_000
    assert [*fates.fate_N] == [KEPT, NEAR] * 1_000 + [KEPT]


def test_who_met_only_one_that_went_is_judged_beside_the_one_that_stays() -> None:
    """0 and 2 share no key, but both are like 1."""
    known = {(0, 1): 0.9, (1, 2): 0.9, (0, 2): 0.9}
    fates = Fates.of(3)
    drop_near(fates, np.array([(0, 1), (1, 2)]), judge(known), 0.8)
    assert [*fates.fate_N] == [KEPT, NEAR, NEAR]
    assert [*fates.of_N] == [0, 0, 0]
    assert (fates.clusters, fates.candidates) == (1, 3)


def test_no_bucket_of_sketches_holds_much_more_than_its_part(tmp_path: Path) -> None:
    texts = [prose(n, 400) for n in range(200)]
    found = sketches(texts)
    rows = np.repeat(np.arange(len(texts)), [len(one) for one in found])
    save_entries(tmp_path, "sketch", mixed(np.concatenate(found)), rows)
    sizes = [len(bucket_entries([tmp_path], [0], "sketch", n, 16, None)[0]) for n in range(16)]
    assert sum(sizes) == len(rows)
    assert max(sizes) < 2 * len(rows) / 16

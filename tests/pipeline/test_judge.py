"""The one judgement: every role with every state and every kind of supplier, and what it says."""

from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import get_args

import pytest

from cluster.mirror import mirror_of
from pipeline.decide import (
    Block,
    Build,
    Decision,
    Doubtful,
    Leave,
    Left,
    Lost,
    Moving,
    Recheck,
    Refuse,
    Reuse,
    Settled,
    Supplier,
    in_words,
    judge,
    supply,
)
from pipeline.graph import Role
from pipeline.states import Damaged, Fresh, Missing, Stale, State
from pipeline.store import Committed
from stages.artifacts import Corpus
from stages.manifest import Manifest

TABLE = """
role         state    none       settled    moving     doubtful   lost       left

IF_STALE     fresh    reuse      reuse      recheck    recheck?   block      block+
IF_STALE     stale    build      build      build      build?     block      block+
IF_STALE     missing  build      build      build      build?     block      block+
IF_STALE     damaged  refuse     refuse     refuse     refuse     block      block+

ALWAYS_FROM  fresh    build      build      build      build?     block      block+
ALWAYS_FROM  stale    build      build      build      build?     block      block+
ALWAYS_FROM  missing  build      build      build      build?     block      block+
ALWAYS_FROM  damaged  build      build      build      build?     block      block+

ALWAYS_FORCE fresh    build      build      build      build?     block      block+
ALWAYS_FORCE stale    build      build      build      build?     block      block+
ALWAYS_FORCE missing  build      build      build      build?     block      block+
ALWAYS_FORCE damaged  build      build      build      build?     block      block+

AFTER_FORCE  fresh    reuse      reuse      leave:may  leave:may  block      leave:not
AFTER_FORCE  stale    leave:not  leave:not  leave:not  leave:not  block      leave:not
AFTER_FORCE  missing  leave:not  leave:not  leave:not  leave:not  block      leave:not
AFTER_FORCE  damaged  leave:not  leave:not  leave:not  leave:not  block      leave:not

LEAVE        fresh    leave:has  leave:has  leave:may  leave:may  leave:not  leave:not
LEAVE        stale    leave:not  leave:not  leave:not  leave:not  leave:not  leave:not
LEAVE        missing  leave:not  leave:not  leave:not  leave:not  leave:not  leave:not
LEAVE        damaged  leave:not  leave:not  leave:not  leave:not  leave:not  leave:not
"""
"""`?`: provided that a doubtful supplier is up to date then; `+`: with the reason why a supplier
was left. A node that is left has an artifact for those made of it, may have one, or has not."""
LEFT_AS = {Settled: "has", Doubtful: "may", Left: "not"}


def committed() -> Committed:
    corpus = Corpus(
        uri="/store/g3/files",
        train_rows=1,
        held_out_rows={},
        sequence_tokens=8,
        vocab_size=300,
        train_problems=0,
        held_out_problems=0,
    )
    manifest = Manifest(
        address="files",
        kind=corpus.kind,
        stage="here:gather",
        revision=1,
        fingerprint="f" * 16,
        identity={},
        inputs={},
        facts=corpus.facts(),
        files={},
        content="c" * 64,
        provenance={},
    )
    return Committed(corpus, manifest, 3, "g3", Path("/store/g3"), mirror_of("/store"))


COMMITTED = committed()
STATES: Mapping[str, State] = {
    "fresh": Fresh(COMMITTED),
    "stale": Stale(("steps: 3 -> 4",)),
    "missing": Missing(),
    "damaged": Damaged(("a file is gone",), 3),
}
SUPPLIERS: Mapping[str, Supplier] = {
    "settled": Settled(COMMITTED),
    "moving": Moving(),
    "doubtful": Doubtful(),
    "lost": Lost("failed"),
    "left": Left("left out by --only, and not up to date (never built)"),
}


def rows() -> list[tuple[Role, str, str, str]]:
    """(role, state, supplier, what is expected)."""
    lines = [line.split() for line in TABLE.splitlines() if line]
    return [
        (Role[role], state, supplier, one)
        for role, state, *expected in lines[1:]
        for supplier, one in zip(lines[0][2:], expected, strict=True)
    ]


def shorthand(decision: Decision) -> str:
    """A decision as the table writes it."""
    verb, _ = in_words(decision)
    match decision:
        case Build() | Recheck() if decision.provided:
            return f"{verb}?"
        case Block(reason=reason) if reason:
            return f"{verb}+"
        case Leave(supplier=supplier):
            return f"{verb}:{LEFT_AS[type(supplier)]}"
    return verb


def test_the_table_holds_every_combination() -> None:
    kinds = {type(one).__name__.lower() for one in STATES.values()}
    assert kinds == STATES.keys() == {one.__name__.lower() for one in get_args(State)}
    assert SUPPLIERS.keys() == {one.__name__.lower() for one in get_args(Supplier)}
    every = set(product(Role, STATES, ["none", *SUPPLIERS]))
    assert {row[:3] for row in rows()} == every
    assert len(rows()) == len(every) == 120


@pytest.mark.parametrize("row", rows(), ids=lambda row: f"{row[0].name}-{row[1]}-{row[2]}")
def test_a_node_is_judged_by_role_state_and_supplier(row: tuple[Role, str, str, str]) -> None:
    role, state, supplier, expected = row
    suppliers = {"data": SUPPLIERS[supplier]} if supplier != "none" else {}
    decision = judge(role, STATES[state], suppliers)
    assert shorthand(decision) == expected
    match decision:
        case Reuse(found) | Leave(supplier=Settled(found)):
            assert found is COMMITTED
        case Build(reasons):
            asked = role is not Role.IF_STALE
            assert reasons == ((role.value,) if asked else STATES[state].reasons)  # type: ignore[union-attr]
        case Refuse(reasons):
            assert reasons == ("a file is gone",)
        case Block(by, reason):
            assert by == "data"
            assert reason == ("" if supplier == "lost" else SUPPLIERS["left"].reason)  # type: ignore[union-attr]
        case Recheck(inputs):
            assert inputs == ("data",)
        case Leave(reason, Left(why)):
            assert reason.startswith(role.value)
            assert why.startswith(role.value)


def test_of_several_suppliers_the_first_that_lacks_is_named_and_all_that_move() -> None:
    many: dict[str, Supplier] = {
        "one": Moving(),
        "two": SUPPLIERS["settled"],
        "three": Doubtful(),
        "four": Moving(),
    }
    fresh = STATES["fresh"]
    assert judge(Role.IF_STALE, fresh, many) == Recheck(("one", "three", "four"), ("three",))
    assert judge(Role.ALWAYS_FROM, fresh, many) == Build((Role.ALWAYS_FROM.value,), ("three",))
    lacking = many | {"five": Left("out of date"), "six": Lost("failed")}
    assert judge(Role.IF_STALE, fresh, lacking) == Block("five", "out of date")
    assert judge(Role.IF_STALE, fresh, {"six": Lost("failed"), **lacking}) == Block("six")


def test_what_is_left_says_why_it_cannot_be_used() -> None:
    stale, lost = STATES["stale"], {"data": Lost("failed")}
    for role in (Role.LEAVE, Role.AFTER_FORCE):
        left = supply(judge(role, stale, {}))
        assert left == Left(f"{role.value}, and not up to date (steps: 3 -> 4)")
        far = supply(judge(role, STATES["fresh"], {"train": left}))
        assert far == Left(
            f"{role.value}, and made of train, which is {role.value}, and not up to date "
            "(steps: 3 -> 4)"
        )
    left = supply(judge(Role.LEAVE, stale, lost))
    assert left == Left("left out by --only, and made of data, which is failed")


@pytest.mark.parametrize(
    ("decision", "supplier"),
    [
        (Reuse(COMMITTED), Settled(COMMITTED)),
        (Build(("never built",)), Moving()),
        (Recheck(("data",)), Moving()),
        (Refuse(("damaged",)), Lost("refused")),
        (Block("data"), Lost("blocked")),
        (Leave("left out by --only", Doubtful()), Doubtful()),
    ],
)
def test_a_decision_says_what_the_node_is_to_those_made_of_it(
    decision: Decision, supplier: Supplier
) -> None:
    assert supply(decision) == supplier


def test_a_decision_in_words_says_on_what_it_depends() -> None:
    proviso = "blocked if train, which is left as it is, is out of date then"
    assert in_words(Build(("never built",), ("train",))) == ("build", ("never built", proviso))
    assert in_words(Recheck(("data", "train"), ("train",))) == (
        "recheck",
        ("reused if data and train come out as before, built if not", proviso),
    )
    assert in_words(Block("train")) == ("block", ("made of train, which is not there",))
    assert in_words(Block("train", "left out by --only")) == (
        "block",
        ("made of train, which is left out by --only",),
    )

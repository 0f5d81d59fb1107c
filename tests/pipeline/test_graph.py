"""Order, names and selectors of the line."""

import re

import pytest

from configs.errors import PlanError
from pipeline.graph import Role, Selection, assign_roles, make_graph
from stages.hashing import Hashes
from tests.pipeline.fakes import make_line

HASHES = Hashes()
GRAPH = make_graph(make_line(), HASHES)


def roles(**selectors: tuple[str, ...]) -> dict[str, Role]:
    return assign_roles(GRAPH, Selection(**selectors))


def test_inputs_come_before_what_is_made_of_them() -> None:
    shuffled = make_graph(dict(reversed(make_line().items())), HASHES)
    place = {node.name: number for number, node in enumerate(shuffled)}
    assert len(place) == 5
    for node in shuffled:
        assert all(place[supplier] < place[node.name] for supplier in node.inputs.values())


def test_the_order_of_naming_changes_no_identity() -> None:
    shuffled = make_graph(dict(reversed(make_line().items())), HASHES)
    assert {n.name: n.fingerprint for n in shuffled} == {n.name: n.fingerprint for n in GRAPH}


def test_before_and_after_follow_the_wires() -> None:
    assert [node.name for node in GRAPH.before("judge")] == ["data", "train"]
    assert [node.name for node in GRAPH.after("train")] == ["judge", "pack.cuda", "pack.ascend"]
    assert GRAPH.before("data") == []


def test_a_stage_name_selects_all_its_nodes() -> None:
    assert GRAPH.resolve("pack") == ["pack.cuda", "pack.ascend"]
    assert GRAPH.resolve("pack.cuda") == ["pack.cuda"]


def test_an_unknown_selector_is_told_the_nearest_spelling() -> None:
    with pytest.raises(PlanError, match="did you mean 'train'"):
        roles(only=("trian",))


def test_only_leaves_everything_else() -> None:
    found = roles(only=("judge",))
    assert found.pop("judge") is Role.IF_STALE
    assert set(found.values()) == {Role.LEAVE}


def test_from_takes_everything_after() -> None:
    found = roles(start=("train",))
    assert found.pop("data") is Role.IF_STALE
    assert set(found.values()) == {Role.ALWAYS_FROM}


def test_force_takes_one_and_leaves_what_follows_to_a_plain_run() -> None:
    found = roles(force=("train",))
    assert found == {
        "data": Role.IF_STALE,
        "train": Role.ALWAYS_FORCE,
        "judge": Role.AFTER_FORCE,
        "pack.cuda": Role.AFTER_FORCE,
        "pack.ascend": Role.AFTER_FORCE,
    }


def test_selectors_that_contradict_are_refused() -> None:
    with pytest.raises(PlanError, match="--only judge leaves out train"):
        roles(only=("judge",), force=("train",))


def test_an_input_without_a_name_is_refused() -> None:
    line = make_line()
    del line["data"]
    with pytest.raises(PlanError, match="node train: its input corpus"):
        make_graph(line, HASHES)


@pytest.mark.parametrize(
    "name",
    [
        "my/other",
        "",
        "-x",
        "my.-x",
        ".mine",
        "mine.",
        "my..other",
        "my other",
        "größer",
        "mine\n",
        "a" * 101,
    ],
)
def test_a_name_that_is_no_file_no_selector_or_no_models_is_refused(name: str) -> None:
    with pytest.raises(PlanError, match="words of A-Z, a-z, 0-9, _ and -") as caught:
        make_graph({name: make_line()["data"]}, HASHES)
    assert repr(name) in str(caught.value)


def test_a_node_that_bears_the_name_of_anothers_stage_is_refused() -> None:
    line = make_line()
    line["pack"] = line.pop("judge")
    told = "node pack, built by stage judge: its name is that of the stage which builds node pack."
    with pytest.raises(PlanError, match=re.escape(told)):
        make_graph(line, HASHES)
    # Of a node that is built by the stage itself, no other is meant.
    line = make_line()
    line["pack"] = line.pop("pack.ascend")
    assert make_graph(line, HASHES).resolve("pack") == ["pack"]


@pytest.mark.parametrize("name", ["a", "posttrain.math", "pretrain.fp8.0", "my-other_1", "a" * 100])
def test_a_name_of_words_and_dots_is_taken(name: str) -> None:
    graph = make_graph({name: make_line()["data"]}, HASHES)
    assert [node.name for node in graph] == [name]

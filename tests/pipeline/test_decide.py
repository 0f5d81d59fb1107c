"""What is stale and why, and what a selection makes of it; plan and run agree."""

from pathlib import Path

import pytest

from configs.errors import PlanError
from configs.parallel import StoreConfig
from pipeline.decide import (
    Build,
    Damaged,
    Decision,
    Examiner,
    Fresh,
    Missing,
    NotSelected,
    Recheck,
    Refuse,
    Reuse,
    Stale,
    decide,
    survey,
)
from pipeline.graph import Selection
from pipeline.store import remove
from tests.pipeline.fakes import RECIPE, World, outcomes

ALL = ["data", "train", "judge", "pack.cuda", "pack.ascend"]


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


def plan(
    world: World, selection: Selection | None = None, **changes: object
) -> dict[str, Decision]:
    graph = world.graph(**changes)
    states = survey(graph, Examiner(world.store, RECIPE))
    return decide(graph, selection or Selection(), states)


def kinds(decisions: dict[str, Decision]) -> dict[str, type]:
    return {name: type(one) for name, one in decisions.items()}


def test_an_empty_store_means_build_all(world: World) -> None:
    assert plan(world) == {name: Build(("never built",)) for name in ALL}


def test_after_a_run_everything_is_reused(world: World) -> None:
    first = world.run()
    assert outcomes(first) == dict.fromkeys(ALL, "built")
    assert set(kinds(plan(world)).values()) == {Reuse}
    assert outcomes(world.run()) == dict.fromkeys(ALL, "reused")


def test_a_changed_field_rebuilds_the_node_and_what_follows_with_reasons(world: World) -> None:
    world.run()
    decisions = plan(world, train={"steps": 5})
    assert isinstance(decisions.pop("data"), Reuse)
    assert decisions == {
        "train": Build(("steps: 3 -> 5",)),
        "judge": Build(("input checkpoint changed",)),
        "pack.cuda": Build(("input checkpoint changed",)),
        "pack.ascend": Build(("input checkpoint changed",)),
    }
    run = world.run(train={"steps": 5})
    assert outcomes(run) == {**dict.fromkeys(ALL, "built"), "data": "reused"}


def test_going_back_reuses_what_was_built_before(world: World) -> None:
    world.run()
    world.run(train={"steps": 5})
    assert outcomes(world.run()) == dict.fromkeys(ALL, "reused")


def test_only_builds_one_and_nothing_else(world: World) -> None:
    world.run()
    only = Selection(only=("judge",))
    decisions = plan(world, only, judge={"steps": 9})
    assert decisions.pop("judge") == Build(("steps: 3 -> 9",))
    assert set(kinds(decisions).values()) == {NotSelected}
    assert outcomes(world.run(selection=only, judge={"steps": 9})) == {"judge": "built"}
    assert outcomes(world.run(selection=only, judge={"steps": 9})) == {"judge": "reused"}


@pytest.mark.parametrize(
    ("built", "told"), [(True, r"train, which is stale \(steps: 3 -> 4\)"), (False, "never built")]
)
def test_only_refuses_a_stale_or_missing_upstream_and_names_the_field(
    world: World, built: bool, told: str
) -> None:
    if built:
        world.run()
    with pytest.raises(PlanError, match=told):
        plan(world, Selection(only=("judge",)), train={"steps": 4})


def test_from_rebuilds_what_is_fresh_and_everything_after(world: World) -> None:
    world.run()
    chosen = Selection(start=("train",))
    decisions = plan(world, chosen)
    assert isinstance(decisions.pop("data"), Reuse)
    assert set(decisions.values()) == {Build(("asked for by --from",))}
    run = world.run(selection=chosen)
    assert outcomes(run) == {**dict.fromkeys(ALL, "built"), "data": "reused"}


def test_force_rebuilds_one_and_equal_content_leaves_the_rest_fresh(world: World) -> None:
    world.run()
    chosen = Selection(force=("train",))
    decisions = plan(world, chosen)
    assert decisions["train"] == Build(("asked for by --force",))
    assert isinstance(decisions["judge"], NotSelected)
    run = world.run(selection=chosen)
    assert outcomes(run) == {**dict.fromkeys(ALL, "reused"), "train": "built"}


def test_force_leaves_what_came_out_different_to_a_plain_run(world: World) -> None:
    differs = {"train": {"differs": True}}
    world.run(**differs)
    forced = world.run(selection=Selection(force=("train",)), **differs)
    assert outcomes(forced) == {"data": "reused", "train": "built"}
    assert plan(world, **differs)["judge"] == Build(("input checkpoint rebuilt",))
    after = outcomes(world.run(**differs))
    assert after == {**dict.fromkeys(ALL, "built"), "data": "reused", "train": "reused"}
    assert outcomes(world.run(**differs)) == dict.fromkeys(ALL, "reused")


def test_a_lost_artifact_is_rebuilt_and_what_follows_decided_then(world: World) -> None:
    uri = world.run().outcomes["train"].uri  # type: ignore[union-attr]
    remove(Path(uri))
    decisions = plan(world)
    assert isinstance(decisions["train"], Build)
    assert decisions["judge"] == Recheck(("train",))
    assert outcomes(world.run()) == {**dict.fromkeys(ALL, "reused"), "train": "built"}


def test_damage_is_refused_until_forced(world: World) -> None:
    uri = world.run().outcomes["train"].uri  # type: ignore[union-attr]
    Path(uri, "weights.bin").write_text("x")
    decisions = plan(world)
    assert isinstance(decisions["train"], Refuse)
    assert "weights.bin has 1 bytes" in decisions["train"].reasons[0]
    run = world.run()
    assert outcomes(run) == {
        "data": "reused",
        "train": "failed",
        **dict.fromkeys(["judge", "pack.cuda", "pack.ascend"], "blocked"),
    }
    assert not run.succeeded
    world.run(selection=Selection(force=("train",)))
    assert outcomes(world.run()) == dict.fromkeys(ALL, "reused")


def test_an_unreadable_manifest_is_damage(world: World) -> None:
    uri = world.run().outcomes["data"].uri  # type: ignore[union-attr]
    Path(uri, "manifest.json").write_text("{")
    states = survey(world.graph(), Examiner(world.store, RECIPE))
    assert isinstance(states["data"], Damaged)
    assert outcomes(world.run(selection=Selection(force=("data",))))["data"] == "built"


def test_states_tell_fresh_stale_and_missing_apart(world: World) -> None:
    world.run(selection=Selection(only=("data",)))
    states = survey(world.graph(data={"steps": 8}), Examiner(world.store, RECIPE))
    assert states["data"] == Stale(("steps: 3 -> 8",))
    assert isinstance(states["train"], Missing)
    assert isinstance(survey(world.graph(), Examiner(world.store, RECIPE))["data"], Fresh)

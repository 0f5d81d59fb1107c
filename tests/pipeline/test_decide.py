"""What is stale and why, and what a selection makes of it; plan and run agree."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from cluster import place
from configs.errors import PlanError
from configs.parallel import StoreConfig
from pipeline.decide import Block, Build, Decision, Leave, Recheck, Refuse, Reuse
from pipeline.graph import Selection
from pipeline.records import Blocked
from pipeline.removal import remove
from pipeline.slots import Slot
from pipeline.states import Damaged, Fresh, Missing, Stale
from tests.pipeline.fakes import World, failed, outcomes

ALL = ["data", "train", "judge", "pack.cuda", "pack.ascend"]


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


def plan(
    world: World, selection: Selection | None = None, **changes: object
) -> dict[str, Decision]:
    return {name: one.decision for name, one in world.judged(selection, **changes).items()}


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
    assert set(kinds(decisions).values()) == {Leave}
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
    assert isinstance(decisions["judge"], Leave)
    run = world.run(selection=chosen)
    assert outcomes(run) == {**dict.fromkeys(ALL, "reused"), "train": "built"}


def test_force_leaves_what_came_out_different_to_a_plain_run(world: World) -> None:
    differs = {"differs": True}
    world.run(train=differs)
    forced = world.run(selection=Selection(force=("train",)), train=differs)
    assert outcomes(forced) == {"data": "reused", "train": "built"}
    assert plan(world, train=differs)["judge"] == Build(("input checkpoint rebuilt",))
    after = outcomes(world.run(train=differs))
    assert after == {**dict.fromkeys(ALL, "built"), "data": "reused", "train": "reused"}
    assert outcomes(world.run(train=differs)) == dict.fromkeys(ALL, "reused")


def test_a_lost_artifact_is_rebuilt_and_what_follows_decided_then(world: World) -> None:
    remove(world.generation(world.run(), "train"))
    decisions = plan(world)
    assert isinstance(decisions["train"], Build)
    assert decisions["judge"] == Recheck(("train",))
    assert outcomes(world.run()) == {**dict.fromkeys(ALL, "reused"), "train": "built"}


def test_damage_is_refused_until_forced(world: World) -> None:
    (world.files(world.run(), "train") / "weights.bin").write_text("x")
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


def test_damage_is_refused_also_where_an_input_is_rebuilt(world: World) -> None:
    differs = {"differs": True}
    run = world.run(data=differs)
    (world.files(run, "train") / "weights.bin").write_text("x")
    remove(world.generation(run, "data"))
    decisions = plan(world, data=differs)
    assert isinstance(decisions["data"], Build)
    assert isinstance(decisions["train"], Refuse)
    assert decisions["judge"] == Block("train")
    done = outcomes(world.run(data=differs))
    assert (done["data"], done["train"], done["judge"]) == ("built", "failed", "blocked")


def flip_byte(file: Path) -> None:
    """Damage that only a hash can see."""
    text = file.read_bytes()
    file.write_bytes(bytes([text[0] ^ 1]) + text[1:])


def test_damage_that_only_a_hash_sees_is_refused_before_a_run_relies_on_it(world: World) -> None:
    flip_byte(world.files(world.run(), "train") / "weights.bin")
    only = Selection(only=("judge",))
    with pytest.raises(PlanError, match=r"train, which is damaged .*; run --force train first"):
        plan(world, only, judge={"steps": 9})
    # Should it come about only after the plan was made, the run says so and does not succeed.
    run = world.run(selection=only, judge={"steps": 9})
    assert outcomes(run) == {"judge": "blocked"}
    blocked = run.outcomes["judge"]
    assert isinstance(blocked, Blocked)
    assert "weights.bin has sha256" in blocked.reason
    assert not run.succeeded


def test_a_middle_node_that_the_run_makes_stale_blocks_what_is_asked_for(world: World) -> None:
    differs = {"differs": True}
    world.run(data=differs)
    for chosen in (
        Selection(force=("data",), start=("judge",)),
        Selection(force=("data",), only=("data", "judge")),
    ):
        decided = plan(world, chosen, data=differs)["judge"]
        assert isinstance(decided, Build | Recheck)
        assert decided.provided == ("train",)
        run = world.run(selection=chosen, data=differs)
        blocked = run.outcomes["judge"]
        assert isinstance(blocked, Blocked)
        assert blocked.by == "train"
        assert "input corpus rebuilt" in blocked.reason
        assert not run.succeeded
        world.run(data=differs)


def test_a_middle_node_that_is_stale_already_is_refused_by_name(world: World) -> None:
    world.run()
    stale = {"steps": 4}
    with pytest.raises(PlanError, match=r"train, which is stale .*; add --force train"):
        plan(world, Selection(force=("data",), start=("judge",)), train=stale)
    both = Selection(force=("data", "train"), start=("judge",))
    assert outcomes(world.run(selection=both, train=stale))["judge"] == "built"


def test_a_run_that_leaves_a_selected_node_aside_does_not_succeed(world: World) -> None:
    run = world.run(selection=Selection(only=("judge",)))
    assert outcomes(run) == {"judge": "blocked"}
    assert not run.succeeded
    assert not replace(run, outcomes={}).succeeded


def test_an_artifact_that_may_not_be_read_fails_its_node_alone(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = str(world.generation(world.run(), "judge"))
    real = place.read

    def refuse(address: str) -> bytes:
        if address.startswith(locked):
            raise PermissionError(13, "Permission denied", address)
        return real(address)

    monkeypatch.setattr(place, "read", refuse)
    run = world.run()
    assert outcomes(run) == {**dict.fromkeys(ALL, "reused"), "judge": "failed"}
    assert failed(run, "judge").error == (
        f"{locked}/manifest.json: cannot be read (Permission denied); make it readable, or "
        "rebuild the node with --force"
    )
    assert isinstance(plan(world)["judge"], Refuse)


def test_a_folder_that_nobody_may_enter_stops_no_command(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    locked = str(world.generation(world.run(), "judge"))
    real = os.stat

    def refuse(
        path: str | Path, *, dir_fd: int | None = None, follow_symlinks: bool = True
    ) -> os.stat_result:
        if str(path).startswith(locked):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, dir_fd=dir_fd, follow_symlinks=follow_symlinks)

    monkeypatch.setattr(os, "stat", refuse)
    decisions = plan(world)
    monkeypatch.undo()
    refused = decisions.pop("judge")
    assert set(kinds(decisions).values()) == {Reuse}
    assert isinstance(refused, Refuse)


def test_what_is_left_out_after_a_failure_says_so(world: World) -> None:
    world.run()
    only = Selection(only=("data", "judge"), force=("data",))
    blocked = world.run(selection=only, data={"fails": True}).outcomes["judge"]
    assert isinstance(blocked, Blocked)
    assert blocked.by == "data"
    assert blocked.reason == ""
    pack = Selection(only=("data", "pack.cuda"), force=("data",))
    blocked = world.run(selection=pack, data={"fails": True}).outcomes["pack.cuda"]
    assert isinstance(blocked, Blocked)
    assert blocked.by == "train"
    assert blocked.reason == "left out by --only, and made of data, which is failed"


def test_an_interrupted_build_that_can_be_continued_is_told_among_others(world: World) -> None:
    node = world.graph()["data"]
    with world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        (slot.path / "resume").mkdir()
        (slot.path / "resume" / "step").write_text("7")
    with world.store.slot(node, {}):
        pass
    assert plan(world)["data"] == Build(("never built", "continues an interrupted build"))


def test_an_unreadable_manifest_is_damage(world: World) -> None:
    (world.generation(world.run(), "data") / "manifest.json").write_text("{")
    assert isinstance(world.judged()["data"].state, Damaged)
    assert outcomes(world.run(selection=Selection(force=("data",))))["data"] == "built"


def test_states_tell_fresh_stale_and_missing_apart(world: World) -> None:
    world.run(selection=Selection(only=("data",)))
    states = {name: one.state for name, one in world.judged(data={"steps": 8}).items()}
    assert states["data"] == Stale(("steps: 3 -> 8",))
    assert isinstance(states["train"], Missing)
    assert isinstance(world.judged()["data"].state, Fresh)

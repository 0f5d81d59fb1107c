"""What is deleted nobody can build in or read any more, and what somebody begins to use stays."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from configs.errors import LeaseLost, StoreError
from configs.parallel import StoreConfig
from pipeline import lease as lease_module
from pipeline import removal
from pipeline.graph import Node
from pipeline.lease import is_held, newest, take
from pipeline.removal import delete, remove, removed
from pipeline.slots import Slot
from pipeline.store import Committed
from stages.manifest import MANIFEST, Lease, verify
from tests.pipeline.fakes import World, fill


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


@pytest.fixture
def node(world: World) -> Node:
    return world.graph()["data"]


@contextmanager
def opened(world: World, node: Node) -> Iterator[Slot]:
    with world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        yield slot


def build(world: World, node: Node) -> Committed:
    with opened(world, node) as slot:
        return world.store.commit(slot, node, fill(slot), {}, {})


def interrupted(world: World, node: Node) -> Path:
    """The generation of a build that gave up."""
    with opened(world, node) as slot:
        return slot.path.parent


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_slot_that_is_being_filled_cannot_be_removed(world: World, node: Node) -> None:
    with opened(world, node) as slot:
        generation = slot.path.parent
        assert is_held(str(generation))
        with pytest.raises(StoreError, match="is building it"):
            remove(generation)
    assert not is_held(str(generation))
    remove(generation)
    assert not generation.exists()


def test_a_builder_that_begins_while_a_slot_is_looked_at_keeps_it(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(world, node) as slot:
        generation = slot.path.parent
    with ExitStack() as stack:
        begun: list[Slot] = []

        def look(path: Path) -> bool:
            held = is_held(str(path))
            begun.append(stack.enter_context(opened(world, node)))
            return held

        monkeypatch.setattr(removal, "is_held", look)
        with pytest.raises(StoreError, match="is building it"):
            remove(generation)
        (slot,) = begun
        made = world.store.commit(slot, node, fill(slot), {}, {})
    verify(str(made.path))


def after_the_lease(monkeypatch: pytest.MonkeyPatch, then: Callable[[], object]) -> None:
    """The one that deletes is paused once it has its lease, and others find it silent."""

    def taken(
        generation: Path, number: int, owner: str, inputs: Sequence[str] = ()
    ) -> Lease | None:
        lease = take(str(generation), number, owner, inputs)
        then()
        return lease

    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(removal, "take", taken)


def test_what_was_committed_while_it_was_to_be_deleted_stays(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation, made = interrupted(world, node), []
    after_the_lease(monkeypatch, lambda: made.append(build(world, node)))
    with pytest.raises(StoreError, match="another process builds it, or has just done so; left"):
        remove(generation)
    assert world.store.find(node) == made[0]
    verify(str(generation))
    assert names(generation.parent) == {"g1"}
    assert not is_held(str(generation))


def test_who_took_over_from_the_one_that_deletes_goes_on(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = interrupted(world, node)
    with ExitStack() as stack:
        begun: list[Slot] = []
        after_the_lease(monkeypatch, lambda: begun.append(stack.enter_context(opened(world, node))))
        with pytest.raises(StoreError, match="another process builds it"):
            remove(generation)
        (slot,) = begun
        made = world.store.commit(slot, node, fill(slot), {}, {})
    verify(str(made.path))


def test_a_builder_whose_generation_is_deleted_as_it_begins_begins_anew(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = interrupted(world, node)
    calls: list[str] = []

    def look(address: str) -> tuple[int, Mapping[str, Any]]:
        found = newest(address)
        if not calls:
            calls.append(address)
            remove(generation)
        return found

    monkeypatch.setattr("pipeline.store.newest", look)
    made = build(world, node)
    assert calls == [str(made.path)]
    assert Path(made.artifact.uri).parent.name.startswith("000001-")


def test_what_somebody_uses_by_now_is_put_back_as_it_was(world: World, node: Node) -> None:
    made = build(world, node)
    before = names(made.path)

    def used() -> str:
        # Asked once nobody can find it any more.
        assert not made.path.exists()
        return "in use by run 7"

    with pytest.raises(StoreError, match="g1: in use by run 7; left as it is"):
        remove(made.path, used)
    assert names(made.path) == before
    assert world.store.find(node) == made


def test_what_cannot_be_put_back_is_kept_under_the_name_that_is_told(
    world: World, node: Node
) -> None:
    made = build(world, node)

    def used() -> str:
        build(world, node)
        return "in use"

    with pytest.raises(StoreError, match=r"cannot be given this name again") as caught:
        remove(made.path, used)
    (away,) = removed(world.store.root)
    assert str(made.path) in str(caught.value)
    assert str(away) in str(caught.value)
    verify(str(away))
    verify(str(made.path))


def test_a_builder_whose_generation_was_deleted_and_begun_anew_has_lost(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The new generation counts its leases from 1 as well, and the old one's builder wakes."""
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 0.5)
    sleeper = world.store._take(node, [], 0)
    assert isinstance(sleeper, Slot)
    generation = sleeper.path.parent
    (generation / "lease-000001.json").write_text(
        Path(sleeper.lease.uri).read_text().replace('"host": "', '"host": "elsewhere/')
    )
    remove(generation)
    with opened(world, node) as slot:
        assert slot.lease.uri == sleeper.lease.uri
        with pytest.raises(LeaseLost, match="lost to another builder's lease of that number"):
            sleeper.lease.check()
        text = Path(slot.lease.uri).read_text()
        lease_module.give_up(sleeper.lease)
        assert Path(slot.lease.uri).read_text() == text
        # A stage makes its folder anew, past its check.
        sleeper.files.mkdir(parents=True)
        monkeypatch.setattr(type(sleeper.lease), "check", lambda lease, **_: None)
        with pytest.raises(LeaseLost, match="or this one's folder was deleted"):
            world.store.commit(sleeper, node, fill(sleeper, "half"), {}, {})
        assert not (generation / MANIFEST).exists()
        monkeypatch.undo()
        made = world.store.commit(slot, node, fill(slot, "whole"), {}, {})
    verify(str(made.path))
    assert made.artifact.path("text.txt").read_text() == "whole"


def test_what_others_deleted_first_is_as_good_as_deleted(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = interrupted(world, node)
    after_the_lease(monkeypatch, lambda: shutil.rmtree(generation))
    remove(generation)
    remove(generation)
    delete(generation)
    assert newest(str(generation)) == (0, {})
    real = os.rmdir

    def rmdir(path: str | Path, *, dir_fd: int | None = None) -> None:
        real(path, dir_fd=dir_fd)
        raise FileNotFoundError

    folder = interrupted(world, node)
    monkeypatch.setattr(os, "rmdir", rmdir)
    delete(folder)
    assert not folder.exists()


def test_what_may_not_be_deleted_is_named(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise PermissionError(13, "Permission denied")

    generation = interrupted(world, node)
    monkeypatch.setattr(shutil, "rmtree", refuse)
    with pytest.raises(StoreError, match=r"g1.*cannot be deleted \(Permission denied\)"):
        remove(generation)
    (left,) = removed(world.store.root)
    monkeypatch.undo()
    delete(left)
    assert list(removed(world.store.root)) == []
    remove(interrupted(world, node))
    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StoreError, match="cannot be deleted"):
        remove(interrupted(world, node))

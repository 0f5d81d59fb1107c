"""Which save a group of ranks continues from, wherever its shards lie."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cluster import checkpoint, place
from cluster.checkpoint import mark_complete, save_shard, step_folder
from cluster.files import COMPLETE
from cluster.mirror import Mirror
from cluster.save_state import SaveState
from cluster.saves import Saves
from cluster.supply import Supply
from pipeline.carrier import Carrier
from tests.supplies import saves_of


@pytest.fixture
def saves(apart: Mirror) -> Saves:
    """Of a driver whose ranks may be elsewhere."""
    builder = apart.root / "artifacts" / "pretrain" / "f" / "g1" / "000001-aa"
    (builder / "resume" / "saves").mkdir(parents=True)
    (builder / "manifest.draft").touch()
    supply = Supply(apart, builder / "manifest.draft", is_spread=True)
    return Saves(builder / "resume" / "saves", (), None, supply)


def shard(saves: Saves, step: int, rank: int, value: float = 1.0, *, far: bool = False) -> Path:
    """A rank's shard of a step; of one on another machine it is in the store alone."""
    folder = step_folder(saves.root, step)
    path = save_shard(folder, {f"of{rank}": torch.full((4,), value)}, {}, rank=rank, world=2)
    if far:
        saves.supply.mirror.push(path)
        path.unlink()
    return path


def stored(saves: Saves) -> dict[str, int]:
    return place.sizes(saves.supply.mirror.address(saves.root))


def test_shards_of_other_machines_come_to_where_a_save_is_marked(saves: Saves) -> None:
    shard(saves, 8, 0)
    shard(saves, 8, 1, 5.0, far=True)
    assert saves.newest() is None
    saves.complete(SaveState(8))
    assert saves.newest() == (step_folder(saves.root, 8), 8)
    assert checkpoint.load_shards(step_folder(saves.root, 8))["of1"].tolist() == [5.0] * 4


def test_a_save_is_in_the_store_for_all_before_anybody_continues_from_it(saves: Saves) -> None:
    """Whatever the driver's machine has not sent yet by itself."""
    shard(saves, 8, 0)
    shard(saves, 8, 1, far=True)
    saves.complete(SaveState(8))
    assert set(stored(saves)) == {"step-00000008/rank-1-of-2.safetensors"}
    assert saves.choose() == (step_folder(saves.root, 8), 8)
    assert len(stored(saves)) == 3
    # So is that of an earlier build, which the same machine has whole.
    start = step_folder(saves.root, 8), 8
    later = saves.supply.builder.with_name("000002-bb")
    (later / "resume" / "saves").mkdir(parents=True)
    place.delete(saves.supply.mirror.address(saves.root))
    next_one = replace(saves, root=later / "resume" / "saves", start=start)
    assert next_one.choose() == start
    assert len(stored(saves)) == 3


def test_shards_of_two_attempts_are_never_joined(saves: Saves) -> None:
    """The first attempt at step 16 wrote rank 0 here and rank 1 elsewhere, and no mark."""
    for rank in (0, 1):
        shard(saves, 8, rank)
    saves.complete(SaveState(8))
    shard(saves, 16, 0, 1.0)
    shard(saves, 16, 1, 1.0, far=True)
    assert saves.choose() == (step_folder(saves.root, 8), 8)
    assert not step_folder(saves.root, 16).exists()
    assert all(name.startswith("step-00000008/") for name in stored(saves))
    # The second one has its ranks the other way round.
    shard(saves, 16, 0, 2.0, far=True)
    shard(saves, 16, 1, 2.0)
    saves.complete(SaveState(16))
    assert saves.newest() == (step_folder(saves.root, 16), 16)
    found = checkpoint.load_shards(step_folder(saves.root, 16))
    assert found["of0"].tolist() == found["of1"].tolist() == [2.0] * 4


def test_a_save_whose_shard_is_gone_is_passed_over_for_the_one_before_it(saves: Saves) -> None:
    for step in (8, 16):
        shard(saves, step, 0)
        shard(saves, step, 1, far=True)
        saves.complete(SaveState(step))
    address = saves.supply.mirror.address(step_folder(saves.root, 16))
    place.delete(f"{address}/rank-1-of-2.safetensors")
    assert saves.choose() == (step_folder(saves.root, 8), 8)


def test_old_saves_leave_the_store_with_the_shards_of_other_machines(saves: Saves) -> None:
    carrier = Carrier(saves.supply.mirror, saves.supply.builder, print)
    try:
        for step in (8, 16, 24, 32):
            shard(saves, step, 0)
            shard(saves, step, 1, far=True)
            saves.complete(SaveState(step))
            carrier.carry()
        assert {name.partition("/")[0] for name in stored(saves)} == {
            "step-00000024",
            "step-00000032",
        }
        # What is fetched into a whole save is not sent back.
        saves.newest()
        address = saves.supply.mirror.address(step_folder(saves.root, 32))
        far = f"{address}/rank-1-of-2.safetensors"
        place.replace(far, b"as another machine sent it")
        carrier.carry()
        assert place.read(far) == b"as another machine sent it"
        # Another group may be writing anew what never was whole.
        shard(saves, 40, 0)
        carrier.carry()
        shutil.rmtree(step_folder(saves.root, 40))
        carrier.carry()
        assert "step-00000040/rank-0-of-2.safetensors" in stored(saves)
    finally:
        carrier.stop()


def test_what_was_deleted_here_before_its_mark_was_sent_leaves_the_store_too(saves: Saves) -> None:
    """Shards of other machines are there before any mark, and those of a save that is being
    written stay."""
    carrier = Carrier(saves.supply.mirror, saves.supply.builder, print)
    try:
        for step in (8, 16, 24, 32):
            shard(saves, step, 0)
            shard(saves, step, 1, far=True)
            saves.complete(SaveState(step))
        shard(saves, 40, 1, far=True)
        assert "step-00000008/rank-1-of-2.safetensors" in stored(saves)
        carrier.carry()
        held = {name.partition("/")[0] for name in stored(saves)}
        assert held == {"step-00000024", "step-00000032", "step-00000040"}
    finally:
        carrier.stop()


def test_of_several_saves_the_newest_is_sent_first(
    saves: Saves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older one may be deleted here before it is sent; and its mark comes last."""
    carrier = Carrier(saves.supply.mirror, saves.supply.builder, print)
    sent: list[str] = []
    try:
        for step in (8, 16):
            for rank in (0, 1):
                shard(saves, step, rank)
            saves.complete(SaveState(step))
        monkeypatch.setattr(place, "send", lambda path, address: sent.append(address))
        carrier.carry()
        names = ("rank-0-of-2.safetensors", "rank-1-of-2.safetensors", COMPLETE)
        expected = [step_folder(saves.root, step) / name for step in (16, 8) for name in names]
        assert sent == [saves.supply.mirror.address(path) for path in expected]
    finally:
        carrier.stop()


def test_state_that_is_no_save_stays_in_the_store_beside_marks(saves: Saves) -> None:
    """A stage of a user's own may keep what it likes, and mark it so."""
    mirror, state = saves.supply.mirror, saves.root.parent / "z"
    carrier = Carrier(mirror, saves.supply.builder, print)
    try:
        for name in ("a.json", COMPLETE):
            state.mkdir(exist_ok=True)
            (state / name).write_text("{}")
        beside = {"other/state.json", "step-1/state.json", "saves/notes.json"}
        for name in beside:
            place.replace(mirror.address(saves.root.parent / name), b"{}")
        carrier.carry()
        sent = {"z/a.json", f"z/{COMPLETE}"}
        assert set(place.sizes(mirror.address(saves.root.parent))) == beside | sent
        for rank in (0, 1):
            shard(saves, 8, rank)
        saves.complete(SaveState(8))
        carrier.carry()
        assert beside | sent < set(place.sizes(mirror.address(saves.root.parent)))
    finally:
        carrier.stop()


def test_on_one_machine_what_is_half_saved_goes_and_the_rest_is_found(tmp_path: Path) -> None:
    start = tmp_path / "earlier" / "step-00000003", 3
    saves = saves_of(tmp_path / "builder", start=start)
    assert saves.choose() == saves.newest() == start
    half = step_folder(saves.root, 2)
    save_shard(half, {"any": torch.ones(1)}, {}, rank=0, world=1)
    assert saves.newest() == start
    mark_complete(half, {"step": 2})
    assert saves.choose() == (half, 2)
    (half / COMPLETE).unlink()
    assert saves.choose() == start
    assert not half.exists()


def test_the_only_whole_save_in_the_store_stays_while_newer_ones_come_and_go(
    saves: Saves, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever saves faster than the store takes it deletes here what is still being sent."""
    carrier = Carrier(saves.supply.mirror, saves.supply.builder, print)
    real, steps = place.send, iter(range(16, 200, 8))

    def make() -> None:
        step = next(steps)
        for rank in (0, 1):
            shard(saves, step, rank)
        saves.complete(SaveState(step))

    def slow(path: Path, address: str) -> None:
        if path.name.startswith("rank-0"):
            make()
            make()
        real(path, address)

    try:
        for rank in (0, 1):
            shard(saves, 8, rank)
        saves.complete(SaveState(8))
        carrier.carry()
        make()
        monkeypatch.setattr(place, "send", slow)
        for _ in range(3):
            carrier.carry()
        assert any(name.endswith(COMPLETE) for name in stored(saves))
        monkeypatch.setattr(place, "send", real)
        carrier.carry()
        whole = {name.partition("/")[0] for name in stored(saves) if name.endswith(COMPLETE)}
        newest = saves.newest()
        assert newest is not None
        assert newest[0].name in whole
    finally:
        carrier.stop()

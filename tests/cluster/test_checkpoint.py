"""Sharded saves: any number of ranks reads what any number wrote; half a save is none."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from cluster import checkpoint
from cluster.checkpoint import (
    consolidate,
    latest,
    load_shards,
    mark_complete,
    prune,
    save_shard,
    step_folder,
)
from configs.errors import ArtifactError
from model.moe import RoutedExperts
from model.weights.files import load_pretrained
from tests.references import random_model

MODULE = "model.layers.1.mlp.experts"
EXPERTS = 8


def whole() -> dict[str, Tensor]:
    """Weights and moments of a model with one stacked module."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "norm.weight": (5,),
        f"{MODULE}.up": (EXPERTS, 3, 2),
        f"{MODULE}.down": (EXPERTS, 2, 3),
        "exp_avg/norm.weight": (5,),
        f"exp_avg/{MODULE}.up": (EXPERTS, 3, 2),
    }
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def slice_of(rank: int, world: int) -> range:
    each = EXPERTS // world
    return range(rank * each, (rank + 1) * each)


def part(rank: int, world: int) -> dict[str, Tensor]:
    """What one rank holds; rank 0 alone writes what is replicated."""
    local = slice_of(rank, world)
    return {
        name: tensor[local.start : local.stop] if MODULE in name else tensor
        for name, tensor in whole().items()
        if MODULE in name or rank == 0
    }


def save(folder: Path, world: int) -> None:
    for rank in range(world):
        experts = {MODULE: slice_of(rank, world)}
        save_shard(folder, part(rank, world), experts, rank=rank, world=world)


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("readers", [1, 2, 4])
@pytest.mark.parametrize("writers", [1, 2, 4])
def test_any_number_of_ranks_reads_what_any_number_wrote(
    tmp_path: Path, writers: int, readers: int
) -> None:
    save(tmp_path, writers)
    assert_same(load_shards(tmp_path), whole())
    for rank in range(readers):
        found = load_shards(tmp_path, {MODULE: slice_of(rank, readers)})
        replicated = {name: t for name, t in whole().items() if MODULE not in name}
        assert_same(found, replicated | part(rank, readers))


@pytest.mark.parametrize("gone", [0, 1, 3])
def test_a_rank_whose_file_is_gone_is_named(tmp_path: Path, gone: int) -> None:
    save(tmp_path, 4)
    (tmp_path / f"rank-{gone}-of-4.safetensors").unlink()
    for experts in (None, {MODULE: slice_of(0, 2)}):
        with pytest.raises(ArtifactError, match=rf"rank-{gone}-of-4\.safetensors: no such file"):
            load_shards(tmp_path, experts)


def test_an_empty_folder_and_an_expert_that_nobody_wrote_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no rank's file"):
        load_shards(tmp_path)
    save_shard(tmp_path, part(0, 2), {MODULE: slice_of(0, 2)}, rank=0, world=1)
    with pytest.raises(ArtifactError, match="no file holds expert 4 of"):
        load_shards(tmp_path, {MODULE: range(2, 6)})


def test_files_of_an_interrupted_save_by_another_group_do_not_mix_in(tmp_path: Path) -> None:
    stale = {name: tensor + 1 for name, tensor in part(3, 4).items()}
    save_shard(tmp_path, stale, {MODULE: slice_of(3, 4)}, rank=3, world=4)
    (tmp_path / "rank-0-of-4.draft").write_text("cut short")
    save(tmp_path, 2)
    assert_same(load_shards(tmp_path), whole())
    assert len(list(tmp_path.iterdir())) == 2


def test_a_save_without_its_marker_is_not_used(tmp_path: Path) -> None:
    assert latest(tmp_path) is None
    for step in (3, 10, 7):
        save(step_folder(tmp_path, step), 1)
        if step != 10:
            mark_complete(step_folder(tmp_path, step), {"step": step})
    assert latest(tmp_path) == (step_folder(tmp_path, 7), 7)


def test_a_save_that_was_cut_short_is_passed_over_for_the_one_before(tmp_path: Path) -> None:
    for step in (1, 2):
        save(step_folder(tmp_path, step), 2)
        mark_complete(step_folder(tmp_path, step), {"step": step})
    path = step_folder(tmp_path, 2) / "rank-1-of-2.safetensors"
    path.write_bytes(path.read_bytes()[:-8])
    assert latest(tmp_path) == (step_folder(tmp_path, 1), 1)
    # Writing it again takes the marker away first.
    save(step_folder(tmp_path, 2), 2)
    assert latest(tmp_path) == (step_folder(tmp_path, 1), 1)
    mark_complete(step_folder(tmp_path, 2), {"step": 2})
    assert latest(tmp_path) == (step_folder(tmp_path, 2), 2)


def test_of_several_roots_the_highest_step_counts_and_of_equal_ones_the_first(
    tmp_path: Path,
) -> None:
    mine, earlier, oldest = (tmp_path / name for name in ("mine", "earlier", "oldest"))
    assert latest(mine, earlier) is None
    for root, step in ((oldest, 2), (earlier, 4), (oldest, 4)):
        save(step_folder(root, step), 1)
        mark_complete(step_folder(root, step), {"step": step})
    save(step_folder(mine, 6), 1)
    assert latest(mine, earlier, oldest) == (step_folder(earlier, 4), 4)
    assert latest(mine, oldest, earlier) == (step_folder(oldest, 4), 4)
    mark_complete(step_folder(mine, 6), {"step": 6})
    assert latest(mine, earlier, oldest) == (step_folder(mine, 6), 6)
    # A save that was cut short is passed over for another builder's.
    (step_folder(mine, 6) / "rank-0-of-1.safetensors").write_bytes(b"")
    assert latest(mine, earlier, oldest) == (step_folder(earlier, 4), 4)


def test_saves_that_vanish_while_they_are_looked_at_are_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another builder, which is late, deletes its own."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    for root, step in ((mine, 2), (other, 4)):
        save(step_folder(root, step), 1)
        mark_complete(step_folder(root, step), {"step": step})
    assert latest(mine, other) == (step_folder(other, 4), 4)
    real_open, real_glob = safe_open, Path.glob

    def vanish(path: Path, **settings: str) -> object:
        shutil.rmtree(other, ignore_errors=True)
        return real_open(path, **settings)

    def gone(path: Path, pattern: str) -> object:
        if path == other:
            raise FileNotFoundError(path)
        return real_glob(path, pattern)

    monkeypatch.setattr(checkpoint, "safe_open", vanish)
    assert latest(mine, other) == (step_folder(mine, 2), 2)
    monkeypatch.setattr(Path, "glob", gone)
    assert latest(mine, other) == (step_folder(mine, 2), 2)


def test_a_whole_model_is_written_from_a_sharded_save(tmp_path: Path) -> None:
    model = random_model()
    names = [name for name, part in model.named_modules() if isinstance(part, RoutedExperts)]
    ranges = {name: range(model.config.n_routed_experts) for name in names}
    # A save holds the moments too, which are nobody's but the trainer's.
    moments = {f"exp_avg_sq/{name}": p.detach() + 1 for name, p in model.named_parameters()}
    saved = model.state_dict() | moments
    save_shard(tmp_path / "save", saved, ranges, rank=0, world=1)
    consolidate(tmp_path / "save", model.config, tmp_path / "whole")
    found = load_pretrained(tmp_path / "whole").state_dict()
    assert all(torch.equal(found[name], value) for name, value in model.state_dict().items())


def test_a_marker_cut_short_never_stands_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("cut")))
    step_folder(tmp_path, 1).mkdir()
    with pytest.raises(OSError, match="cut"):
        mark_complete(step_folder(tmp_path, 1), {"step": 1})
    assert latest(tmp_path) is None


def test_bytes_are_on_the_disk_before_a_name_says_so_and_then_the_name_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, int]] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        done.append(("sync", os.fstat(handle).st_ino))
        real_fsync(handle)

    def replace(draft: Path, path: Path) -> None:
        real_replace(draft, path)
        done.append(("rename", path.stat().st_ino))

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    folder = step_folder(tmp_path, 1)
    save(folder, 1)
    mark_complete(folder, {"step": 1})
    shard, marker, inside, outside = (
        path.stat().st_ino
        for path in (
            folder / "rank-0-of-1.safetensors",
            folder / "complete.json",
            folder,
            tmp_path,
        )
    )
    expected = []
    for file in (shard, marker):
        expected += [("sync", file), ("rename", file), ("sync", inside)]
    assert done == [*expected, ("sync", outside)]


def test_pruning_keeps_the_newest_complete_saves_and_what_is_being_written(tmp_path: Path) -> None:
    for step in range(1, 8):
        save(step_folder(tmp_path, step), 1)
        if step in (1, 3, 4, 6):
            mark_complete(step_folder(tmp_path, step), {"step": step})
    prune(tmp_path, keep=2)
    left = sorted(int(path.name.removeprefix("step-")) for path in tmp_path.iterdir())
    assert left == [4, 5, 6, 7]
    facts = [json.loads((step_folder(tmp_path, s) / "complete.json").read_text()) for s in (4, 6)]
    assert facts == [{"step": 4}, {"step": 6}]


def test_saves_of_earlier_builds_go_once_there_is_a_complete_one(tmp_path: Path) -> None:
    mine, earlier = tmp_path / "mine", (tmp_path / "first", tmp_path / "second")
    for root in earlier:
        save(step_folder(root, 4), 1)
        mark_complete(step_folder(root, 4), {"step": 4})
    save(step_folder(mine, 6), 1)
    prune(mine, keep=2, earlier=earlier)
    assert all(step_folder(root, 4).is_dir() for root in earlier)
    mark_complete(step_folder(mine, 6), {"step": 6})
    prune(mine, keep=2, earlier=earlier)
    assert not any(root.exists() for root in earlier)
    assert latest(mine, *earlier) == (step_folder(mine, 6), 6)
    # So it is asked at every save, and they may be gone.
    prune(mine, keep=2, earlier=earlier)
    assert latest(mine, *earlier) == (step_folder(mine, 6), 6)


def test_one_complete_save_is_enough_to_prune_what_is_older(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(step_folder(tmp_path, step), 1)
    mark_complete(step_folder(tmp_path, 2), {"step": 2})
    prune(tmp_path, keep=2)
    assert sorted(tmp_path.iterdir()) == [step_folder(tmp_path, step) for step in (2, 3)]


def test_pruning_removes_nothing_before_there_is_a_complete_save(tmp_path: Path) -> None:
    save(step_folder(tmp_path, 1), 2)
    prune(tmp_path, keep=2)
    assert step_folder(tmp_path, 1).is_dir()

"""What the ranks of the long loop agree on, without Ray."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from cluster import checkpoint, fit
from cluster.checkpoint import load_shards, step_folder
from cluster.output import RESTART
from cluster.supply import Supply
from cluster.trainer import Trainer
from configs.errors import ArtifactError, MachineError
from stages.steps import read_metrics
from tests.cluster.jobs import STEPS, NextToken, job, saves
from tests.ranks import on_ranks
from tests.supplies import saves_of


def train(builder: str, steps: int) -> None:
    """All steps up to this one, in the folder of a builder."""
    todo = job(Path(builder), NextToken(), steps=steps, precision="high")
    fit._steps(todo, fit.desk_of(todo))


def train_behind(calm: str, rough: str, hidden_step: int) -> list[int]:
    """Train once without and once with a restart, at which rank 1's disk does not show the newest
    save yet; the steps that this rank loaded."""
    train(calm, STEPS)
    train(rough, hidden_step)
    real_latest, real_load = checkpoint.latest, Trainer.load
    loaded: list[int] = []

    def late(root: Path) -> tuple[Path, int] | None:
        found = real_latest(root)
        if dist.get_rank() == 1 and found is not None and found[1] == hidden_step:
            return step_folder(root, hidden_step - 2), hidden_step - 2
        return found

    def load(trainer: Trainer, folder: Path, *, step: int) -> None:
        loaded.append(step)
        real_load(trainer, folder, step=step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "latest", late)
        patch.setattr(Trainer, "load", load)
        train(rough, STEPS)
    return loaded


def test_a_rank_that_sees_an_older_save_continues_from_the_one_that_rank_0_chose(
    tmp_path: Path,
) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    folders = str(calm), str(rough)
    loaded = on_ranks(2, tmp_path / "ranks", train_behind, *folders, 4, collective_seconds=20)
    assert loaded == [[4], [4]]
    final = [step_folder(Path(saves(builder)), STEPS) for builder in (calm, rough)]
    expected, found = map(load_shards, final)
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    steps = [line["step"] for line in read_metrics(rough / "metrics.jsonl")]
    assert steps == list(range(1, STEPS + 1))


def train_anew(builder: str) -> list[list[Any]]:
    """Train to the end after an interruption; what is forgotten and what is loaded, in order."""
    told: list[list[Any]] = []
    real_load = Trainer.load

    def forget(supply: Supply, root: Path, step: int) -> None:
        told.append(["forget after", str(root), step])

    def load(trainer: Trainer, folder: Path, *, step: int) -> None:
        told.append(["load", str(folder.parent), step])
        real_load(trainer, folder, step=step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Supply, "forget_after", forget)
        patch.setattr(Trainer, "load", load)
        train(builder, 4)
        fit.desk_of(job(Path(builder), NextToken())).interrupt("restart 1: trainer 1 failed")
        train(builder, STEPS)
    return told


def test_a_group_forgets_what_one_before_it_left_and_says_why_it_begins(tmp_path: Path) -> None:
    builder = tmp_path / "builder"
    (told,) = on_ranks(1, tmp_path / "ranks", train_anew, str(builder))
    root = saves(builder)
    assert told == [["forget after", root, 0], ["forget after", root, 4], ["load", root, 4]]
    found = {line["step"]: line.get(RESTART) for line in read_metrics(builder / "metrics.jsonl")}
    said = "restart 1: trainer 1 failed; goes on from the save of step 4"
    assert found == {step: said if step == 5 else None for step in range(1, STEPS + 1)}


def choose_on_rank(builder: str, start: str) -> list[Any]:
    """What a rank is told to begin with, of nothing, of an earlier build's save, of its own."""
    chosen = []
    for begin, own in ((None, False), ((Path(start), 3), False), ((Path(start), 3), True)):
        if own and dist.get_rank() == 0:
            folder = step_folder(Path(saves(Path(builder))), 2)
            checkpoint.save_shard(folder, {"any": torch.ones(1)}, {}, rank=0, world=1)
            checkpoint.mark_complete(folder, {"step": 2})
        todo = job(Path(builder), NextToken(), saves=saves_of(Path(builder), start=begin))
        found = fit.agreed_save(todo, fit.desk_of(todo))
        chosen.append(None if found is None else [str(found[0]), found[1]])
    return chosen


def test_all_ranks_are_told_of_the_save_of_an_earlier_build_or_of_none(tmp_path: Path) -> None:
    builder, start = tmp_path / "builder", tmp_path / "earlier" / "step-00000003"
    told = on_ranks(2, tmp_path / "ranks", choose_on_rank, str(builder), str(start))
    own = step_folder(Path(saves(builder)), 2)
    assert told == [[None, [str(start), 3], [str(own), 2]]] * 2


def train_without_a_file(builder: str, looks: int) -> str:
    """Rank 1's disk does not show its own file at a restart, `looks` times; how each rank ends."""
    train(builder, 4)
    real, left = safe_open, looks

    def absent(path: Path, **settings: str) -> object:
        nonlocal left
        if dist.get_rank() == 1 and path.name.startswith("rank-1") and left:
            left -= 1
            raise FileNotFoundError(2, "No such file or directory", str(path))
        return real(path, **settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "safe_open", absent)
        patch.setattr(fit, "_SHOWN_SECONDS", 2.0)
        try:
            train(builder, STEPS)
        except (MachineError, RuntimeError) as error:
            return f"{type(error).__name__}: {error}"
    return "trained"


def test_a_rank_that_cannot_read_what_rank_0_chose_says_which_and_what(tmp_path: Path) -> None:
    builder = str(tmp_path / "builder")
    ended = on_ranks(2, tmp_path / "ranks", train_without_a_file, builder, 10**9)
    folder = step_folder(Path(saves(tmp_path / "builder")), 4)
    told = f"MachineError: rank 1 of 2 cannot read {folder}, which rank 0 found complete"
    assert re.match(re.escape(told), ended[1])
    assert "No such file or directory" in ended[1]
    assert ended[0] != "trained"


def test_a_rank_that_is_shown_a_save_late_looks_again(tmp_path: Path) -> None:
    builder = str(tmp_path / "builder")
    assert on_ranks(2, tmp_path / "ranks", train_without_a_file, builder, 2) == ["trained"] * 2


@pytest.mark.parametrize(
    ("said", "last"), [("first\n  the cause \n\n", "the cause"), (" \n", "RuntimeError")]
)
def test_of_a_long_failure_the_last_line_is_told(said: str, last: str) -> None:
    assert fit._last_line(RuntimeError(said)) == last


def train_on_a_broken_save(builder: str, cause: Exception) -> str:
    """A save cannot be read at a restart; how the only rank ends."""
    train(builder, 4)
    with pytest.MonkeyPatch.context() as patch:

        def fails(*_: object, **__: object) -> None:
            raise cause

        patch.setattr(Trainer, "load", fails)
        try:
            train(builder, STEPS)
        except ArtifactError as error:
            return str(error)
    return "trained"


def test_a_save_that_nobody_can_read_is_named_with_the_remedy(tmp_path: Path) -> None:
    builder, cause = str(tmp_path / "builder"), OSError(5, "Input/output error")
    (told,) = on_ranks(1, tmp_path / "ranks", train_on_a_broken_save, builder, cause)
    assert "cannot read the save" in told
    assert "Input/output error" in told
    assert told.endswith("delete it, and the next run continues from the one before it")


def test_a_save_that_is_known_to_lack_something_says_so_once(tmp_path: Path) -> None:
    builder, cause = str(tmp_path / "builder"), ArtifactError("no expert 3; remove the folder")
    told = on_ranks(1, tmp_path / "ranks", train_on_a_broken_save, builder, cause)
    assert told == ["no expert 3; remove the folder"]

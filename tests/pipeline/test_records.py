"""What a run's record means to whoever reads it later, and elsewhere."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.mirror import mirror_of
from pipeline.records import Invocation, Records, Run

PROCESS = {"pid": 1, "host": "elsewhere/1", "started": 0.0}


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """A run in `here/.ingot`, of a recipe and overlays beside and away from it."""
    (tmp_path / "here" / ".ingot" / "runs").mkdir(parents=True)
    (tmp_path / "here" / "deep").mkdir()
    (tmp_path / "shared").mkdir()
    names = ("here/mine.toml", "here/over.toml", "here/deep/under.toml", "shared/far.toml")
    for name in names:
        (tmp_path / name).touch()
    recipe, *overlays = (str(tmp_path / name) for name in names)
    sets = (f"base={tmp_path}/here/base",)
    return Run(
        id="1",
        recipe="mine",
        invocation=Invocation(recipe, tuple(overlays), sets),
        provenance={},
        started=0.0,
        store_root=str(tmp_path / "here" / ".ingot"),
        process=PROCESS,
    )


def read(store: Path, run: Run) -> Invocation:
    """The invocation as a command finds it that reads the store there."""
    records = Records(mirror_of(str(store)), say=pytest.fail)
    records.save(run)
    return records.invocation(records.load(run.id))


def test_where_nothing_was_moved_an_invocation_is_what_it_was(run: Run, tmp_path: Path) -> None:
    assert read(tmp_path / "here" / ".ingot", run) == run.invocation


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_files_beside_a_store_are_those_beside_it_now(run: Run, tmp_path: Path, how: str) -> None:
    there = tmp_path / "far" / "away"
    there.parent.mkdir()
    (shutil.move if how == "moved" else shutil.copytree)(tmp_path / "here", there)
    found = read(there / ".ingot", run)
    assert found.recipe == str(there / "mine.toml")
    over, under, far = found.overlays
    assert (over, under) == (str(there / "over.toml"), str(there / "deep" / "under.toml"))
    # What lies elsewhere, and is not there now, is still where it was.
    assert far == str(tmp_path / "shared" / "far.toml")
    assert found.sets == run.invocation.sets


def test_a_file_that_stayed_behind_is_named_where_it_was(run: Run, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(tmp_path / "here", there)
    (there / "over.toml").unlink()
    assert read(there / ".ingot", run).overlays[0] == str(tmp_path / "here" / "over.toml")


def test_a_recipe_that_ships_with_ingot_has_no_place(run: Run, tmp_path: Path) -> None:
    there = tmp_path / "there"
    shutil.copytree(tmp_path / "here", there)
    (there / "tiny").touch()
    shipped = replace(run, invocation=Invocation("tiny"))
    assert read(there / ".ingot", shipped) == Invocation("tiny")


def test_a_run_is_live_until_it_is_finished_or_its_process_here_is_gone(run: Run) -> None:
    assert run.live
    assert not replace(run, finished=True).live


def test_a_record_and_its_name_are_on_the_disk_once_it_is_saved(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real = [], os.fsync

    def fsync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    records = Records(mirror_of(str(tmp_path / "here" / ".ingot")), say=pytest.fail)
    records.save(run)
    assert (records.folder / f"{run.id}.json").stat().st_ino in synced
    assert records.folder.stat().st_ino == synced[-1]

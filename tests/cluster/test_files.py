"""Whole files or none, of which several makers make one."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from cluster.files import create_exclusively, replace

ROOT = Path(__file__).parents[2]
RACERS = 8
ROUNDS = 25


def refuse_links(code: int) -> Callable[..., None]:
    """`os.link` of a file system that has none, as error number `code` says."""

    def link(*args: object, **settings: object) -> None:
        raise OSError(code, os.strerror(code))

    return link


@pytest.fixture(params=["links", "no links"])
def _links(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the disk has hard links, and where it has not."""
    if request.param == "no links":
        monkeypatch.setattr(os, "link", refuse_links(errno.EPERM))


@pytest.mark.usefixtures("_links")
def test_what_is_there_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "file"
    assert create_exclusively(path, "first")
    assert not create_exclusively(path, "second")
    assert path.read_text() == "first"
    assert os.listdir(tmp_path) == ["file"]
    assert path.stat().st_nlink == 1


@pytest.mark.usefixtures("_links")
def test_of_many_threads_that_create_one_file_exactly_one_does(tmp_path: Path) -> None:
    for number in range(ROUNDS):
        path, barrier = tmp_path / f"{number}", Barrier(RACERS)
        texts = [f"{racer} " * 5000 for racer in range(RACERS)]

        def race(text: str, path: Path = path, barrier: Barrier = barrier) -> bool:
            barrier.wait(10)
            return create_exclusively(path, text)

        with ThreadPoolExecutor(RACERS) as pool:
            won = list(pool.map(race, texts))
        assert won.count(True) == 1
        assert path.read_text() == texts[won.index(True)]
    assert len(os.listdir(tmp_path)) == ROUNDS


RACE = """
import sys, time
from pathlib import Path
from cluster.files import create_exclusively
folder, name, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
print("ready", flush=True)
start = float(sys.stdin.readline())
while time.time() < start:
    pass
print(*[create_exclusively(folder / str(number), name * 1000) for number in range(rounds)])
"""


def test_of_many_processes_that_create_one_file_exactly_one_does(tmp_path: Path) -> None:
    names = [str(number) for number in range(RACERS)]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACE, str(tmp_path), name, str(ROUNDS)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for name in names
    ]
    for racer in racers:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    start = time.time() + 0.3
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(f"{start}\n")
        racer.stdin.flush()
    told = [racer.communicate(timeout=60)[0].split() for racer in racers]
    for number, won in enumerate(zip(*told, strict=True)):
        assert won.count("True") == 1
        assert (tmp_path / f"{number}").read_text() == names[won.index("True")] * 1000
    assert len(os.listdir(tmp_path)) == ROUNDS


def test_nobody_sees_half_of_a_file_that_comes_into_being(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "file", os.link

    def link(draft: Path, target: Path) -> None:
        assert not path.exists()
        assert json.loads(Path(draft).read_text()) == {"whole": True}
        real(draft, target)

    monkeypatch.setattr(os, "link", link)
    assert create_exclusively(path, '{"whole": true}')


def test_a_disk_that_fails_leaves_neither_a_file_nor_a_draft(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "link", refuse_links(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        create_exclusively(tmp_path / "file", "text")
    monkeypatch.setattr(os, "replace", refuse_links(errno.ENOSPC))
    with pytest.raises(OSError, match="No space left"):
        replace(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [create_exclusively, replace])
def test_a_disk_that_is_full_before_a_draft_is_whole_is_not_filled_with_drafts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path, str], object]
) -> None:
    monkeypatch.setattr(os, "fsync", refuse_links(errno.ENOSPC))
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            make(tmp_path / "file", "text")
    assert os.listdir(tmp_path) == []


@pytest.mark.usefixtures("_links")
def test_a_draft_that_is_there_already_is_used_up(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    draft, path = tmp_path / "mine" / "draft", tmp_path / "file"
    for won in (True, False):
        draft.write_text("longer than what comes")
        assert create_exclusively(path, "text", draft=draft) == won
        assert not draft.exists()
    assert path.read_text() == "text"


@pytest.mark.usefixtures("_links")
def test_without_its_draft_a_file_is_not_created(tmp_path: Path) -> None:
    """Whatever was made again in the place of the folder that held the draft."""
    (tmp_path / "mine").mkdir()
    with pytest.raises(FileNotFoundError):
        create_exclusively(tmp_path / "file", "text", draft=tmp_path / "mine" / "draft")
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]


def test_a_draft_that_another_tidied_away_is_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def link(draft: Path, target: Path) -> None:
        real(draft, target)
        Path(draft).unlink()

    monkeypatch.setattr(os, "link", link)
    assert create_exclusively(tmp_path / "file", "text")


def test_a_replaced_file_is_the_new_one_and_no_draft_stays(tmp_path: Path) -> None:
    replace(tmp_path / "file", "old")
    replace(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"
    assert os.listdir(tmp_path) == ["file"]


def test_a_replaced_file_is_on_the_disk_before_it_has_its_name_and_its_name_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    order: list[int | str] = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(handle: int) -> None:
        order.append(os.fstat(handle).st_ino)
        real_fsync(handle)

    def rename(source: Path, target: Path) -> None:
        real_replace(source, target)
        order.append("renamed")

    replace(path, "old")
    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    replace(path, "new")
    renamed = order.index("renamed")
    assert path.stat().st_ino in order[:renamed]
    assert tmp_path.stat().st_ino in order[renamed:]


@pytest.mark.usefixtures("_links")
def test_a_file_and_its_name_are_on_the_disk_once_it_is_created(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced, real = [], os.fsync

    def fsync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    create_exclusively(tmp_path / "file", "text")
    assert synced[-1] == tmp_path.stat().st_ino
    assert (tmp_path / "file").stat().st_ino in synced[:-1]

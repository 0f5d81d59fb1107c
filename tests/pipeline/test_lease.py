"""Who holds a generation: what a lease says, and who counts as dead."""

import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from cluster import place
from pipeline import lease as lease_module
from pipeline.lease import (
    DEAD_SECONDS,
    HEARTBEAT_SECONDS,
    Watch,
    beat,
    give_up,
    has_ended,
    has_stopped,
    is_held,
    newest,
    take,
    this_process,
)
from stages.manifest import Lease

SILENT = 0.5
"""What stands for `DEAD_SECONDS` here."""


@pytest.fixture
def lease(tmp_path: Path) -> Lease:
    """The first of a generation, of this process; its build reads two artifacts."""
    taken = take(str(tmp_path), 1, "me", ["artifacts/data/a/g1", "artifacts/train/b/g2"])
    assert taken is not None
    return taken


def write(folder: Path, number: int, holder: Any) -> Path:
    path = folder / f"lease-{number:06}.json"
    path.write_text(holder if isinstance(holder, str) else json.dumps(holder))
    return path


def elsewhere(**facts: Any) -> dict[str, Any]:
    """A holder on another machine, where one cannot look."""
    return {**this_process(), "host": "elsewhere", "owner": "x", "heartbeat": 1.0, **facts}


def test_a_lease_names_what_is_read_while_it_is_held(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also after a heartbeat: what it names nobody may delete."""
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.02)
    reads = ["artifacts/data/a/g1", "artifacts/train/b/g2"]
    _, first = newest(str(tmp_path))
    assert first["inputs"] == reads
    stop = threading.Event()
    beating = threading.Thread(target=beat, args=(lease, stop, reads))
    beating.start()
    deadline = time.monotonic() + 30
    while newest(str(tmp_path))[1]["heartbeat"] == first["heartbeat"]:
        assert time.monotonic() < deadline
    stop.set()
    beating.join()
    _, later = newest(str(tmp_path))
    assert later["inputs"] == reads
    assert not later["ended"]
    give_up(lease)
    _, last = newest(str(tmp_path))
    assert last["inputs"] == []
    assert last["ended"]


def test_a_heartbeat_outlives_a_disk_that_was_full_for_a_while(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.02)
    real = place.replace
    failed: list[str] = []

    def full_at_first(address: str, data: bytes) -> None:
        if len(failed) < 3:
            failed.append(address)
            raise OSError(28, "No space left on device")
        real(address, data)

    before = newest(str(tmp_path))[1]["heartbeat"]
    monkeypatch.setattr(place, "replace", full_at_first)
    stop = threading.Event()
    beating = threading.Thread(target=beat, args=(lease, stop))
    beating.start()
    deadline = time.monotonic() + 30
    while newest(str(tmp_path))[1]["heartbeat"] == before:
        assert time.monotonic() < deadline
    stop.set()
    beating.join()


def test_a_number_is_given_once_and_the_highest_counts(tmp_path: Path, lease: Lease) -> None:
    assert take(str(tmp_path), 1, "another") is None
    for number in (10, 9):
        assert take(str(tmp_path), number, f"owner {number}") is not None
    number, holder = newest(str(tmp_path))
    assert (number, holder["owner"]) == (10, "owner 10")


def test_a_process_is_told_from_a_later_one_of_its_number() -> None:
    me = this_process()
    assert not has_ended(me)
    # Start times are known to a second only.
    for seconds in (-1.5, 1.5):
        assert not has_ended({**me, "started": me["started"] + seconds})
    for seconds in (-2.5, 2.5):
        assert has_ended({**me, "started": me["started"] + seconds})
    assert has_ended({**me, "pid": 2**22 + 1})
    assert has_ended({"host": me["host"]})


def test_nobody_judges_processes_of_another_machine() -> None:
    assert not has_ended(elsewhere(pid=2**22 + 1))
    assert not Watch("/").is_dead(elsewhere(pid=2**22 + 1))


def test_a_builder_has_stopped_once_it_says_so_or_its_process_is_gone(
    tmp_path: Path, lease: Lease
) -> None:
    assert not has_stopped(str(tmp_path), 1)
    write(tmp_path, 2, elsewhere())
    assert not has_stopped(str(tmp_path), 2)
    write(tmp_path, 2, elsewhere(ended=True))
    assert has_stopped(str(tmp_path), 2)
    write(tmp_path, 3, {**this_process(), "pid": 2**22 + 1})
    assert has_stopped(str(tmp_path), 3)


@pytest.mark.parametrize("text", ["{", "[]", '"text"'])
def test_a_lease_that_cannot_be_read_is_a_dead_holders_once_that_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """It may be half written, where a file system has no links."""
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", SILENT)
    write(tmp_path, 1, text)
    watch, begun = Watch("/"), time.monotonic()
    assert not watch.is_dead(newest(str(tmp_path))[1])
    while not watch.is_dead(newest(str(tmp_path))[1]):
        time.sleep(0.02)
    assert time.monotonic() - begun > SILENT


def test_a_holder_of_this_machine_is_not_waited_for(
    tmp_path: Path, lease: Lease, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    assert is_held(str(tmp_path))
    give_up(lease)
    assert not is_held(str(tmp_path))
    assert not is_held(str(tmp_path / "never begun"))


def test_a_holder_elsewhere_is_alive_while_its_heartbeat_moves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", SILENT)
    path = write(tmp_path, 1, elsewhere())
    assert not is_held(str(tmp_path))
    moves = iter(range(2, 1000))
    real = time.sleep

    def sleep(seconds: float) -> None:
        # Whole or not at all, as its owner writes it.
        draft = tmp_path / "draft"
        draft.write_text(json.dumps(elsewhere(heartbeat=next(moves))))
        os.replace(draft, path)
        real(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    assert is_held(str(tmp_path))


def test_a_holder_may_miss_a_few_beats() -> None:
    assert 0 < 4 * HEARTBEAT_SECONDS <= DEAD_SECONDS

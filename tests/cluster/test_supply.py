"""Workers that see none of the driver's files fetch what they read and send what they write."""

import fcntl
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from cluster import place, supply
from cluster.mirror import Mirror, sha256
from cluster.pool import _TrainWorker
from cluster.supply import Supply
from configs.errors import MachineError, NoAnswer, StoreError
from tests.supplies import local

ROWS = {"train/0.arrow": b"rows", "held_out/0.arrow": b"held out", "tokenizer.json": b"{}"}


@pytest.fixture
def driver(apart: Mirror) -> Supply:
    """That of a driver with one input, all of which lies in the store and on its disk."""
    files = apart.root / "artifacts" / "data" / "f1" / "g1" / "000001-aa" / "files"
    for name, content in ROWS.items():
        (files / name).parent.mkdir(parents=True, exist_ok=True)
        (files / name).write_bytes(content)
        apart.push(files / name)
    sign = apart.root / "artifacts" / "pretrain" / "f2" / "g1" / "000001-bb" / "manifest.draft"
    sign.parent.mkdir(parents=True)
    sign.touch()
    hashes = {name: sha256(files / name) for name in ROWS}
    return Supply(apart, sign, is_spread=True, inputs={files: hashes}, cache_bytes=10**9)


def leave(driver: Supply) -> Path:
    """Make this process one of another machine; the folder of the input's files."""
    shutil.rmtree(driver.mirror.root)
    (files,) = driver.inputs
    return files


def test_a_worker_that_sees_the_driver_s_files_fetches_and_sends_nothing(driver: Supply) -> None:
    (files,) = driver.inputs
    (files / "tokenizer.json").write_bytes(b"changed here alone")
    shard = driver.builder / "resume" / "saves" / "step-1" / "rank-0.safetensors"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"shard")
    driver.arrive()
    driver.bring(files)
    driver.send(shard)
    assert not driver.is_far
    assert (files / "tokenizer.json").read_bytes() == b"changed here alone"
    assert not place.exists(driver.mirror.address(shard))


def test_a_worker_elsewhere_has_what_it_asks_for_and_no_more(driver: Supply) -> None:
    files = leave(driver)
    assert driver.is_far
    driver.arrive()
    assert driver.builder.is_dir()
    driver.bring(files / "train")
    assert (files / "train" / "0.arrow").read_bytes() == b"rows"
    assert not (files / "held_out").exists()
    driver.bring(files, files / "train")
    assert {name: (files / name).read_bytes() for name in ROWS} == ROWS


def test_bytes_that_are_not_those_of_the_manifest_are_refused_with_the_machine(
    driver: Supply, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = leave(driver)
    place.replace(driver.mirror.address(files / "tokenizer.json"), b"old bytes")
    monkeypatch.setattr("socket.gethostname", lambda: "node-7")
    with pytest.raises(StoreError, match=r"^on node-7: s3://.*not those of its manifest .*twice"):
        driver.bring(files)


def test_shards_that_are_written_elsewhere_are_found_by_all(driver: Supply) -> None:
    leave(driver)
    driver.arrive()
    shard = driver.builder / "resume" / "saves" / "step-1" / "rank-1.safetensors"
    shard.parent.mkdir(parents=True)
    shard.write_bytes(b"shard")
    driver.send(shard)
    shutil.rmtree(driver.mirror.root)
    driver.fetch(driver.builder / "resume" / "saves")
    assert shard.read_bytes() == b"shard"
    # On one machine alone nobody is elsewhere, and no call is made.
    shutil.rmtree(driver.mirror.root)
    replace(driver, is_spread=False).fetch(driver.builder / "resume" / "saves")
    assert not shard.exists()


def test_what_a_build_leaves_on_a_worker_s_machine_is_deleted_some_day(driver: Supply) -> None:
    files = leave(driver)
    driver.arrive()
    driver.bring(files)
    (driver.builder / "resume").mkdir()
    (driver.builder / "resume" / "shard").write_bytes(b"x" * 1000)
    assert driver.mirror.trim(0, [], idle_seconds=0) != []
    assert not driver.builder.exists()
    assert not files.exists()


def test_a_store_that_answers_again_costs_no_save(
    driver: Supply, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(driver)
    driver.arrive()
    shard = driver.builder / "shard"
    shard.write_bytes(b"shard")
    real, tries = place.send, []

    def send(path: Path, address: str) -> None:
        tries.append(path)
        if len(tries) < 3:
            raise NoAnswer(f"{address}: does not answer")
        real(path, address)

    monkeypatch.setattr(place, "send", send)
    monkeypatch.setattr(supply, "_AGAIN_SECONDS", 0.01)
    driver.send(shard)
    assert place.read(driver.mirror.address(shard)) == b"shard"
    tries.clear()
    monkeypatch.setattr(supply, "SILENT_SECONDS", 0.0)
    with pytest.raises(StoreError, match="does not answer"):
        driver.send(shard)


def test_one_worker_of_a_machine_fetches_while_the_others_wait(
    driver: Supply, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = leave(driver)
    fetched: list[str] = []
    real = place.fetch

    def fetch(address: str, path: Path) -> None:
        time.sleep(0.2)
        fetched.append(path.name)
        real(address, path)

    monkeypatch.setattr(place, "fetch", fetch)
    threads = [threading.Thread(target=driver.bring, args=(files,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert sorted(fetched) == sorted(Path(name).name for name in ROWS)


def test_a_worker_that_waits_for_another_too_long_says_for_what(
    driver: Supply, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = leave(driver)
    files.parent.mkdir(parents=True)
    monkeypatch.setattr(supply, "FETCH_SECONDS", 0.3)
    with (files.parent / ".fetching").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(
            MachineError, match=rf"another worker has been fetching {files} for 0.3"
        ):
            driver.bring(files)


def test_a_folder_that_a_machine_does_not_see_is_named(tmp_path: Path) -> None:
    sign = tmp_path / "builder" / "manifest.draft"
    folder = Supply(Mirror(str(tmp_path), tmp_path), sign, is_spread=True)
    with pytest.raises(MachineError, match=rf"does not see {sign.parent}, .*mount that folder"):
        folder.arrive()
    # Where there is but one machine nobody looks: a folder that is gone is another's to tell.
    replace(folder, is_spread=False).arrive()
    assert not local(tmp_path).is_far


def test_a_folder_that_cannot_be_made_is_named(driver: Supply) -> None:
    leave(driver)
    driver.mirror.root.write_text("a file")
    with pytest.raises(MachineError, match=r"cannot make .*; set XDG_CACHE_HOME for the driver"):
        driver.arrive()


def test_shards_of_an_abandoned_group_go_where_the_driver_does_not_see_them(
    driver: Supply,
) -> None:
    leave(driver)
    driver.arrive()
    root = driver.builder / "resume" / "saves"
    for step in (8, 16):
        (root / f"step-{step:08d}").mkdir(parents=True)
    driver.forget_after(root, 8)
    assert [path.name for path in root.iterdir()] == ["step-00000008"]
    driver.sign.touch()
    (root / "step-00000024").mkdir()
    driver.forget_after(root, 8)
    assert (root / "step-00000024").exists()


def test_a_trainer_elsewhere_forgets_later_shards_before_it_loads(driver: Supply) -> None:
    """One of the same size would be taken for that which the store has by then."""
    root = driver.builder / "resume" / "saves"
    old, later = (root / f"step-{step:08d}" / "rank-0-of-1.safetensors" for step in (8, 16))
    old.parent.mkdir(parents=True)
    old.write_bytes(b"shard")
    driver.mirror.push(old)
    leave(driver)
    driver.arrive()
    later.parent.mkdir(parents=True)
    later.write_bytes(b"abandoned")
    seen: list[tuple[list[str], bytes]] = []

    class Reading:
        """Notes what lies there when it is told to load."""

        def load(self, folder: Path, *, step: int) -> None:
            seen.append(([path.name for path in root.iterdir()], old.read_bytes()))

    worker = object.__new__(_TrainWorker)
    worker.supply, worker.trainer = driver, cast(Any, Reading())
    worker.load(old.parent, 8)
    assert seen == [(["step-00000008"], b"shard")]

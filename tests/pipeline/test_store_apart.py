"""A store of objects keeps every promise of one on a disk, and several machines share it.

Another machine is another cache folder: what lies in the store is all that the two share.
"""

import argparse
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest

from cluster import place
from cluster.mirror import mirror_of
from configs.errors import ArtifactError, LeaseLost, NoAnswer, StoreError
from configs.parallel import StoreConfig
from configs.reading import load_recipe
from pipeline import cli, removal
from pipeline import lease as lease_module
from pipeline import store as store_module
from pipeline.lease import give_up, held_among, newest, take, this_process
from pipeline.records import Invocation
from pipeline.removal import remove_objects
from pipeline.slots import Slot, open_slot
from pipeline.tracking.runs import Told
from pipeline.verbs import clean as clean_module
from pipeline.verbs.clean import Entry, clean, inventory
from pipeline.verbs.run import _write_page
from stages.manifest import MANIFEST, Lease
from tests.objects import Objects, serving
from tests.pipeline.fakes import World, fill, made, outcomes

RACERS = 8


@pytest.fixture(scope="module")
def objects() -> Iterator[Objects]:
    with serving() as objects:
        yield objects


class Machines:
    """Worlds that share a store and nothing else."""

    def __init__(self, url: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.url, self._folder, self._monkeypatch = url, folder, monkeypatch

    def world(self, machine: str) -> World:
        """A command's process on one machine."""
        self._monkeypatch.setenv("XDG_CACHE_HOME", str(self._folder / machine))
        return World(StoreConfig(url=self.url, min_free_bytes=0))


@pytest.fixture
def machines(
    objects: Objects,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> Machines:
    monkeypatch.setattr(lease_module, "APART_FACTOR", 1)
    name = request.node.name.replace("[", "-").replace("]", "")
    return Machines(f"{objects.url}/{name}", tmp_path, monkeypatch)


def test_what_one_machine_made_another_reuses_without_fetching_it(machines: Machines) -> None:
    first = machines.world("one").run()
    assert set(outcomes(first).values()) == {"built"}
    there = machines.world("two")
    second = there.run()
    assert set(outcomes(second).values()) == {"reused"}
    assert made(first, "train").content == made(second, "train").content
    assert not list(there.store.root.rglob("weights.bin"))
    assert {run.id for run in there.store.records.newest_first()} == {first.id, second.id}


def test_artifacts_are_those_of_a_local_store_byte_by_byte(
    machines: Machines, tmp_path: Path
) -> None:
    apart = machines.world("one").run()
    local = World(StoreConfig(url=str(tmp_path / "local"), min_free_bytes=0)).run()
    for node in apart.outcomes:
        assert made(apart, node).content == made(local, node).content


def test_what_another_machine_builds_on_is_fetched_and_checked(machines: Machines) -> None:
    machines.world("one").run()
    there = machines.world("two")
    run = there.run(judge={"seed": 3})
    assert outcomes(run)["judge"] == "built"
    (weights,) = there.store.root.glob("artifacts/train/*/g1/*/files/weights.bin")
    assert weights.read_text() == "train 3 0"
    # A copy that was damaged since is fetched anew.
    weights.write_text("train 9 9")
    assert outcomes(there.run(judge={"seed": 4}))["judge"] == "built"
    assert weights.read_text() == "train 3 0"


def test_old_bytes_are_never_taken(machines: Machines, monkeypatch: pytest.MonkeyPatch) -> None:
    one = machines.world("one")
    first = one.run()
    address = f"{machines.url}/{made(first, 'train').address}"
    manifest = json.loads(place.read(f"{address}/{MANIFEST}"))
    place.replace(f"{address}/{manifest['address']}/weights.bin", b"train 0 0")
    there = machines.world("two")
    run = there.run(judge={"seed": 3})
    assert outcomes(run)["judge"] == "failed"
    error = run.outcomes["judge"]
    assert "weights.bin: the store returned bytes that are not those of its manifest" in str(error)


def test_an_object_that_vanished_is_named(machines: Machines) -> None:
    one = machines.world("one")
    first = one.run()
    address = f"{machines.url}/{made(first, 'train').address}"
    manifest = json.loads(place.read(f"{address}/{MANIFEST}"))
    place.delete(f"{address}/{manifest['address']}/weights.bin")
    node = one.graph()["train"]
    committed = one.store.find(node)
    assert committed is not None
    with pytest.raises(ArtifactError, match=r"weights\.bin is missing; rebuild with --force train"):
        committed.check(hashes=True)


def test_of_two_drivers_one_builds_and_one_reuses(machines: Machines) -> None:
    worlds = [machines.world(name) for name in ("one", "two")]
    with ThreadPoolExecutor(2) as pool:
        runs = list(pool.map(lambda world: world.run(gather={"seconds": 1.0}), worlds))
    for node in runs[0].outcomes:
        assert sorted(outcomes(run)[node] for run in runs) == ["built", "reused"], node


def test_of_many_builders_that_commit_one_generation_exactly_one_does(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machines.world("one")
    node, barrier = world.graph()["data"], Barrier(RACERS)
    real = place.create

    def create(address: str, data: bytes) -> bool:
        if address.endswith(MANIFEST):
            barrier.wait(60)
        return real(address, data)

    monkeypatch.setattr(lease_module.Watch, "is_dead", lambda *args: True)
    monkeypatch.setattr(Lease, "check", lambda lease, **_: None)
    monkeypatch.setattr(place, "create", create)

    def build(number: int) -> bool:
        with world.store.slot(node, {}) as slot:
            assert isinstance(slot, Slot)
            ready.wait(60)
            try:
                world.store.commit(slot, node, fill(slot), {}, {"number": number})
            except LeaseLost:
                return False
            return True

    ready = Barrier(RACERS)
    with ThreadPoolExecutor(RACERS) as pool:
        won = list(pool.map(build, range(RACERS)))
    assert won.count(True) == 1
    committed = world.store.find(node)
    assert committed is not None
    assert committed.manifest.provenance["number"] == won.index(True)
    committed.check(hashes=True)


def test_a_builder_that_slept_through_the_commit_changes_nothing(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It wakes between its last look and its manifest."""
    sleeping, waking = machines.world("one"), machines.world("two")
    node = sleeping.graph()["data"]
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 60.0)
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(lease_module, "has_ended", lambda process: False)
    with sleeping.store.slot(node, {}) as first:
        assert isinstance(first, Slot)
        with waking.store.slot(node, {}) as second:
            assert isinstance(second, Slot)
            won = waking.store.commit(second, node, fill(second), {}, {"who": "two"})
        before = place.read(f"{machines.url}/{won.address}/{MANIFEST}")
        monkeypatch.setattr(Lease, "check", lambda lease, **_: None)
        with pytest.raises(LeaseLost, match="another builder has committed"):
            sleeping.store.commit(first, node, fill(first), {}, {"who": "one"})
    assert place.read(f"{machines.url}/{won.address}/{MANIFEST}") == before
    found = waking.store.find(node)
    assert found is not None
    found.check(hashes=True)
    assert found.manifest.provenance["who"] == "two"


def test_a_generation_that_was_deleted_at_the_commit_is_no_artifact(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its files went between the builder's last look and its manifest."""
    world = machines.world("one")
    node = world.graph()["data"]
    with world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        generation = world.store.mirror.address(slot.path.parent)
        monkeypatch.setattr(Lease, "check", lambda lease, **_: place.delete(generation))
        with pytest.raises(LeaseLost, match="was deleted"):
            world.store.commit(slot, node, fill(slot), {}, {})
    monkeypatch.undo()
    assert MANIFEST not in place.names(generation)


def test_an_interrupted_build_is_continued_on_another_machine(machines: Machines) -> None:
    one = machines.world("one")
    node = one.graph()["data"]
    with one.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        save = slot.path / "resume" / "step-00000007"
        save.mkdir(parents=True)
        (save / "rank-0.bin").write_text("weights")
        (slot.path / "metrics.jsonl").write_text('{"step": 7}\n')
        (save / "complete.json").write_text('{"step": 7}')
    there = machines.world("two")
    assert there.store.is_begun(node)
    with there.store.slot(node, {}) as again:
        assert isinstance(again, Slot)
        (earlier,) = again.earlier
        there_save = Path(earlier, "resume", "step-00000007")
        assert (there_save / "rank-0.bin").read_text() == "weights"
        assert (there_save / "complete.json").read_text() == '{"step": 7}'
        assert Path(earlier, "metrics.jsonl").read_text() == '{"step": 7}\n'
        made = there.store.commit(again, node, fill(again), {}, {})
    left = place.names(f"{machines.url}/{made.address}")
    assert len(left) == 2
    assert MANIFEST in left


def test_a_save_reaches_the_store_while_the_build_goes_on_and_its_mark_comes_last(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.carrier.SEND_SECONDS", 0.1)
    sent: list[str] = []
    real = place.send

    def send(path: Path, address: str) -> None:
        real(path, address)
        sent.append(path.name)

    monkeypatch.setattr(place, "send", send)
    world = machines.world("one")
    node = world.graph()["train"]
    with world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        (slot.path / "metrics.jsonl").write_text("")
        for step in (1, 2):
            save = slot.path / "resume" / f"step-{step}"
            save.mkdir(parents=True)
            for name in ("a.bin", "complete.json", "z.bin"):
                (save / name).write_text(f"{name} {step}")
            deadline = time.monotonic() + 30
            while sent.count("complete.json") < step:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        resume = f"{world.store.mirror.address(slot.path)}/resume"
        for path in (slot.path / "resume" / "step-1").iterdir():
            path.unlink()
        while any(name.startswith("step-1/") for name in place.sizes(resume)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(place.sizes(resume)) == 3
    assert [name for name in sent if name != "metrics.jsonl"] == [
        "a.bin",
        "z.bin",
        "complete.json",
    ] * 2


def test_copies_that_were_not_used_for_longest_go_first(machines: Machines) -> None:
    machines.world("one").run()
    there = machines.world("two")
    there.run(judge={"seed": 3})
    copies = sorted(there.store.root.glob("artifacts/*/*/g*/*/.used"))
    # Two that were fetched, and the one that was made of them.
    assert len(copies) == 3
    for age, copy in enumerate(copies):
        os.utime(copy, (1000 - age, 1000 - age))
    gone = there.store.mirror.trim(0, keep=[copies[0].parent.parent], idle_seconds=0)
    assert gone == [copies[2].parent, copies[1].parent]
    assert copies[0].exists()
    # What is gone is fetched again.
    assert outcomes(there.run(judge={"seed": 4}))["judge"] == "built"


@pytest.mark.parametrize(
    ("url", "content", "message"),
    [
        ("newer", b'{"format": 99}', "says format 99, and this version of Ingot reads"),
        ("damaged", b"{", "cannot be read"),
    ],
)
def test_a_store_of_another_format_is_refused(
    objects: Objects, url: str, content: bytes, message: str
) -> None:
    place.replace(f"{objects.url}/{url}/store.json", content)
    with pytest.raises(StoreError, match=message):
        World(StoreConfig(url=f"{objects.url}/{url}", min_free_bytes=0))


def test_a_bucket_that_is_not_there_is_named(tmp_path: Path, objects: Objects) -> None:
    """By every command, and not only by one that writes."""
    with pytest.raises(StoreError, match=r"s3://nowhere/store/store\.json: no such bucket"):
        World(StoreConfig(url="s3://nowhere/store", min_free_bytes=0))


def test_a_place_that_lets_two_create_one_file_is_no_store(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machines.world("one")
    monkeypatch.setattr(place, "create", lambda address, data: True)
    with pytest.raises(StoreError, match="lets two create one file"):
        world.store.prepare()


def test_a_place_that_does_not_answer_for_a_moment_ends_no_training(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machines.world("one")
    with world.store.slot(world.graph()["data"], {}) as slot:
        assert isinstance(slot, Slot)

        def silent(address: str) -> list[str]:
            raise StoreError(f"{address}: does not answer")

        with monkeypatch.context() as patch:
            patch.setattr(place, "names", silent)
            slot.lease.check()
            # What commits is asked of the place itself.
            with pytest.raises(StoreError, match="does not answer"):
                slot.lease.check(anew=True)


def test_a_save_that_did_not_reach_the_store_is_continued_where_it_lies(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machines.world("one")
    node = world.graph()["data"]

    def refuse(path: Path, address: str) -> None:
        raise StoreError(f"{address}: does not answer")

    with monkeypatch.context() as patch:
        patch.setattr(place, "send", refuse)
        with world.store.slot(node, {}) as slot:
            assert isinstance(slot, Slot)
            save = slot.path / "resume" / "step-1"
            save.mkdir(parents=True)
            (save / "complete.json").write_text("{}")
    assert "here it can be" in world.said[-1]
    assert world.store.is_begun(node)
    with world.store.slot(node, {}) as again:
        assert isinstance(again, Slot)
        assert again.earlier == (str(slot.path),)
        assert (save / "complete.json").exists()


def test_what_is_committed_is_so_though_what_is_behind_it_cannot_be_deleted(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machines.world("one")

    def refuse(*args: object) -> None:
        raise StoreError("s3://x: does not answer")

    monkeypatch.setattr(store_module, "tidy", refuse)
    run = world.run()
    assert set(outcomes(run).values()) == {"built"}
    assert any("is committed, but not all" in line for line in world.said)


def test_a_builder_that_could_not_begin_leaves_nobody_waiting(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machines.world("one")
    node = world.graph()["data"]
    real = open_slot

    def fail(*args: object) -> Slot:
        monkeypatch.setattr(store_module, "open_slot", real)
        raise StoreError("s3://x: does not answer")

    monkeypatch.setattr(store_module, "open_slot", fail)
    with pytest.raises(StoreError), world.store.slot(node, {}):
        pytest.fail("was given a slot")
    begin = time.monotonic()
    with world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
    assert time.monotonic() - begin < 5
    assert not [line for line in world.said if "waiting for process" in line]


def test_news_of_a_run_that_goes_on_are_fetched_whatever_their_size(machines: Machines) -> None:
    one = machines.world("one")
    run = one.run()
    path = one.store.records.folder / f"{run.id}.json"
    text = path.read_text()
    assert '"finished": true' in text
    there = machines.world("two")
    stale = there.store.records.folder / path.name
    stale.parent.mkdir(parents=True)
    stale.write_text(text.replace('"finished": true', '"finished":false'))
    assert next(there.store.records.newest_first()).finished


def test_manifests_alone_are_fetched_to_compare(machines: Machines) -> None:
    first = machines.world("one").run()
    there = machines.world("two")
    path = there.store.root / made(first, "train").address
    there.store.fetch(path, most_bytes=0)
    assert [one.name for one in path.rglob("*") if one.is_file()] == [MANIFEST]


def test_a_copy_that_was_asked_for_of_late_is_left_to_whoever_reads_it(machines: Machines) -> None:
    machines.world("one").run()
    there = machines.world("two")
    there.run(judge={"seed": 3})
    assert there.store.mirror.trim(0, keep=[]) == []


def test_two_servers_with_one_bucket_are_two_stores(monkeypatch: pytest.MonkeyPatch) -> None:
    roots = set()
    for endpoint in ("http://a", "http://b"):
        monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
        roots.add(mirror_of("s3://bucket/store").root)
    assert len(roots) == 2
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert mirror_of("s3://bucket/store").root.is_absolute()


@pytest.mark.parametrize(
    ("url", "message"),
    [("s3://KEY:SECRET@bucket/x", "holds a login"), ("s3://", "names no bucket")],
)
def test_an_address_that_no_store_can_have_is_refused_without_its_secret(
    url: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["plan", "smoke", "--set", f"store.url={url}"]) > 0
    told = capsys.readouterr().err
    assert message in told
    assert "SECRET" not in told


def test_what_was_made_here_and_never_read_is_a_copy_too(machines: Machines) -> None:
    world = machines.world("one")
    run = world.run()
    gone = world.store.mirror.trim(0, keep=[], idle_seconds=0)
    assert {path.parent for path in gone} == {
        world.store.root / made(run, node).address for node in run.outcomes
    }


def test_nothing_is_sent_of_a_build_behind_its_commit(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[str] = []
    real = place.send

    def send(path: Path, address: str) -> None:
        sent.append(address)
        real(path, address)

    monkeypatch.setattr(place, "send", send)
    world = machines.world("one")
    node = world.graph()["data"]
    with world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        (slot.path / "logs").mkdir()
        (slot.path / "logs" / "trainer-0.log").write_text("words")
        world.store.commit(slot, node, fill(slot), {}, {})
    assert len([one for one in sent if one.endswith("trainer-0.log")]) == 1


def test_what_workers_of_a_failed_build_printed_is_seen_from_another_machine(
    machines: Machines,
) -> None:
    world = machines.world("one")
    node = world.graph()["data"]
    with pytest.raises(ValueError, match="broke"), world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        (slot.path / "logs").mkdir()
        (slot.path / "logs" / "trainer-0.log").write_text("words")
        raise ValueError("broke")
    address = f"{world.store.mirror.address(slot.path)}/logs/trainer-0.log"
    assert place.read(address) == b"words"


def test_an_artifact_that_cannot_be_fetched_costs_no_page(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = machines.world("one").run()
    there = machines.world("two")
    run = there.run(judge={"seed": 3})
    place.delete(f"{machines.url}/{made(first, 'data').address}")
    told = Told(load_recipe("smoke"), run, list(run.outcomes), "ingot run fake")
    path = _write_page(told, there.store, lambda run_id: run_id, run)
    assert "judge" in path.read_text()
    assert place.exists(f"{machines.url}/runs/{path.name}")


def listed(world: World) -> dict[Path, Entry]:
    return {entry.path: entry for entry in inventory(world.store, unfinished=True)}


def run_clean(world: World, monkeypatch: pytest.MonkeyPatch, *, code: int = 0) -> None:
    """`ingot clean` of this store."""

    class Asked:
        def store(self, say: object) -> object:
            return world.store

    monkeypatch.setattr(clean_module, "load_asked", lambda args: Asked())
    assert clean(argparse.Namespace(unfinished=False, dry_run=False)) == code


def test_what_newer_artifacts_replaced_is_deleted_here_and_there(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = machines.world("one")
    old = one.run(train={"steps": 2})
    new = one.run(train={"steps": 3})
    gone, kept = one.generation(old, "train"), one.generation(new, "train")
    entries = listed(one)
    assert (entries[gone].verdict, entries[kept].verdict) == ("remove", "keep")
    assert entries[gone].num_bytes == sum(place.sizes(one.store.mirror.address(gone)).values()) > 0
    # Another machine reuses it in a run that goes on: then it stays.
    other = machines.world("other")
    reading = other.run(train={"steps": 2})
    other.store.records.update(replace(reading, finished=False, process=this_process()))
    one.run(train={"steps": 3})
    run_clean(one, monkeypatch)
    assert "in use by run" in capsys.readouterr().out
    assert place.exists(one.store.mirror.address(gone / MANIFEST))
    other.store.records.update(replace(reading, finished=True))
    run_clean(one, monkeypatch)
    assert place.names(one.store.mirror.address(gone)) == []
    assert not gone.exists()
    assert place.exists(one.store.mirror.address(kept / MANIFEST))
    assert "freed" in capsys.readouterr().out
    # What is gone is built again, under the first number.
    assert outcomes(machines.world("third").run(train={"steps": 2}))["train"] == "built"


def test_a_build_that_commits_while_its_folder_is_deleted_leaves_no_manifest(
    machines: Machines,
) -> None:
    world = machines.world("one")
    node = world.graph()["data"]
    world.store.prepare()
    with pytest.raises(LeaseLost), world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        corpus = fill(slot)
        # Silent for so long that it counts as dead, to whoever deletes.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(removal, "is_held", lambda address: False)
            remove_objects(world.store.mirror, slot.path.parent, lambda: None)
        world.store.commit(slot, node, corpus, {}, {})
    assert not place.exists(world.store.mirror.address(slot.path.parent / MANIFEST))
    assert outcomes(world.run())["data"] == "built"


@pytest.mark.parametrize("moment", ["held", "lease", "used"])
def test_what_somebody_builds_or_uses_is_not_deleted(machines: Machines, moment: str) -> None:
    world = machines.world("one")
    generation = world.generation(world.run(), "data")
    address = world.store.mirror.address(generation)
    before = place.sizes(address)
    mirror = world.store.mirror
    with pytest.MonkeyPatch.context() as patch:
        if moment == "held":
            take(address, 1, "another")
            patch.setattr(removal, "is_held", lambda address: True)
        if moment == "lease":
            patch.setattr(removal, "take", lambda *_: None)
        with pytest.raises(StoreError, match=r"is building it|used by me; left as it is"):
            remove_objects(mirror, generation, lambda: "used by me")
    place.delete(f"{address}/lease-000001.json")
    assert place.sizes(address) == before


@pytest.mark.parametrize(("patience", "ends"), [(60.0, True), (0.0, False)])
def test_a_wait_for_another_builder_outlasts_a_moment_without_answers(
    machines: Machines, monkeypatch: pytest.MonkeyPatch, patience: float, ends: bool
) -> None:
    one, other = machines.world("one"), machines.world("other")
    node, looks = one.graph()["data"], [0]

    def look(address: str) -> Any:
        looks[0] += 1
        if looks[0] == 2:
            raise NoAnswer(f"{address}: does not answer")
        if looks[0] == 3 and isinstance(slot, Slot):
            give_up(slot.lease)
        return newest(address)

    with one.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        monkeypatch.setattr(store_module, "newest", look)
        monkeypatch.setattr(store_module, "PATIENCE_SECONDS", patience)
        monkeypatch.setattr(store_module, "TELL_SECONDS", 0.0)
        if ends:
            with other.store.slot(node, {}) as taken:
                assert isinstance(taken, Slot)
                assert taken.lease.number == 2
            assert any("waiting for an answer" in one for one in other.said)
        else:
            with (
                pytest.raises(StoreError, match="does not answer"),
                other.store.slot(node, {}),
            ):
                pass
    assert looks[0] >= 2


def test_a_removal_that_looks_for_long_leaves_a_builder_that_took_over(machines: Machines) -> None:
    """Its lease was no longer the newest when it had looked; and it leaves none behind."""
    world = machines.world("one")
    node = world.graph()["data"]
    world.store.prepare()
    generation = world.store.folder(node) / "g1"
    address = world.store.mirror.address(generation)
    abandoned = take(address, 1, "abandoned")
    assert abandoned is not None
    give_up(abandoned)

    def look() -> None:
        assert take(address, 3, "living") is not None
        place.create(f"{address}/000003-living/resume/saves/step-1/rank-0", b"shard")

    with pytest.raises(StoreError, match=r"another process builds it, .*; left as it is"):
        remove_objects(world.store.mirror, generation, look)
    names = place.names(address)
    assert "000003-living" in names
    assert newest(address)[0] == 3
    assert "lease-000002.json" not in names

    def fail() -> None:
        raise KeyError("interrupted")

    living = Lease(address, 3, "living")
    give_up(living)
    with pytest.raises(KeyError):
        remove_objects(world.store.mirror, generation, fail)
    assert newest(address)[0] == 3


def test_a_removal_that_is_overtaken_in_the_middle_leaves_what_is_left(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Silent for so long that another builder took over, after the manifest was gone."""
    world = machines.world("one")
    generation = world.generation(world.run(), "data")
    address = world.store.mirror.address(generation)
    shard, real = f"{address}/000003-living/resume/saves/step-1/rank-0", place.delete

    def delete(one: str) -> None:
        real(one)
        if one == f"{address}/{MANIFEST}":
            assert take(address, 3, "living") is not None
            place.create(shard, b"shard")

    monkeypatch.setattr(place, "delete", delete)
    with pytest.raises(StoreError, match="another process builds it; what is left stays"):
        remove_objects(world.store.mirror, generation, lambda: None)
    assert place.exists(shard)
    assert newest(address)[0] == 3
    assert generation.exists()


def test_dead_builders_are_watched_at_a_time_and_once(
    machines: Machines, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = machines.world("one")
    world.store.prepare()
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 3.0)
    addresses = [f"{world.store.mirror.url}/artifacts/data/f/g{n}" for n in range(4)]
    elsewhere = {"owner": "x", "host": "elsewhere", "heartbeat": 1.0, "ended": False}
    for address in addresses:
        place.create(f"{address}/lease-000001.json", json.dumps(elsewhere).encode())
    dead: dict[str, object] = {}
    begin = time.monotonic()
    assert held_among(addresses, dead) == set()
    assert 3.0 <= time.monotonic() - begin < 9.0
    begin = time.monotonic()
    assert held_among(addresses, dead) == set()
    assert time.monotonic() - begin < 3.0
    moved = {**elsewhere, "heartbeat": 2.0}
    place.replace(f"{addresses[0]}/lease-000001.json", json.dumps(moved).encode())
    assert held_among(addresses[:1], dead) == set()  # Watched once more: it may live again.
    # `ingot clean`, which looks twice, keeps them between.
    monkeypatch.setattr(clean_module, "_dead", {})
    paths = [world.store.root / f"artifacts/data/f/g{n}" for n in range(4)]
    assert clean_module._held(world.store, paths) == set()
    assert set(clean_module._dead) == set(addresses)
    assert dead[addresses[0]] == ("x", 2.0)


def test_commands_know_the_recipe_by_the_latest_run_of_the_store_that_is_named(
    objects: Objects,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    url = f"{objects.url}/named"
    world = World(StoreConfig(url=url, min_free_bytes=0))
    run = replace(world.run(), recipe="smoke", invocation=Invocation("smoke"))
    world.store.records.update(run)
    code = cli.main(["status", "--set", f"store.url={url}"])
    out, err = capsys.readouterr()
    assert "no run is recorded" not in out + err
    assert "smoke" in out
    assert code in (0, 3)

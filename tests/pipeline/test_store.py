"""What a slot, a lease and a commit promise."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster import place
from cluster.mirror import Mirror
from configs.data import FilesSource
from configs.errors import ArtifactError, LeaseLost, StoreError
from configs.parallel import StoreConfig
from pipeline import lease as lease_module
from pipeline import slots as slots_module
from pipeline import store as store_module
from pipeline.graph import Node
from pipeline.lease import newest, take
from pipeline.removal import remove
from pipeline.slots import Slot, open_slot
from pipeline.store import Committed, Store
from stages.artifacts import Corpus
from stages.data.reads import identify
from stages.manifest import MANIFEST, Lease, verify
from tests.pipeline.fakes import World, fill

ROOT = Path(__file__).parents[2]


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


@pytest.fixture
def node(world: World) -> Node:
    return world.graph()["data"]


@contextmanager
def opened(world: World, node: Node, replacing: int = 0) -> Iterator[Slot]:
    with world.store.slot(node, {}, replacing=replacing) as slot:
        assert isinstance(slot, Slot)
        yield slot


def build(world: World, node: Node, replacing: int = 0) -> Committed:
    with opened(world, node, replacing) as slot:
        return world.store.commit(slot, node, fill(slot), {}, {})


def steal(slot: Slot) -> Lease:
    """What another builder gets that takes the slot over."""
    lease = take(str(slot.path.parent), slot.lease.number + 1, "another")
    assert lease is not None
    return lease


def slot_of(made: Committed) -> Path:
    """The builder's folder that a manifest names."""
    return Path(made.artifact.uri).parent


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_committed_artifact_is_found_again_with_its_facts(world: World, node: Node) -> None:
    half_written = world.store.folder(node) / "g1" / ".lease-000001.json.0.draft"
    half_written.parent.mkdir(parents=True)
    half_written.touch()
    made = build(world, node)
    assert world.store.find(node) == made
    assert made.manifest.files.keys() == {"text.txt"}
    assert made.manifest.address == f"{slot_of(made).name}/files"
    assert names(made.path) == {MANIFEST, slot_of(made).name}
    assert names(slot_of(made)) == {"files"}


def test_all_that_a_manifest_names_is_on_the_disk_before_it(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    real_fsync, real_link = os.fsync, os.link

    def fsync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        real_fsync(handle)

    def link(draft: Path, target: Path) -> None:
        if Path(target).name == MANIFEST:
            builder = slot.path
            needed = [builder, *builder.rglob("*"), Path(draft)]
            assert [path for path in needed if path.stat().st_ino not in synced] == []
        real_link(draft, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "link", link)
    with opened(world, node) as slot:
        (slot.files / "train" / "deep").mkdir(parents=True)
        (slot.files / "train" / "deep" / "rows.bin").write_text("rows")
        made = world.store.commit(slot, node, fill(slot), {}, {})
    assert made.path.stat().st_ino in synced


def test_a_commit_opens_no_folder_outside_the_store(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those above it may be somebody else's, and closed."""
    real = os.open

    def closed(path: object, flags: int, *args: Any, **settings: Any) -> int:
        if not Path(str(path)).is_relative_to(world.store.root):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, flags, *args, **settings)  # type: ignore[arg-type]

    with opened(world, node) as slot:
        artifact = fill(slot)
        monkeypatch.setattr(os, "open", closed)
        made = world.store.commit(slot, node, artifact, {}, {})
        monkeypatch.undo()
    verify(str(made.path))


def test_a_disk_that_is_full_at_the_commit_is_named_and_nothing_is_committed(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: object, **settings: object) -> bool:
        raise OSError(28, "No space left on device")

    with opened(world, node) as slot:
        monkeypatch.setattr(slots_module, "create_exclusively", full)
        with pytest.raises(StoreError, match=r"cannot be written \(No space left on device\)"):
            world.store.commit(slot, node, fill(slot), {}, {})
        monkeypatch.undo()
    assert world.store.find(node) is None


def test_an_unfinished_artifact_is_not_an_artifact(world: World, node: Node) -> None:
    with pytest.raises(RuntimeError), opened(world, node) as slot:
        fill(slot)
        raise RuntimeError
    assert world.store.find(node) is None
    with pytest.raises(ArtifactError, match=r"no manifest\.json"):
        Corpus.load(str(slot.path.parent))


def test_an_interrupted_slot_is_continued_with_its_resume_state_alone(
    world: World, node: Node
) -> None:
    with opened(world, node) as slot:
        (slot.path / "resume").mkdir()
        (slot.path / "resume" / "step").write_text("7")
        (slot.path / "metrics.jsonl").write_text("{}\n")
        (slot.files / "half.bin").write_text("half")
    with opened(world, node) as again:
        assert again.path.parent == slot.path.parent
        assert again.path != slot.path
        assert again.earlier == (str(slot.path),)
        assert (Path(again.earlier[0]) / "resume" / "step").read_text() == "7"
        assert names(again.path) == {"files", again.draft.name}
        assert names(again.files) == set()
        for private in ("resume/step", "ray/notes", "metrics.jsonl", "scratch"):
            path = again.path / private
            path.parent.mkdir(exist_ok=True)
            path.write_text("8")
        made = world.store.commit(again, node, fill(again), {}, {})
    assert made.manifest.files.keys() == {"text.txt"}
    assert names(made.path) == {MANIFEST, again.path.name}
    assert names(again.path) == {"files", "metrics.jsonl"}


def test_what_an_interrupted_build_left_without_resume_state_goes_with_the_next(
    world: World, node: Node
) -> None:
    with opened(world, node) as slot:
        (slot.path / "resume" / "saves").mkdir(parents=True)
        (slot.files / "half.bin").write_text("half")
    with opened(world, node) as again:
        assert again.earlier == ()
        assert not slot.path.exists()


def built_while_the_first_sleeps(
    monkeypatch: pytest.MonkeyPatch, world: World, node: Node, build: Callable[[], object]
) -> Path:
    """Another takes over and commits as the first has its lease; the generation of both."""
    real = open_slot

    def paused(mirror: Mirror, generation: Path, lease: Lease, number: int) -> Slot:
        monkeypatch.setattr(store_module, "open_slot", real)
        build()
        return real(mirror, generation, lease, number)

    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(store_module, "open_slot", paused)
    with opened(world, node) as slot:
        with pytest.raises(LeaseLost):
            slot.lease.check()
        return slot.path.parent


KILLED = """
import os, signal, sys
from configs.parallel import StoreConfig
from pipeline import lease as lease_module, store as store_module
from tests.pipeline.fakes import World, fill
lease_module.DEAD_SECONDS = 0.5
store_module.tidy = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
world = World(StoreConfig(url=sys.argv[1], min_free_bytes=0))
node = world.graph()["data"]
with world.store.slot(node, {}) as slot:
    world.store.commit(slot, node, fill(slot), {}, {})
"""


def test_what_was_committed_by_one_that_was_killed_outlives_a_builder_that_slept(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", KILLED, str(world.store.root)]

    def build() -> None:
        assert subprocess.run(command, cwd=ROOT, timeout=60).returncode == -signal.SIGKILL

    verify(str(built_while_the_first_sleeps(monkeypatch, world, node, build)))


def test_a_heartbeat_that_comes_after_the_commit_costs_no_committed_byte(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build_and_beat() -> None:
        with opened(world, node) as slot:
            world.store.commit(slot, node, fill(slot), {}, {})
            # Past its check when the leases were tidied away.
            place.replace(slot.lease.uri, lease_module._body(slot.lease))
        assert json.loads(Path(slot.lease.uri).read_text())["ended"]

    verify(str(built_while_the_first_sleeps(monkeypatch, world, node, build_and_beat)))


def test_of_several_interrupted_builds_the_newest_comes_first(world: World, node: Node) -> None:
    left: list[str] = []
    for _ in range(3):
        with opened(world, node) as slot:
            (slot.path / "resume").mkdir()
            (slot.path / "resume" / "step").write_text("7")
        left.insert(0, str(slot.path))
    with opened(world, node) as slot:
        assert list(slot.earlier) == left


def test_a_rebuild_keeps_the_committed_one_until_it_commits(world: World, node: Node) -> None:
    first = build(world, node)
    with opened(world, node, replacing=1) as slot:
        assert slot.path.parent != first.path
        assert world.store.find(node) == first
        verify(str(first.path))
        second = world.store.commit(slot, node, fill(slot), {}, {})
    assert world.store.find(node) == second
    assert second.generation == 2
    verify(str(first.path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_text("Text"), "text.txt has sha256"),
        (lambda file: file.write_text("longer"), "text.txt has 6 bytes"),
        (lambda file: file.unlink(), "text.txt is missing"),
    ],
)
def test_a_damaged_file_is_named(
    world: World, node: Node, damage: Callable[[Path], object], message: str
) -> None:
    made = build(world, node)
    damage(made.artifact.path("text.txt"))
    with pytest.raises(ArtifactError, match=message):
        made.check(hashes=True)


def test_a_lost_lease_and_a_held_slot_name_the_remedy(world: World, node: Node) -> None:
    with opened(world, node) as slot:
        with pytest.raises(StoreError, match="wait for it, or end it"):
            remove(slot.path.parent)
        steal(slot)
        with pytest.raises(LeaseLost, match="the same command later takes what"):
            slot.lease.check()


def test_a_folder_that_nobody_may_enter_counts_as_committed(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = build(world, node).path
    real = Path.exists

    def refuse(path: Path) -> bool:
        if path.parent == folder:
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(Path, "exists", refuse)
    assert world.store.newest(node) == 1


def test_a_live_lease_is_waited_for_and_its_artifact_taken(world: World, node: Node) -> None:
    entered, finish = threading.Event(), threading.Event()

    def builder() -> None:
        with opened(world, node) as slot:
            entered.set()
            finish.wait(10)
            world.store.commit(slot, node, fill(slot), {}, {})

    thread = threading.Thread(target=builder)
    thread.start()
    assert entered.wait(10)
    threading.Timer(0.6, finish.set).start()
    with world.store.slot(node, {}) as found:
        assert isinstance(found, Committed)
    thread.join()
    assert len(world.said) == 1
    assert f"waiting for process {os.getpid()}" in world.said[0]


HOLD = """
import sys, time
from configs.parallel import StoreConfig
from tests.pipeline.fakes import World
world = World(StoreConfig(url=sys.argv[1], min_free_bytes=0))
with world.store.slot(world.graph()["data"], {}) as slot:
    (slot.path / "resume").mkdir()
    (slot.path / "resume" / "step").touch()
    print("held", flush=True)
    time.sleep(60)
"""


def test_the_lease_of_a_killed_process_is_taken_over_at_once(world: World, node: Node) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(world.store.root)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        # Not waited for: a killed child that nobody reaped is dead all the same.
        holder.kill()
        deadline = time.monotonic() + 5
        with opened(world, node) as slot:
            assert time.monotonic() < deadline
            assert len(slot.earlier) == 1


def test_a_heartbeat_that_stands_still_is_a_dead_holder(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 0.5)
    with opened(world, node) as slot:
        pass
    foreign = {"owner": "x", "pid": 1, "host": "elsewhere", "started": 0, "heartbeat": time.time()}
    (slot.path.parent / "lease-000002.json").write_text(json.dumps(foreign))
    started = time.monotonic()
    with opened(world, node):
        assert time.monotonic() - started > 0.5


def test_a_heartbeat_that_moves_is_a_living_holder(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 0.5)
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.1)
    watch = lease_module.Watch("/")
    with opened(world, node) as slot:
        # As a waiter on another machine sees it: it cannot look at the process.
        for _ in range(12):
            holder = {**newest(str(slot.path.parent))[1], "host": "elsewhere"}
            assert not watch.is_dead(holder)
            time.sleep(0.1)


def test_a_builder_renews_its_own_lease_and_only_while_it_holds(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.05)
    with opened(world, node) as slot:
        own = Path(slot.lease.uri)
        first = own.read_text()
        time.sleep(0.3)
        assert own.read_text() != first
        other = Path(steal(slot).uri)
        time.sleep(0.3)
        texts = own.read_text(), other.read_text()
        time.sleep(0.3)
        assert (own.read_text(), other.read_text()) == texts
        assert json.loads(texts[1])["owner"] == "another"


def test_a_lost_lease_stops_the_commit_and_writes_nothing(world: World, node: Node) -> None:
    with opened(world, node) as slot:
        artifact = fill(slot)
        steal(slot)
        with pytest.raises(LeaseLost, match=r"lost to lease-000002\.json"):
            world.store.commit(slot, node, artifact, {}, {})
        assert not (slot.path.parent / MANIFEST).exists()
    number, holder = newest(str(slot.path.parent))
    assert (number, holder["owner"], holder["ended"]) == (2, "another", False)


def test_a_lease_lost_while_files_are_hashed_stops_the_commit(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(world, node) as slot:

        def lose(folder: Path, name: str) -> str:
            steal(slot)
            return "0" * 64

        monkeypatch.setattr(store_module, "hash_durably", lose)
        with pytest.raises(LeaseLost):
            world.store.commit(slot, node, fill(slot), {}, {})
    assert world.store.find(node) is None


BUILD = """
import sys
from configs.parallel import StoreConfig
from tests.pipeline.fakes import World, outcomes
world = World(StoreConfig(url=sys.argv[1], min_free_bytes=0))
run = world.run(every={"diary": sys.argv[2], "seconds": 0.3})
print(outcomes(run))
"""


def test_nothing_beats_after_the_lease_was_given_up(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A beat that is under way as the build ends would make it look alive."""

    def slow(lease: Lease, stop: threading.Event, inputs: list[str]) -> None:
        stop.wait(10)
        time.sleep(0.3)
        place.replace(lease.uri, lease_module._body(lease, ended=False))

    monkeypatch.setattr(store_module, "beat", slow)
    with opened(world, node) as slot:
        pass
    time.sleep(0.6)
    assert newest(str(slot.path.parent))[1]["ended"]


@pytest.mark.parametrize("name", ["take", "give_up"])
def test_a_lease_that_cannot_be_written_is_told_as_a_fault_of_the_store(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store_module, name, full)
    with (
        pytest.raises(StoreError, match=r"cannot be written \(No space left on device\)"),
        opened(world, node),
    ):
        pass


def test_what_is_committed_between_a_look_and_the_lease_is_taken_and_the_lease_goes(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = take
    made: list[Committed] = []

    def late(*args: Any) -> Lease | None:
        monkeypatch.setattr(store_module, "take", real)
        made.append(build(world, node))
        return real(*args)

    monkeypatch.setattr(store_module, "take", late)
    with world.store.slot(node, {}) as found:
        assert found == made[0]
    assert names(made[0].path) == {MANIFEST, slot_of(made[0]).name}


def test_who_waits_is_told_again_while_it_lasts(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store_module, "TELL_SECONDS", 0.4)
    with opened(world, node):
        threading.Thread(target=lambda: world.store._take(node, [], 0), daemon=True).start()
        deadline = time.monotonic() + 30
        while len(world.said) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(set(world.said)) == 1


def test_what_cannot_be_tidied_away_undoes_no_commit(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(world, node) as slot:
        (slot.path / "resume").mkdir()
        (slot.path / "resume" / "step").write_text("7")
    with opened(world, node) as again:
        (again.path / "resume").mkdir()
        artifact, generation = fill(again), again.path.parent
        real = Path.glob

        def refuse(*args: object, **settings: object) -> None:
            raise PermissionError(13, "Permission denied")

        def glob(path: Path, pattern: str) -> Iterator[Path]:
            yield from real(path, pattern)
            if pattern == ".*.draft":
                # A heartbeat's, which has its name by now.
                yield generation / ".lease-000002.json.0.draft"

        monkeypatch.setattr(os, "rmdir", refuse)
        monkeypatch.setattr(Path, "glob", glob)
        made = world.store.commit(again, node, artifact, {}, {})
        monkeypatch.undo()
    verify(str(made.path))


def test_what_cannot_be_cleared_keeps_nobody_from_building(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    with opened(world, node):
        pass

    def refuse(*args: object, **settings: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "rmdir", refuse)
    with opened(world, node) as slot:
        assert slot.earlier == ()


def test_generations_are_counted_as_numbers(world: World, node: Node) -> None:
    made = build(world, node)
    for name in ("g9", "g10", "g11", "gone", "g"):
        (made.path.parent / name).mkdir()
    for name in ("g9", "g10"):
        (made.path.parent / name / MANIFEST).write_text((made.path / MANIFEST).read_text())
    assert world.store.newest(node) == 10
    found = [path.name for path in world.store.generations()]
    assert found == ["g1", "g9", "g10", "g11"]


def test_artifacts_up_to_a_size_are_hashed_and_larger_ones_measured(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = build(world, node)
    size = sum(entry.bytes for entry in made.manifest.files.values())
    made.artifact.path("text.txt").write_text("Text")
    made.check(hashes=False)
    monkeypatch.setattr(store_module, "HASHED_BYTES", size)
    with pytest.raises(ArtifactError, match="has sha256"):
        made.check(hashes=True)
    monkeypatch.setattr(store_module, "HASHED_BYTES", size - 1)
    made.check(hashes=True)


def test_two_processes_build_each_node_once(tmp_path: Path) -> None:
    store, diary = tmp_path / "store", tmp_path / "diary"
    command = [sys.executable, "-c", BUILD, str(store), str(diary)]
    pair = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)
    ]
    told = [one.communicate(timeout=60)[0] for one in pair]
    assert [one.returncode for one in pair] == [0, 0]
    assert sorted(diary.read_text().split()) == [
        "gather",
        "judge",
        "pack.ascend",
        "pack.cuda",
        "train",
    ]
    assert "failed" not in "".join(told)


def test_a_store_below_a_file_says_so(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    store = Store(StoreConfig(url=str(file / "store"), min_free_bytes=0), say=print)
    with pytest.raises(StoreError, match=rf"{file} is a file"):
        store.prepare()


def test_a_disk_with_too_little_space_is_refused_with_both_numbers(tmp_path: Path) -> None:
    store = Store(StoreConfig(url=str(tmp_path / "s"), min_free_bytes=1 << 62), say=print)
    with pytest.raises(StoreError, match=r"bytes free, store\.min_free_bytes = 4,611,"):
        store.prepare()


def test_a_disk_with_just_the_space_that_is_asked_for_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    Store(StoreConfig(url=str(tmp_path / "s"), min_free_bytes=1000), say=print).prepare()
    assert names(tmp_path / "s") == {"artifacts", "runs", "store.json"}
    with pytest.raises(StoreError, match="1,000 bytes free"):
        Store(StoreConfig(url=str(tmp_path / "t"), min_free_bytes=1001), say=print).prepare()


def test_a_store_that_was_begun_and_holds_nothing_yet_is_taken(tmp_path: Path) -> None:
    """Its maker was killed before it said which format it writes."""
    (tmp_path / "artifacts").mkdir()
    Store(StoreConfig(url=str(tmp_path), min_free_bytes=0), say=print).prepare()
    assert (tmp_path / "store.json").is_file()


def test_a_remote_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="only folders, s3:// and gs://"):
        Store(StoreConfig(url="memory://somewhere"), say=print)


@pytest.mark.parametrize("name", ["a::b", "zip::x", "a b", "a%20b", "a[b]", "a?b#c"])
def test_a_store_may_lie_in_any_folder(tmp_path: Path, name: str) -> None:
    root = tmp_path / name / ".ingot"
    world = World(StoreConfig(url=str(root), min_free_bytes=0))
    assert world.store.root == root
    made = build(world, world.graph()["data"])
    made.check(hashes=True)
    assert world.store.find(world.graph()["data"]) == made
    assert root.is_dir()


def test_a_source_around_the_store_does_not_grow_with_it(tmp_path: Path) -> None:
    (tmp_path / "text.jsonl").write_text("{}")
    world = World(StoreConfig(url=str(tmp_path / "store"), min_free_bytes=0))
    source = FilesSource(share=1, glob=str(tmp_path / "**" / "*.json*"))
    before = identify("mine", source, world.store.hashes)
    build(world, world.graph()["data"])
    assert list((tmp_path / "store").rglob("*.json"))
    assert identify("mine", source, world.store.hashes) == before
    assert list(before) == ["text.jsonl"]

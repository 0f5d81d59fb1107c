"""A builder that slept through losing its lease can touch nothing that another has committed."""

import hashlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from threading import Barrier

import psutil
import pytest

from cluster.files import create_exclusively
from cluster.mirror import mirror_of
from configs.errors import LeaseLost
from configs.parallel import StoreConfig
from pipeline import lease as lease_module
from pipeline import slots as slots_module
from pipeline.graph import Node
from pipeline.lease import newest, take
from pipeline.slots import Slot, builders
from pipeline.store import Committed
from stages.manifest import MANIFEST, Lease, verify
from tests.pipeline.fakes import World, fill

ROOT = Path(__file__).parents[2]
DEAD_SECONDS = 0.5
RACERS = 8


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


@pytest.fixture
def node(world: World) -> Node:
    return world.graph()["data"]


BUILDER = """
import os, signal, sys
from configs.errors import LeaseLost
from configs.parallel import StoreConfig
from pipeline import slots as slots_module
from stages.manifest import MANIFEST
from tests.pipeline.fakes import World, fill

def pause():
    os.kill(os.getpid(), signal.SIGSTOP)

real = slots_module.create_exclusively

def create(path, text, **settings):
    if path.name == MANIFEST and sys.argv[2] == "after the last check":
        pause()
    return real(path, text, **settings)

slots_module.create_exclusively = create
world = World(StoreConfig(url=sys.argv[1], min_free_bytes=0))
node = world.graph()["data"]
with world.store.slot(node, {}) as slot:
    if sys.argv[3] == "with saves":
        (slot.path / "resume").mkdir()
        (slot.path / "resume" / "step").write_text("7")
    fill(slot, "begun")
    slot.lease.check()
    if sys.argv[2] == "after a check":
        pause()
    slot.files.mkdir(parents=True, exist_ok=True)
    artifact = fill(slot, "late")
    try:
        world.store.commit(slot, node, artifact, {}, {})
        print("committed", flush=True)
    except LeaseLost as error:
        print("lost:", error, flush=True)
"""


@dataclass
class Sleeper:
    """A builder in a process of its own, paused at the place that it was told."""

    process: subprocess.Popen[str]

    def go_on(self) -> str:
        """Let it go on to its end; what it says."""
        self.process.send_signal(signal.SIGCONT)
        told = self.process.communicate(timeout=30)[0]
        assert self.process.returncode == 0
        return told


@pytest.fixture
def sleeper(world: World, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Sleeper]]:
    """Start a builder that stops itself; to others its heartbeat tells that it is dead."""
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", DEAD_SECONDS)
    with ExitStack() as stack:

        def start(where: str, saves: str = "without saves") -> Sleeper:
            process = subprocess.Popen(
                [sys.executable, "-c", BUILDER, str(world.store.root), where, saves],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                text=True,
            )
            stack.enter_context(process)
            stack.callback(process.kill)
            deadline = time.monotonic() + 30
            while psutil.Process(process.pid).status() != psutil.STATUS_STOPPED:
                assert time.monotonic() < deadline, "the builder did not come to its pause"
                time.sleep(0.02)
            return Sleeper(process)

        yield start


def hashes(folder: Path) -> dict[str, str]:
    """Every file below `folder` by its content."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def build(world: World, node: Node, text: str = "text") -> Committed:
    with world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        return world.store.commit(slot, node, fill(slot, text), {}, {})


@pytest.mark.parametrize("where", ["after a check", "after the last check"])
def test_a_builder_that_was_paused_changes_nothing_that_another_committed(
    world: World, node: Node, sleeper: Callable[..., Sleeper], where: str
) -> None:
    late = sleeper(where)
    started = time.monotonic()
    made = build(world, node, "by the one that took over")
    # The holder is alive, on this host: only its heartbeat tells.
    assert time.monotonic() - started > DEAD_SECONDS
    manifest, before = (made.path / MANIFEST).read_bytes(), hashes(Path(made.artifact.uri))
    told = late.go_on()
    assert told.startswith("lost: ")
    if where == "after the last check":
        assert "another builder has committed" in told
    assert (made.path / MANIFEST).read_bytes() == manifest
    assert hashes(Path(made.artifact.uri)) == before
    verify(str(made.path))
    assert world.store.find(node) == made
    assert made.artifact.path("text.txt").read_text() == "by the one that took over"


@pytest.mark.parametrize("saves", ["with saves", "without saves"])
def test_a_paused_builder_that_commits_before_the_one_that_took_over_commits_all_it_wrote(
    world: World, node: Node, sleeper: Callable[..., Sleeper], saves: str
) -> None:
    late = sleeper("after the last check", saves)
    with world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        assert late.go_on() == "committed\n"
        made = world.store.find(node)
        assert made is not None
        assert made.artifact.path("text.txt").read_text() == "late"
        verify(str(made.path))
        with pytest.raises(LeaseLost, match="lost to the builder that committed"):
            slot.lease.check()
        slot.files.mkdir(parents=True, exist_ok=True)
        with pytest.raises(LeaseLost):
            world.store.commit(slot, node, fill(slot, "too late"), {}, {})
    assert world.store.find(node) == made
    verify(str(made.path))


def test_a_paused_builder_is_waited_for_while_its_heartbeat_may_still_come(
    world: World, node: Node, sleeper: Callable[..., Sleeper], monkeypatch: pytest.MonkeyPatch
) -> None:
    late = sleeper("after a check")
    monkeypatch.setattr(lease_module, "DEAD_SECONDS", 60.0)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(build, world, node)
        time.sleep(1.0)
        assert not waiting.done()
        assert late.go_on() == "committed\n"
        taken = waiting.exception(30)
    # It was handed what the other committed, not a slot.
    assert isinstance(taken, AssertionError)


def test_of_many_builders_that_commit_one_generation_exactly_one_does(
    world: World, node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All are past their last check when the first of them commits."""
    barrier = Barrier(RACERS)

    def create(path: Path, text: str, *, draft: Path | None = None) -> bool:
        if path.name == MANIFEST:
            barrier.wait(10)
        return create_exclusively(path, text, draft=draft)

    monkeypatch.setattr(slots_module, "create_exclusively", create)
    with world.store.slot(node, {}) as first:
        assert isinstance(first, Slot)
        generation = first.path.parent
        slots = [
            Slot(generation / f"000001-racer{number}", first.lease, 1, ())
            for number in range(RACERS)
        ]

        def commit(slot: Slot) -> Committed | LeaseLost:
            slot.files.mkdir(parents=True)
            slot.draft.touch()
            try:
                return world.store.commit(slot, node, fill(slot, slot.path.name), {}, {})
            except LeaseLost as lost:
                return lost

        with ThreadPoolExecutor(RACERS) as pool:
            ended = list(pool.map(commit, slots))
    (won,) = (one for one in ended if isinstance(one, Committed))
    assert sum(isinstance(one, LeaseLost) for one in ended) == RACERS - 1
    assert world.store.find(node) == won
    assert won.artifact.path("text.txt").read_text() == Path(won.artifact.uri).parent.name
    assert builders(mirror_of(str(won.path)), won.path) == [Path(won.artifact.uri).parent]
    verify(str(won.path))


def test_of_many_builders_that_take_one_lease_exactly_one_has_it(tmp_path: Path) -> None:
    for number in range(1, 20):
        barrier = Barrier(RACERS)

        def race(owner: str, number: int = number, barrier: Barrier = barrier) -> Lease | None:
            barrier.wait(10)
            return take(str(tmp_path), number, owner)

        with ThreadPoolExecutor(RACERS) as pool:
            leases = list(pool.map(race, map(str, range(RACERS))))
        (won,) = (lease for lease in leases if lease is not None)
        assert newest(str(tmp_path))[0] == number
        assert newest(str(tmp_path))[1]["owner"] == won.owner


def test_many_builders_that_find_one_dead_take_over_one_after_the_other(
    world: World, node: Node
) -> None:
    world.store.prepare()
    generation = world.store.folder(node) / "g1"
    generation.mkdir(parents=True)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = take(str(generation), 1, "dead")
    assert dead is not None
    text = Path(dead.uri).read_text()
    Path(dead.uri).write_text(text.replace(f'"pid": {os.getpid()}', f'"pid": {gone.pid}'))
    barrier = Barrier(RACERS)
    built = []

    def race(number: int) -> Committed:
        mine = World(world.store.config)
        barrier.wait(10)
        with mine.store.slot(node, {}) as slot:
            if isinstance(slot, Committed):
                return slot
            built.append(number)
            time.sleep(0.3)
            return mine.store.commit(slot, node, fill(slot, f"by {number}"), {}, {})

    with ThreadPoolExecutor(RACERS) as pool:
        made = list(pool.map(race, range(RACERS)))
    assert len(built) == 1
    assert {one.manifest.content for one in made} == {made[0].manifest.content}
    assert made[0].artifact.path("text.txt").read_text() == f"by {built[0]}"
    assert len(builders(mirror_of(str(generation)), generation)) == 1

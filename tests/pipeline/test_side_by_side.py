"""Nodes that do not need each other, built at the same time: as one by one, only sooner."""

import _thread
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from configs.parallel import StoreConfig
from pipeline import runner
from pipeline.crew import Crew, hire
from pipeline.graph import Graph, Node, Selection, make_graph
from pipeline.lease import newest
from pipeline.records import Blocked, Built, Failed, Reused
from pipeline.store import Committed
from stages.artifacts import Corpus
from stages.contract import Planned, Workspace, stage
from stages.hashing import Hashes
from tests.conftest import Recorder
from tests.pipeline.fakes import FakeConfig, World, failed, gather, made, outcomes

ROOT = Path(__file__).parents[2]
ALL = ["data", "train", "judge", "pack.cuda", "pack.ascend"]
MEETING_SECONDS = 10.0


class Heard(Recorder):
    """A listener that keeps the order in which it hears of nodes."""

    def __init__(self) -> None:
        """It has heard nothing yet."""
        super().__init__()
        self.begun: list[str] = []
        self.ended: list[str] = []

    def begin(self, node: Node, inputs: Mapping[str, Committed]) -> Recorder:
        """Every node's tracker is this one."""
        self.begun.append(node.name)
        return self

    def end(
        self, node: Node, outcome: Built | Reused | Failed | Blocked, made: Committed | None
    ) -> None:
        """Keep the name."""
        self.ended.append(node.name)


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


def pair(one: Planned[Corpus], other: Planned[Corpus]) -> Graph:
    """A line of two nodes that do not need each other."""
    return make_graph({"one": one, "other": other}, Hashes())


def test_side_by_side_comes_out_as_one_after_the_other(tmp_path: Path) -> None:
    contents = []
    for at_once in (1, 2, 4):
        url = str(tmp_path / str(at_once))
        run = World(StoreConfig(url=url, min_free_bytes=0)).run(at_once=at_once)
        assert outcomes(run) == dict.fromkeys(ALL, "built")
        assert list(run.outcomes) == ALL
        contents.append([(made(run, name).content, made(run, name).figures) for name in ALL])
    assert contents[0] == contents[1] == contents[2]


def test_two_nodes_really_run_at_the_same_time(world: World) -> None:
    meeting = threading.Barrier(2)

    @stage(revision=1)
    def meeting_the_other(config: FakeConfig, work: Workspace) -> Corpus:
        meeting.wait(MEETING_SECONDS)
        return gather.run(config, work)

    graph = pair(*(meeting_the_other(FakeConfig(steps=steps)) for steps in (1, 2)))
    assert outcomes(world.run(graph=graph, at_once=2)) == {"one": "built", "other": "built"}
    # One after the other they would wait in vain.
    meeting.abort()
    alone = world.run(graph=graph, at_once=1, selection=Selection(start=("one", "other")))
    assert outcomes(alone) == {"one": "failed", "other": "failed"}


def test_one_at_a_time_is_the_main_threads_work(world: World) -> None:
    seen: list[threading.Thread] = []

    @stage(revision=1)
    def looking(config: FakeConfig, work: Workspace) -> Corpus:
        seen.append(threading.current_thread())
        return gather.run(config, work)

    world.run(graph=pair(looking(FakeConfig()), looking(FakeConfig(steps=2))), at_once=1)
    assert seen == [threading.main_thread()] * 2
    world.run(graph=pair(looking(FakeConfig(steps=4)), looking(FakeConfig(steps=5))), at_once=2)
    assert threading.main_thread() not in seen[2:]
    assert len(set(seen)) == 3


def test_a_node_waits_for_all_that_it_is_made_of(world: World, tmp_path: Path) -> None:
    diary = tmp_path / "diary"
    world.run(at_once=4, every={"diary": str(diary), "seconds": 0.1})
    lines = diary.read_text().split()
    assert lines[:2] == ["gather", "train"]
    assert sorted(lines[2:]) == ["judge", "pack.ascend", "pack.cuda"]


def test_no_more_nodes_than_were_asked_for_run_at_a_time(world: World) -> None:
    inside: list[str] = []
    most: list[int] = []

    @stage(revision=1)
    def counting(config: FakeConfig, work: Workspace) -> Corpus:
        inside.append(work.out)
        most.append(len(inside))
        time.sleep(0.1)
        inside.remove(work.out)
        return gather.run(config, work)

    line = {f"n{steps}": counting(FakeConfig(steps=steps)) for steps in range(1, 7)}
    world.run(graph=make_graph(line, Hashes()), at_once=3)
    assert max(most) == 3


def test_a_failure_blocks_its_own_alone_while_others_run(world: World) -> None:
    begun = threading.Event()

    @stage(revision=1)
    def failing(config: FakeConfig, work: Workspace) -> Corpus:
        assert begun.wait(MEETING_SECONDS)
        raise ZeroDivisionError("by zero")

    @stage(revision=1)
    def lasting(config: FakeConfig, work: Workspace) -> Corpus:
        begun.set()
        time.sleep(0.5)
        return gather.run(config, work)

    @stage(revision=1)
    def copying(config: FakeConfig, work: Workspace, *, corpus: Corpus) -> Corpus:
        return gather.run(config, work)

    bad, good = failing(FakeConfig()), lasting(FakeConfig())
    line = {
        "bad": bad,
        "good": good,
        "after bad": copying(FakeConfig(), corpus=bad),
        "after good": copying(FakeConfig(), corpus=good),
    }
    graph = make_graph({name.replace(" ", "."): one for name, one in line.items()}, Hashes())
    run = world.run(graph=graph, at_once=2)
    assert outcomes(run) == {
        "bad": "failed",
        "good": "built",
        "after.bad": "blocked",
        "after.good": "built",
    }
    assert failed(run, "bad").error.startswith("ZeroDivisionError: by zero")


def test_the_record_is_saved_after_every_node_in_the_order_of_the_line(world: World) -> None:
    heard = Heard()
    seen: list[list[str]] = []

    @stage(revision=1)
    def patient(config: FakeConfig, work: Workspace) -> Corpus:
        deadline = time.monotonic() + MEETING_SECONDS
        while not heard.ended:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        # It is told first, and saved then.
        time.sleep(0.2)
        (record,) = world.store.records.newest_first()
        seen.append(list(record.outcomes))
        return gather.run(config, work)

    graph = pair(patient(FakeConfig(steps=1)), gather(FakeConfig(steps=2)))
    run = world.run(graph=graph, at_once=2, listeners=(heard,))
    assert seen == [["other"]]
    assert heard.ended == ["other", "one"]
    assert list(run.outcomes) == ["one", "other"]
    (record,) = world.store.records.newest_first()
    assert list(record.outcomes) == ["one", "other"]


def test_two_nodes_of_one_identity_are_built_once(world: World) -> None:
    builds: list[str] = []

    @stage(revision=1)
    def once(config: FakeConfig, work: Workspace) -> Corpus:
        builds.append(work.out)
        time.sleep(0.3)
        return gather.run(config, work)

    run = world.run(graph=pair(once(FakeConfig()), once(FakeConfig())), at_once=2)
    assert sorted(outcomes(run).values()) == ["built", "reused"]
    assert len(builds) == 1
    assert made(run, "one").content == made(run, "other").content


@pytest.mark.parametrize(
    ("cores", "expected"), [(1, 1), (2, 1), (7, 1), (8, 2), (12, 3), (16, 4), (256, 4)]
)
def test_a_run_takes_as_many_nodes_at_a_time_as_the_machine_bears(
    world: World, monkeypatch: pytest.MonkeyPatch, cores: int, expected: int
) -> None:
    asked: list[int] = []

    def record(hands: int) -> Crew[runner.Visited]:
        asked.append(hands)
        return hire(1)

    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(runner, "hire", record)
    world.run(at_once=None, selection=Selection(only=("data",)))
    world.run(at_once=5, selection=Selection(only=("data",)))
    assert asked == [expected, 5]


RUN = """
import sys, time
from configs.parallel import StoreConfig
from pipeline.graph import make_graph
from stages.artifacts import Corpus
from stages.contract import Workspace, stage
from tests.pipeline.fakes import FakeConfig, World, gather, outcomes

@stage(revision=1)
def slow(config: FakeConfig, work: Workspace) -> Corpus:
    work.beside("resume").mkdir()
    work.beside("resume", "step.json").write_text("1")
    deadline = time.monotonic() + config.seconds
    while time.monotonic() < deadline:
        time.sleep(0.05)
    return gather.run(config, work)

seconds = float(sys.argv[2])
world = World(StoreConfig(url=sys.argv[1], min_free_bytes=0))
line = {
    "first": gather(FakeConfig()),
    "one": slow(FakeConfig(steps=1, seconds=seconds)),
    "other": slow(FakeConfig(steps=2, seconds=seconds)),
    "last": slow(FakeConfig(steps=5, seconds=seconds)),
}
run = world.run(graph=make_graph(line, world.store.hashes), at_once=2)
print(run.interrupted, outcomes(run), flush=True)
"""


def test_ctrl_c_with_two_running_stops_both_and_the_next_run_goes_on(
    world: World, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", RUN, str(world.store.root)]
    process = subprocess.Popen([*command, "60"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with process:
        deadline = time.monotonic() + 30
        while len(list(world.store.root.glob("artifacts/slow/*/g1/*/resume/step.json"))) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=30)[0]
        assert time.monotonic() - sent < 10
    assert told == "True {'first': 'built', 'one': 'failed', 'other': 'failed'}\n"
    (record,) = world.store.records.newest_first()
    assert record.interrupted
    assert [failed(record, name).error for name in ("one", "other")] == ["interrupted"] * 2
    begun = list(world.store.root.glob("artifacts/slow/*/g1"))
    assert [newest(str(folder))[1]["ended"] for folder in begun] == [True, True]
    again = subprocess.run(
        [*command, "0"], cwd=ROOT, capture_output=True, text=True, check=True, timeout=60
    )
    expected = {"first": "reused", "one": "built", "other": "built", "last": "built"}
    assert again.stdout == f"False {expected}\n"


def test_a_stage_that_does_not_look_up_is_left_behind_and_the_run_is_interrupted(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "STOP_SECONDS", 0.5)
    both, released = threading.Barrier(2), threading.Event()

    @stage(revision=1)
    def deaf(config: FakeConfig, work: Workspace) -> Corpus:
        both.wait(MEETING_SECONDS)
        released.wait(30)
        return gather.run(config, work)

    @stage(revision=1)
    def stopping(config: FakeConfig, work: Workspace) -> Corpus:
        both.wait(MEETING_SECONDS)
        _thread.interrupt_main()
        while True:
            time.sleep(0.01)

    heard = Heard()
    graph = pair(deaf(FakeConfig()), stopping(FakeConfig()))
    run = world.run(graph=graph, at_once=2, listeners=(heard,))
    released.set()
    assert run.interrupted
    assert [failed(run, name).error for name in ("one", "other")] == ["interrupted"] * 2
    assert heard.notes == [
        "stopping one and other; Ctrl-C again does not wait for that",
        "one: does not stop by itself; ends with this process",
    ]


def test_an_interrupt_of_one_stage_stops_the_others(world: World) -> None:
    both = threading.Barrier(2)

    @stage(revision=1)
    def interrupted(config: FakeConfig, work: Workspace) -> Corpus:
        both.wait(MEETING_SECONDS)
        if config.steps == 1:
            raise KeyboardInterrupt
        while True:
            time.sleep(0.01)

    graph = pair(*(interrupted(FakeConfig(steps=steps)) for steps in (1, 2)))
    run = world.run(graph=graph, at_once=2)
    assert run.interrupted
    assert [failed(run, name).error for name in ("one", "other")] == ["interrupted"] * 2

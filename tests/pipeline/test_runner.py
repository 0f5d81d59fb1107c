"""What a run does when nodes fail, and what it records."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import pytest

from configs.parallel import ClusterConfig, StoreConfig
from pipeline import runner
from pipeline.graph import Selection, make_graph
from pipeline.lease import newest
from pipeline.records import Built, Failed, Run, new_run_id
from stages.artifacts import Checkpoint, Corpus, Report
from stages.contract import Workspace, stage
from stages.hashing import Hashes
from stages.manifest import read_manifest
from tests.conftest import Recorder
from tests.pipeline.fakes import FakeConfig, World, failed, gather, made, outcomes

ROOT = Path(__file__).parents[2]
HASHES = Hashes()


class Heard(Recorder):
    """A listener that keeps notes."""

    def begin(self, node: object, inputs: object) -> Recorder:
        """Every node's tracker is a new one."""
        return Recorder()

    def end(self, node: object, outcome: object, made: object) -> None:
        """Outcomes are in the record."""


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


def test_a_failure_blocks_what_follows_and_nothing_else(world: World) -> None:
    run = world.run(judge={"fails": True})
    assert outcomes(run) == {
        "data": "built",
        "train": "built",
        "judge": "failed",
        "pack.cuda": "built",
        "pack.ascend": "built",
    }
    judged = failed(run, "judge")
    assert judged == Failed("judge was told to fail", judged.seconds)
    assert 0 <= judged.seconds <= 5
    assert not run.succeeded
    blocked = world.run(train={"fails": True})
    assert outcomes(blocked)["judge"] == "blocked"


def test_a_report_that_falls_short_is_kept_and_the_run_has_not_succeeded(world: World) -> None:
    @stage(revision=1)
    def judging(config: FakeConfig, work: Workspace) -> Report:
        why = "too large" if config.steps > 3 else None
        return Report(uri=work.out, headline={"size": config.steps}, shortfall=why)

    def run(steps: int) -> Run:
        return world.run(graph=make_graph({"judge": judging(FakeConfig(steps=steps))}, HASHES))

    assert run(3).succeeded
    for outcome in ("built", "reused"):
        short = run(4)
        assert outcomes(short) == {"judge": outcome}
        assert made(short, "judge").shortfall == "too large"
        assert not short.succeeded
        assert world.store.records.load(short.id).outcomes == short.outcomes


def test_an_error_nobody_raised_on_purpose_leaves_its_traceback(world: World) -> None:
    @stage(revision=1)
    def broken(config: FakeConfig, work: Workspace) -> Corpus:
        raise ZeroDivisionError("by zero")

    run = world.run(graph=make_graph({"broken": broken(FakeConfig())}, HASHES))
    outcome = run.outcomes["broken"]
    assert isinstance(outcome, Failed)
    assert outcome.error.startswith("ZeroDivisionError: by zero")
    trace = world.store.records.folder / f"{run.id}.broken.txt"
    assert "raise ZeroDivisionError" in trace.read_text()


def test_a_disk_too_full_for_the_traceback_fails_the_node_and_not_the_run(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    @stage(revision=1)
    def broken(config: FakeConfig, work: Workspace) -> Corpus:
        raise ZeroDivisionError("by zero")

    real = Path.write_text

    def full(path: Path, text: str) -> int:
        if path.name.endswith(".broken.txt"):
            raise OSError(28, "No space left on device")
        return real(path, text)

    monkeypatch.setattr(Path, "write_text", full)
    line = {"broken": broken(FakeConfig()), "data": gather(FakeConfig())}
    run = world.run(graph=make_graph(line, HASHES))
    assert outcomes(run) == {"broken": "failed", "data": "built"}
    error = failed(run, "broken").error
    assert error.startswith("ZeroDivisionError: by zero (no traceback in ")
    assert error.endswith("No space left on device)")


def test_a_record_that_cannot_be_kept_up_is_told_once_and_the_run_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.replace, []

    def full(source: Path, target: Path) -> None:
        if Path(target).parent == world.store.records.folder:
            calls.append(target)
            if len(calls) > 1:
                raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert world.run().succeeded
    (warning,) = world.said
    assert "cannot be written (No space left on device); free some disk" in warning


def test_a_record_that_cannot_be_read_is_left_out_and_told_once(world: World) -> None:
    run = world.run()
    folder = world.store.records.folder
    (folder / "99999999-000000.json").write_text("{")
    assert [one.id for one in world.store.records.newest_first()] == [run.id]
    assert outcomes(world.run())["train"] == "reused"
    (warning,) = world.said
    assert f"{folder}/99999999-000000.json: not a readable run record" in warning
    assert "delete it or move it away" in warning


def test_an_artifact_elsewhere_than_in_the_slot_is_refused(world: World) -> None:
    @stage(revision=1)
    def astray(config: FakeConfig, work: Workspace) -> Corpus:
        made = gather.run(config, work)
        assert isinstance(made, Corpus)
        return made.model_copy(update={"uri": "/elsewhere"})

    run = world.run(graph=make_graph({"astray": astray(FakeConfig())}, HASHES))
    assert outcomes(run) == {"astray": "failed"}


def test_what_a_stage_reads_must_not_change_between_plan_and_commit(
    world: World, tmp_path: Path
) -> None:
    text = tmp_path / "text"
    text.write_text("as planned")

    @stage(revision=1, reads=lambda config, hashes: {"text": text.read_text()})
    def reading(config: FakeConfig, work: Workspace) -> Corpus:
        text.write_text("as changed meanwhile")
        return gather.run(config, work)

    graph = make_graph({"reading": reading(FakeConfig())}, HASHES)
    run = world.run(graph=graph)
    outcome = run.outcomes["reading"]
    assert isinstance(outcome, Failed)
    assert "changed after it was planned (" in outcome.error
    assert world.store.find(next(iter(graph))) is None


def test_a_manifest_records_inputs_by_content_and_where_it_was_made(world: World) -> None:
    run = world.run()
    data, train = run.outcomes["data"], run.outcomes["train"]
    assert isinstance(data, Built)
    assert isinstance(train, Built)
    generation = world.generation(run, "train")
    manifest = read_manifest(str(generation))
    assert manifest.inputs["corpus"].content == data.content
    assert manifest.provenance["run"] == run.id
    assert manifest.provenance["cluster"] == ClusterConfig(parallel_nodes=1).model_dump()
    assert {"ingot", "python", "source", "seconds"} <= manifest.provenance.keys()
    assert isinstance(Checkpoint.load(str(generation)), Checkpoint)
    assert train.figures == {"loss": pytest.approx(1 / 3)}


def test_the_digest_of_a_source_is_that_of_what_ran(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is edited while the stage runs."""
    text = ["loaded"]
    monkeypatch.setattr(runner, "source_digest", lambda stage: text[0])

    @stage(revision=1)
    def edited(config: FakeConfig, work: Workspace) -> Corpus:
        text[0] = "edited"
        return gather.run(config, work)

    edited_too = stage(revision=2)(edited.run)
    line = {"one": edited(FakeConfig()), "two": edited_too(FakeConfig())}
    run = world.run(graph=make_graph(line, HASHES))
    for node in line:
        manifest = read_manifest(str(world.generation(run, node)))
        assert manifest.provenance["source"] == "loaded"


def test_the_record_on_disk_is_the_run(world: World) -> None:
    run = world.run(judge={"fails": True})
    assert world.store.records.load(run.id) == run
    latest = world.store.records.latest_artifacts()
    assert ("fake", "judge") not in latest
    assert latest["fake", "train"] == world.generation(run, "train")


def test_the_record_says_from_the_beginning_what_was_made_so_far(world: World) -> None:
    """A run that is killed has been recorded up to there."""
    seen: list[dict[str, str]] = []

    @stage(revision=1)
    def looking(config: FakeConfig, work: Workspace) -> Corpus:
        (record,) = world.store.records.newest_first()
        seen.append(outcomes(record))
        return gather.run(config, work)

    line = {"one": looking(FakeConfig()), "two": looking(FakeConfig(steps=4))}
    world.run(graph=make_graph(line, HASHES))
    assert seen == [{}, {"one": "built"}]


def test_the_seconds_of_a_node_are_those_it_took(world: World) -> None:
    for outcome, least in (("built", 0.3), ("reused", 0.0)):
        started = time.monotonic()
        run = world.run(train={"seconds": 0.3})
        took = time.monotonic() - started
        assert run.outcomes["train"].outcome == outcome
        seconds = [one.seconds for one in run.outcomes.values()]  # type: ignore[union-attr]
        assert all(one >= 0 for one in seconds)
        assert least <= run.outcomes["train"].seconds  # type: ignore[union-attr]
        assert sum(seconds) <= took
        manifest = read_manifest(str(world.generation(run, "train")))
        assert manifest.provenance["seconds"] >= 0.3
    (world.files(run, "train") / "weights.bin").unlink()
    failed = world.run(train={"seconds": 0.3}).outcomes["train"]
    assert isinstance(failed, Failed)
    assert 0 <= failed.seconds < took + 60


def test_waiting_for_another_builder_is_not_part_of_what_building_took(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = world.store.slot

    @contextmanager
    def late(*args: Any, **settings: Any) -> Iterator[object]:
        time.sleep(1)
        with real(*args, **settings) as slot:
            yield slot

    monkeypatch.setattr(world.store, "slot", late)
    run = world.run(graph=make_graph({"data": gather(FakeConfig())}, HASHES))
    manifest = read_manifest(str(world.generation(run, "data")))
    assert manifest.provenance["seconds"] < 1
    assert run.outcomes["data"].seconds < 1  # type: ignore[union-attr]


def test_what_a_forced_node_makes_stale_is_left_and_told(world: World) -> None:
    heard = Heard()
    world.run(train={"differs": True})
    forced = Selection(force=("train",))
    world.run(selection=forced, listeners=(heard,), train={"differs": True})
    rest = ("judge", "pack.cuda", "pack.ascend")
    left = [f"{name}: left as it is (input checkpoint rebuilt); a plain run" for name in rest]
    assert [note.removesuffix(" rebuilds it") for note in heard.notes] == left
    # What --only leaves aside was not asked for, and nothing is told of it.
    quiet = Heard()
    world.run(selection=Selection(only=("data",)), listeners=(quiet,), train={"steps": 9})
    assert quiet.notes == []


def test_an_artifact_of_another_kind_is_refused(world: World) -> None:
    @stage(revision=1)
    def mistaken(config: FakeConfig, work: Workspace) -> Corpus:
        work.path("report.json").write_text("{}")
        return cast(Corpus, Report(uri=work.out, headline={}))

    run = world.run(graph=make_graph({"one": mistaken(FakeConfig())}, HASHES))
    failed = run.outcomes["one"]
    assert isinstance(failed, Failed)
    assert "not a Corpus at" in failed.error


RUN = """
import sys
from configs.parallel import StoreConfig
from tests.pipeline.fakes import World, outcomes
world = World(StoreConfig(url=sys.argv[1], min_free_bytes=0))
print("started", flush=True)
run = world.run(train={"seconds": 30})
print(run.interrupted, outcomes(run), flush=True)
"""


def test_ctrl_c_stops_the_run_keeps_what_is_committed_and_the_next_goes_on(
    world: World, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", RUN, str(world.store.root)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    with process:
        folder = world.store.folder(world.graph()["train"])
        deadline = time.monotonic() + 30
        while not list(folder.glob("g1/*/resume/step.json")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=30)[0]
    assert "True {'data': 'built', 'train': 'failed'}" in told
    (record,) = world.store.records.newest_first()
    assert record.interrupted
    assert newest(str(folder / "g1"))[1]["ended"]
    after = world.run()
    assert after.outcomes["train"].outcome == "built"
    assert after.outcomes["data"].outcome == "reused"
    assert not (folder / "g2").exists()


LOADED = """
import sys
from configs.parallel import StoreConfig
from pipeline.decide import decide
from pipeline.graph import Selection
from pipeline.states import Examiner
from tests.pipeline.fakes import RECIPE, World, outcomes
world = World(StoreConfig(url=sys.argv[1], min_free_bytes=0))
for told in ("built", "reused"):
    decide(world.graph(), Selection(), Examiner(world.store, RECIPE))
    assert set(outcomes(world.run()).values()) == {told}
print(sorted({"torch", "ray", "mlflow"} & sys.modules.keys()))
"""


def test_planning_and_running_load_neither_torch_nor_ray_nor_mlflow(tmp_path: Path) -> None:
    """Of stages that need none of them, built and reused."""
    told = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path / "store")],
        cwd=ROOT,
        capture_output=True,
        check=True,
        text=True,
    )
    assert told.stdout == "[]\n"


def test_ids_sort_by_time_even_within_a_second() -> None:
    ids = []
    for _ in range(50):
        ids.append(new_run_id())
        time.sleep(0.0001)
    assert ids == sorted(ids)
    assert len(set(ids)) == 50

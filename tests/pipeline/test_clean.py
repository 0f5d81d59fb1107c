"""What `clean` offers, and that it takes nothing from a run or a build that goes on."""

import argparse
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import StoreError
from configs.parallel import StoreConfig
from pipeline import cli
from pipeline.decide import in_use
from pipeline.graph import make_graph
from pipeline.lease import give_up, newest, take, this_process
from pipeline.records import Run
from pipeline.removal import remove
from pipeline.slots import Slot
from pipeline.store import Committed, Store
from pipeline.verbs import asked
from pipeline.verbs import clean as clean_module
from pipeline.verbs.clean import Entry, clean, inventory
from stages.artifacts import Corpus, Report
from stages.contract import Planned, Workspace, stage
from stages.manifest import verify
from tests.pipeline.fakes import FakeConfig, World, gather, outcomes


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


@pytest.fixture
def old(world: World) -> Run:
    """A run whose `train` and what follows a later run has replaced."""
    first = world.run(train={"steps": 2})
    world.run(train={"steps": 3})
    return first


def listed(world: World) -> dict[Path, Entry]:
    return {entry.path: entry for entry in inventory(world.store, unfinished=True)}


def run_clean(
    world: World, monkeypatch: pytest.MonkeyPatch, *, dry_run: bool = False, code: int = 0
) -> None:
    """`ingot clean` of this store."""

    class Asked:
        def store(self, say: object) -> object:
            return world.store

    args = argparse.Namespace(unfinished=False, dry_run=dry_run)
    monkeypatch.setattr(clean_module, "load_asked", lambda args: Asked())
    assert clean(args) == code


def found(world: World, node: str, **changes: object) -> Committed:
    committed = world.store.find(world.graph(**changes)[node])
    assert committed is not None
    return committed


def test_what_was_superseded_is_offered(world: World, old: Run) -> None:
    verdicts = {path.parts[-3]: entry.verdict for path, entry in listed(world).items()}
    assert listed(world)[world.generation(old, "train")].verdict == "remove"
    assert verdicts["gather"] == "keep"


def test_the_inputs_of_a_build_that_goes_on_are_kept(world: World, old: Run) -> None:
    checkpoint = found(world, "train", train={"steps": 2})
    node = world.graph(train={"steps": 2}, pack={"target": "cuda", "steps": 99})["pack.cuda"]
    with world.store.slot(node, {"checkpoint": checkpoint}) as slot:
        assert isinstance(slot, Slot)
        entries = listed(world)
        used = entries[world.generation(old, "train")]
        assert (used.verdict, used.reason) == (
            "keep",
            f"in use by process {os.getpid()}, which builds {slot.path.parent}",
        )
        assert entries[slot.path.parent].reason == "being built"
        with pytest.raises(StoreError, match="is building it; wait for it, or end it"):
            remove(slot.path.parent)
        assert newest(str(slot.path.parent))[1]["inputs"] == [checkpoint.address]
    # The build has ended, and nobody uses them any more.
    assert listed(world)[world.generation(old, "train")].verdict == "remove"


def test_what_a_live_run_began_with_is_kept_until_it_is_finished(world: World, old: Run) -> None:
    judged = world.judged(train={"steps": 2})
    run = replace(world.begin(), in_use=in_use(judged))
    world.store.records.save(run)
    for node in ("train", "judge", "pack.cuda"):
        entry = listed(world)[world.generation(old, node)]
        assert entry.verdict == "keep"
        assert entry.reason.startswith(f"in use by run {run.id}, process {os.getpid()} on ")
    world.store.records.save(replace(run, finished=True))
    assert listed(world)[world.generation(old, "train")].verdict == "remove"


def test_what_a_live_run_made_is_kept_though_another_run_has_replaced_it(world: World) -> None:
    slow = world.run(train={"steps": 2})
    world.store.records.save(replace(slow, finished=False))
    world.run(train={"steps": 3})
    for node in ("train", "judge", "pack.cuda"):
        entry = listed(world)[world.generation(slow, node)]
        assert (entry.verdict, entry.reason[:6]) == ("keep", "in use")
    world.store.records.save(slow)
    assert listed(world)[world.generation(slow, "train")].verdict == "remove"


def test_a_run_says_in_its_record_what_it_may_reuse_and_when_it_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    (tmp_path / "over.toml").write_text('[tracking]\nuri = "http://127.0.0.1:9"\n')
    world = World(StoreConfig(url=str(tmp_path / ".ingot"), min_free_bytes=0))
    seen: list[Run] = []

    @stage(revision=1)
    def looking(config: FakeConfig, work: Workspace, *, corpus: Corpus) -> Report:
        seen.append(next(world.store.records.newest_first()))
        return Report(uri=work.out, headline={})

    def line(recipe: object) -> dict[str, Planned[Corpus] | Planned[Report]]:
        corpus = gather(FakeConfig())
        return {"data": corpus, "look": looking(FakeConfig(steps=len(seen)), corpus=corpus)}

    monkeypatch.setattr(asked, "production", line)
    for _ in range(2):
        assert cli.main(["run", "smoke", "@over.toml"]) == 0
    first, second = seen
    assert first.in_use == ()
    data = world.store.find(make_graph(line(None), world.store.hashes)["data"])
    assert data is not None
    assert second.in_use == (data.address,)
    assert second.live
    assert second.process == this_process()
    last = world.store.records.load(second.id)
    assert last.finished
    assert not last.live


def test_a_run_whose_process_is_gone_pins_nothing(world: World, old: Run) -> None:
    judged = world.judged(train={"steps": 2})
    run = world.begin()
    gone = {**run.process, "started": float(run.process["started"]) - 1000}
    world.store.records.save(replace(run, in_use=in_use(judged), process=gone))
    assert listed(world)[world.generation(old, "train")].verdict == "remove"
    # Of another machine one cannot know, and keeps.
    away = {**gone, "host": "elsewhere/1"}
    world.store.records.save(replace(run, in_use=in_use(judged), process=away))
    assert listed(world)[world.generation(old, "train")].verdict == "keep"


def test_a_running_build_finishes_though_its_input_was_superseded_and_cleaned_away(
    world: World, old: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build reads an old checkpoint; `clean` runs meanwhile, and deletes what else is old."""
    begun, ended = threading.Event(), list[Run]()
    read = Path(found(world, "train", train={"steps": 2}).artifact.uri) / "weights.bin"
    trained, judging = {"steps": 2}, {"steps": 77, "seconds": 1.5}

    def work() -> None:
        begun.set()
        ended.append(World(world.store.config).run(train=trained, judge=judging))

    thread = threading.Thread(target=work)
    thread.start()
    begun.wait(10)
    graph = world.graph(train=trained, judge=judging)
    judged = world.store.folder(graph["judge"]) / "g1"
    while not judged.is_dir():
        pass
    run_clean(world, monkeypatch)
    assert read.exists()
    thread.join(30)
    assert outcomes(ended[0])["judge"] == "built"
    verify(str(judged))


def test_what_a_late_builder_left_in_a_committed_generation_goes_and_no_committed_byte(
    world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.run()
    generation = world.generation(run, "train")
    late = generation / "000009-abcdef12" / "files"
    late.mkdir(parents=True)
    (late / "weights.bin").write_text("late")
    entry = listed(world)[late.parent]
    assert (entry.verdict, entry.num_bytes) == ("remove", 4)
    run_clean(world, monkeypatch, dry_run=True)
    assert "4  bytes in 1 folders would be freed" in capsys.readouterr().out
    assert late.exists()
    run_clean(world, monkeypatch)
    assert not late.parent.exists()
    verify(str(generation))
    told = capsys.readouterr().out
    assert "run records stay, and so do MLflow's runs with their plots and reports" in told


@pytest.mark.parametrize("ends", [False, True])
def test_a_run_between_the_look_and_the_removal_loses_nothing(
    world: World, old: Run, monkeypatch: pytest.MonkeyPatch, ends: bool
) -> None:
    """It has begun, or has even ended; then the latest is what it took."""
    looks: list[list[Entry]] = []

    def look(store: Store, *, unfinished: bool) -> list[Entry]:
        entries = list(inventory(store, unfinished=unfinished))
        if not looks:
            if ends:
                assert outcomes(world.run(train={"steps": 2}))["train"] == "reused"
            else:
                judged = world.judged(train={"steps": 2})
                world.store.records.save(replace(world.begin(), in_use=in_use(judged)))
        looks.append(entries)
        return entries

    monkeypatch.setattr(clean_module, "inventory", look)
    run_clean(world, monkeypatch)
    for node in ("train", "judge", "pack.cuda"):
        verify(str(world.generation(old, node)))


@pytest.mark.parametrize("ends", [False, True])
def test_a_run_that_begins_while_others_are_deleted_loses_nothing(
    world: World,
    old: Run,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ends: bool,
) -> None:
    """It begins after both looks, as minutes of deleting have passed; it may even have ended."""
    runs: list[Run] = []

    def begin(path: Path, used_by: Callable[[], str | None]) -> None:
        if not runs:
            judged = world.judged(train={"steps": 2})
            runs.append(replace(world.begin(), in_use=in_use(judged), finished=ends))
            world.store.records.save(runs[0])
        remove(path, used_by)

    monkeypatch.setattr(clean_module, "remove", begin)
    run_clean(world, monkeypatch, code=1)
    told = capsys.readouterr().out
    for node in ("train", "judge", "pack.cuda"):
        generation = world.generation(old, node)
        verify(str(generation))
        assert f"warning: {generation}: in use by run {runs[0].id}" in told
    assert "0  bytes in 0 folders freed" in told


def test_an_input_that_a_build_begins_to_read_while_others_are_deleted_stays(
    world: World, old: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = found(world, "train", train={"steps": 2})
    node = world.graph(train={"steps": 2}, pack={"target": "cuda", "steps": 99})["pack.cuda"]
    with ExitStack() as stack:

        def begin(path: Path, used_by: Callable[[], str | None]) -> None:
            if path == checkpoint.path:
                stack.enter_context(world.store.slot(node, {"checkpoint": checkpoint}))
            remove(path, used_by)

        monkeypatch.setattr(clean_module, "remove", begin)
        run_clean(world, monkeypatch, code=1)
    checkpoint.check(hashes=True)


def test_what_a_clean_that_was_cut_short_left_is_offered_unless_it_goes_on(
    world: World, old: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    generation = world.generation(old, "train")
    left = generation.with_name(".g1-0123abcd.removed")
    generation.rename(left)
    lease = take(str(left), 1, "the one that deletes")
    assert lease is not None
    assert left not in listed(world)
    give_up(lease)
    entry = listed(world)[left]
    assert (entry.verdict, entry.reason) == ("remove", "left by a clean that was cut short")
    run_clean(world, monkeypatch)
    assert not left.exists()


def test_files_that_vanish_while_they_are_counted_have_no_size(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kept").write_text("1234")
    (tmp_path / "vanishes").touch()
    real = os.walk

    def walk(folder: Path) -> Iterator[object]:
        found = list(real(folder))
        (tmp_path / "vanishes").unlink()
        yield from found

    monkeypatch.setattr(os, "walk", walk)
    assert clean_module._size(world.store, tmp_path) == 4
    assert clean_module._committed(world.store, tmp_path / "gone") == 0

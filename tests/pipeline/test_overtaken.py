"""A build that another builder overtakes ends with what the other made, or says that it stopped."""

from collections.abc import Callable
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from configs.errors import StoreError, TrainingError
from configs.parallel import StoreConfig, TrackingConfig
from pipeline.graph import Graph, Selection, make_graph
from pipeline.lease import take
from pipeline.places import tracking_uri
from pipeline.records import Built, Failed, Reused
from pipeline.slots import Slot
from pipeline.store import Committed
from stages.artifacts import Corpus, Report
from stages.contract import Workspace, stage
from stages.manifest import verify
from tests.conftest import Recorder
from tests.pipeline.fakes import FakeConfig, World, fill, outcomes
from tests.pipeline.test_tracking import tracked

# MLflow's own use of SQLAlchemy and of protobuf is behind their deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


class Heard(Recorder):
    """A listener that keeps notes."""

    def begin(self, node: object, inputs: object) -> Recorder:
        """Every node's tracker is this one."""
        return self

    def end(self, node: object, outcome: object, made: object) -> None:
        """Outcomes are in the record."""


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


def overtaken(world: World, then: Callable[[Workspace], object], *, commits: bool = True) -> Graph:
    """A line whose first stage loses its lease to another builder, and then does this.

    The other builder is quicker and commits, or has only begun.
    """

    @stage(revision=1)
    def slow(config: FakeConfig, work: Workspace) -> Corpus:
        work.path("text.txt").write_text("the slow one's")
        generation = Path(work.lease.generation)
        lease = take(str(generation), work.lease.number + 1, "another")
        assert lease is not None
        if commits:
            slot = Slot(generation / "000002-another", lease, 1, ())
            slot.files.mkdir(parents=True)
            slot.draft.touch()
            world.store.commit(slot, graph["data"], fill(slot, "the quick one's"), {}, {})
        then(work)
        return fill(Slot(Path(work.out).parent, work.lease, 1, ()), "the slow one's")

    @stage(revision=1)
    def reading(config: FakeConfig, work: Workspace, *, corpus: Corpus) -> Report:
        text = corpus.path("text.txt").read_text()
        work.path("report.json").write_text('{"headline": {}}')
        return Report(uri=work.out, headline={text: 1.0})

    corpus = slow(FakeConfig())
    line = {"data": corpus, "report": reading(FakeConfig(), corpus=corpus)}
    graph = make_graph(line, world.store.hashes)
    return graph


def go_on_blindly(work: Workspace) -> None:
    """Write as if nothing had happened, and leave it to the commit to find out."""
    work.path().mkdir(parents=True, exist_ok=True)


def check(work: Workspace) -> None:
    """Find out."""
    work.lease.check()


def stumble(work: Workspace) -> None:
    """Fail because the folder is gone."""
    work.path("text.txt").read_text()


@pytest.mark.parametrize("then", [go_on_blindly, check, stumble])
def test_a_builder_that_was_overtaken_takes_what_the_quicker_one_made(
    world: World, then: Callable[[Workspace], object]
) -> None:
    heard, graph = Heard(), overtaken(world, then)
    run = world.run(graph=graph, listeners=(heard,))
    assert outcomes(run) == {"data": "reused", "report": "built"}
    assert run.succeeded
    found = world.store.find(graph["data"])
    assert isinstance(found, Committed)
    assert isinstance(run.outcomes["data"], Reused)
    assert run.outcomes["data"].content == found.manifest.content
    assert found.manifest.address == "000002-another/files"
    verify(str(found.path))
    # What follows is made of the other's artifact.
    report = run.outcomes["report"]
    assert isinstance(report, Built)
    assert report.figures == {"the quick one's": 1.0}
    assert "data: another builder took over and was quicker; taking its own" in heard.notes


def fail(work: Workspace) -> None:
    """Fail in some other way, as workers do that were told to stop."""
    raise TrainingError("workers failed")


@pytest.mark.parametrize("then", [check, fail, lambda work: None])
def test_a_builder_that_was_overtaken_stops_while_the_other_has_nothing_yet(
    world: World, then: Callable[[Workspace], object]
) -> None:
    graph = overtaken(world, then, commits=False)
    run = world.run(graph=graph)
    assert outcomes(run) == {"data": "failed", "report": "blocked"}
    failed = run.outcomes["data"]
    assert isinstance(failed, Failed)
    assert "lost to lease-000002.json; this build stops writing" in failed.error
    assert failed.error.endswith("takes what the other builder makes")
    assert world.store.find(graph["data"]) is None


def test_a_fault_of_its_own_is_not_taken_for_a_lost_lease(world: World) -> None:
    @stage(revision=1)
    def broken(config: FakeConfig, work: Workspace) -> Corpus:
        raise TrainingError("not finite")

    run = world.run(graph=make_graph({"data": broken(FakeConfig())}, world.store.hashes))
    failed = run.outcomes["data"]
    assert isinstance(failed, Failed)
    assert failed.error == "not finite"


def test_a_rebuild_that_was_overtaken_does_not_take_what_it_was_to_replace(world: World) -> None:
    """An older generation is there, and is not what the other builder makes."""
    graph = overtaken(world, check, commits=False)
    node = graph["data"]
    with world.store.slot(node, {}) as slot:
        assert isinstance(slot, Slot)
        old = world.store.commit(slot, node, fill(slot, "old"), {}, {})
    old.artifact.path("text.txt").write_text("damaged")
    with pytest.raises(StoreError):
        old.check(hashes=True)
    run = world.run(graph=graph, selection=Selection(force=("data",)))
    assert outcomes(run)["data"] == "failed"


def test_what_was_begun_and_then_taken_from_another_is_not_left_running_in_mlflow(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    graph = overtaken(world, check)
    monkeypatch.setattr(world, "graph", lambda **changes: graph)
    config = TrackingConfig(timeout_seconds=30)
    run, _ = tracked(world, config)
    assert outcomes(run) == {"data": "reused", "report": "built"}
    client = MlflowClient(tracking_uri(config, world.store.root))
    experiment = client.get_run(str(run.tracking_id)).info.experiment_id
    seen = [(one.info.run_name, one.info.status) for one in client.search_runs([experiment])]
    nodes = sorted(one for one in seen if one[0] in run.outcomes)
    assert nodes == [("data", "FINISHED"), ("data", "KILLED"), ("report", "FINISHED")]

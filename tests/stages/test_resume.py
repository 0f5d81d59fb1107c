"""A training that several builders began, one after the other, is the one that nobody disturbed."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from cluster.checkpoint import mark_complete
from cluster.trainer import Trainer
from configs.parallel import StoreConfig
from configs.train import PretrainConfig, PretrainSpec
from pipeline.graph import Graph, make_graph
from pipeline.records import Failed
from pipeline.store import Committed
from stages.artifacts import Corpus
from stages.contract import Workspace, stage
from stages.manifest import MANIFEST
from stages.pretrain import face, loop
from stages.steps import METRICS, read_metrics
from stages.telemetry import MetricsFile, begin_metrics
from tests.conftest import Recorder
from tests.pipeline.fakes import FakeConfig, World, outcomes
from tests.references import TINY
from tests.stages.training import one_rank, packed_rows, write_corpus

STEPS = 8
SPEC = PretrainSpec(
    seed=0,
    model=TINY,
    pretrain=PretrainConfig(
        steps=STEPS,
        batch_sequences=4,
        warmup_steps=1,
        checkpoint_every_steps=2,
        evaluate_every_steps=3,
        precision="high",
    ),
)


@stage(revision=1)
def rows(config: FakeConfig, work: Workspace) -> Corpus:
    """A corpus of random rows."""
    held_out = {"prose": packed_rows(5, seed=1), "sums": packed_rows(2, seed=2)}
    return write_corpus(work.path(), held_out)


@pytest.fixture(autouse=True)
def _one_rank(tmp_path: Path) -> Iterator[None]:
    with one_rank(tmp_path):
        yield


class Notes(Recorder):
    """A listener that keeps what it is told of the training."""

    def begin(self, node: Any, inputs: Any) -> Recorder:
        """Hear of the training alone."""
        return self if node.name == "pretrain" else Recorder()

    def end(self, node: Any, outcome: Any, made: Any) -> None:
        """Outcomes are in the record."""


def graph(world: World) -> Graph:
    corpus = rows(FakeConfig())
    line = {"data": corpus, "pretrain": face.pretrain(SPEC, corpus=corpus)}
    return make_graph(line, world.store.hashes)


@contextmanager
def cut_at(step: int) -> Iterator[None]:
    """The builder dies as it has recorded this step."""
    real = MetricsFile.append

    def append(log: MetricsFile, metrics: Any, *, step: int) -> None:
        real(log, metrics, step=step)
        if step == last:
            raise RuntimeError("cut")

    last = step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MetricsFile, "append", append)
        yield


def begun(world: World, step: int) -> Path:
    """Build until this step; the builder's folder."""
    with cut_at(step):
        run = world.run(graph=graph(world))
    assert isinstance(run.outcomes["pretrain"], Failed)
    (*_, newest) = sorted(world.store.folder(graph(world)["pretrain"]).glob("g1/0*"))
    return newest


def finished(world: World, heard: Notes) -> Committed:
    """Build to the end."""
    assert outcomes(world.run(graph=graph(world), listeners=(heard,)))["pretrain"] == "built"
    made = world.store.find(graph(world)["pretrain"])
    assert made is not None
    return made


def saved_steps(builder: Path) -> list[int]:
    return sorted(int(path.name[-8:]) for path in builder.glob("resume/saves/step-*"))


def steps_of(made: Committed) -> list[dict[str, Any]]:
    """The step log without what is measured or said of the machine."""
    log = read_metrics(made.artifact.beside(METRICS))
    own = {"tokens_per_second", "mfu", "tags"}
    return [{name: value for name, value in line.items() if name not in own} for line in log]


def test_what_four_builders_made_in_turn_is_what_one_makes(tmp_path: Path) -> None:
    calm_world, world = (
        World(StoreConfig(url=str(tmp_path / name), min_free_bytes=0)) for name in ("calm", "store")
    )
    calm = finished(calm_world, Notes())

    first = begun(world, 5)
    assert saved_steps(first) == [2, 4]
    # The second goes on from the first's save, and dies before it has one of its own.
    second = begun(world, 5)
    assert saved_steps(first) == [2, 4]
    assert saved_steps(second) == []
    assert [line["step"] for line in read_metrics(second / METRICS)] == [0, 1, 2, 3, 4, 5]
    # The third has one, and with it the first's are of no use.
    third = begun(world, 7)
    assert saved_steps(first) == []
    assert saved_steps(third) == [6]
    assert not second.exists()

    heard = Notes()
    made = finished(world, heard)
    assert f"pretrain: continues the interrupted build in {third}" in heard.notes
    assert [step for step, _ in heard.logged] == list(range(STEPS + 1))
    assert steps_of(made) == steps_of(calm)
    measured = [line["step"] for line in steps_of(made) if "held_out_loss" in line]
    assert measured == [0, 3, 6, 8]
    assert made.manifest.content == calm.manifest.content
    assert made.artifact.path("history.json").read_bytes() == (
        calm.artifact.path("history.json").read_bytes()
    )
    # A checkpoint goes with the tokenizer of its corpus, which here is an empty one.
    assert made.artifact.path("tokenizer.json").read_text() == "{}"
    builder = Path(made.artifact.uri).parent
    assert {path.name for path in made.path.iterdir()} == {MANIFEST, builder.name}
    assert {path.name for path in builder.iterdir()} == {"files", METRICS}
    assert builder.name.startswith("000004-")


def test_a_training_that_ended_before_its_commit_is_not_done_again(tmp_path: Path) -> None:
    world = World(StoreConfig(url=str(tmp_path / "store"), min_free_bytes=0))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "consolidate", lambda *_: 1 / 0)
        run = world.run(graph=graph(world))
    assert isinstance(run.outcomes["pretrain"], Failed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "train_step", lambda *_: pytest.fail("trained again"))
        made = finished(world, Notes())
    assert [line["step"] for line in steps_of(made)] == list(range(STEPS + 1))


def test_a_late_builder_that_saves_once_more_leaves_no_hole_in_what_is_told(
    tmp_path: Path,
) -> None:
    """It does so after the driver has chosen the save to begin with, and before a rank loads it."""
    world = World(StoreConfig(url=str(tmp_path / "store"), min_free_bytes=0))
    first = begun(world, 5)
    saves = first / "resume" / "saves"

    def save_late(*args: Any) -> Any:
        shutil.copytree(saves / "step-00000004", saves / "step-00000006")
        mark_complete(saves / "step-00000006", {"step": 6})
        return begin_metrics(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "begin_metrics", save_late)
        made = finished(world, Notes())
    assert [line["step"] for line in steps_of(made)] == list(range(STEPS + 1))
    history = json.loads(made.artifact.path("history.json").read_text())
    assert history["step"] == list(range(1, STEPS + 1))

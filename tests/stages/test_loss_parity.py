"""The loss-parity stage: what it reads, what it refuses, and that its report can fail."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from configs.base import Frozen
from configs.errors import ArtifactError, DataError
from configs.model import V3Config
from configs.parallel import StoreConfig
from configs.parity import ParityConfig, ParitySpec
from pipeline.graph import Selection, make_graph
from stages.artifacts import Checkpoint, Report
from stages.contract import Workspace, stage
from stages.loss_parity import face
from stages.loss_parity.loop import loss_parity
from stages.manifest import verify
from stages.steps import METRICS
from stages.telemetry import MetricsFile, write_history
from tests.conftest import Recorder, workspace_at
from tests.pipeline.fakes import World, outcomes

STEPS = 50
CURVE = [4.0 - 0.03 * step for step in range(STEPS)]
SPEC = ParitySpec(parity=ParityConfig(seeds=(0, 1)))

Logs = dict[str, list[dict[str, Any]]]


def log(factor: float = 1.0) -> list[dict[str, Any]]:
    """The steps of a training with losses this many times the plain curve's."""
    return [
        {"step": step, "loss": 9.0, "next_token_loss": factor * loss}
        for step, loss in enumerate(CURVE, 1)
    ]


class CurveConfig(Frozen):
    """The losses of a training."""

    losses: tuple[float, ...]


def curves() -> dict[str, list[float]]:
    return {
        name: [factor * loss for loss in CURVE]
        for name, factor in (("fp8_0", 1.001), ("high_0", 1.0), ("fp8_1", 0.999), ("high_1", 1.0))
    }


@stage(revision=1)
def curve(config: CurveConfig, work: Workspace) -> Checkpoint:
    """A training with these losses."""
    log = MetricsFile(work.beside())
    for step, loss in enumerate(config.losses, 1):
        log.append({"next_token_loss": loss}, step=step)
    write_history(work)
    return Checkpoint(uri=work.out, step=STEPS, sequences_seen=0, model=V3Config(), final_loss=None)


@pytest.fixture
def logs() -> Logs:
    """Two seeds in parity: gaps of 0.1 % and -0.05 %."""
    return {"fp8_0": log(1.001), "high_0": log(), "fp8_1": log(0.9995), "high_1": log()}


@pytest.fixture
def judge(tmp_path: Path, workspace: Workspace) -> Callable[..., Report]:
    """Run the stage on checkpoints with these steps in their histories, all of `steps` steps.

    Each training's step log holds other losses, which must bear on nothing. Texts in `histories`
    stand in place of a training's own history, and none in place of the file.
    """

    def run(
        logs: Mapping[str, list[dict[str, Any]]],
        steps: int = STEPS,
        histories: Mapping[str, str | None] | None = None,
    ) -> Report:
        runs = {}
        for name, lines in logs.items():
            trained = workspace_at(tmp_path / name, workspace.tracker)
            metrics = MetricsFile(trained.beside())
            for line in lines:
                metrics.append(line, step=line["step"])
            write_history(trained)
            if name in (given := histories or {}):
                trained.path("history.json").unlink()
                if (text := given[name]) is not None:
                    trained.path("history.json").write_text(text)
            for line in lines:
                metrics.append({**line, "next_token_loss": 1.0}, step=line["step"])
            runs[name] = Checkpoint(
                uri=trained.out, step=steps, sequences_seen=0, model=V3Config(), final_loss=None
            )
        made = loss_parity(SPEC, workspace, **runs)
        assert isinstance(made, Report)
        return made

    return run


def test_losses_in_parity_are_reported_as_that(
    judge: Callable[..., Report], logs: Logs, workspace: Workspace, recorder: Recorder
) -> None:
    report = judge(logs)
    assert report.shortfall is None
    assert report.headline["relative_gap"] == pytest.approx(0.00025)
    assert report.headline["largest_gap"] == pytest.approx(0.001)
    assert report.headline["relative_gap_of_seed_1"] == pytest.approx(-0.0005)
    assert report.headline["within_limit"] == 1
    record = json.loads(workspace.path("report.json").read_text())
    assert record["headline"] == report.headline
    assert record["seeds"]["0"]["losses"]["fp8"] == [
        line["next_token_loss"] for line in logs["fp8_0"]
    ]
    text = workspace.path("report.md").read_text()
    assert "| 1 | 2.66367 | 2.66500 | -0.050 % |" in text
    assert "Parity: each seed's gap" in text
    # Two seeds of such gaps leave an interval that is wider than the limit, and it says so.
    assert "The interval reaches beyond it" in text
    assert recorder.notes[0].startswith("Parity")


def test_a_curve_three_tenths_of_a_percent_higher_falls_short(
    judge: Callable[..., Report], logs: Logs, workspace: Workspace
) -> None:
    report = judge({**logs, "fp8_1": log(1.003)})
    assert report.headline["within_limit"] == 0
    assert report.shortfall is not None
    assert "seed 1 +0.300 %" in report.shortfall
    assert "seed 0" not in report.shortfall
    assert "parity.limit = 0.0025 asks each seed for less than 0.250 %" in report.shortfall
    assert "No parity: the gap of 1 of 2 seeds" in workspace.path("report.md").read_text()


def test_the_order_of_inputs_changes_no_byte(
    judge: Callable[..., Report], logs: Logs, workspace: Workspace, tmp_path: Path
) -> None:
    judge(logs)
    first = workspace.path("report.json").read_bytes()
    for name in logs:
        shutil.rmtree(tmp_path / name)
    judge(dict(reversed(logs.items())))
    assert workspace.path("report.json").read_bytes() == first


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("fp8_1", lambda lines: [], "holds 0 steps of the 50"),
        ("high_0", lambda lines: lines[:-1], "the first that is missing or too many is 50"),
        ("high_0", lambda lines: [*lines[:9], *lines[10:]], "missing or too many is 10"),
        ("fp8_0", lambda lines: [*lines, {**lines[-1], "step": 51}], "51 steps of the 50"),
        ("fp8_0", lambda lines: [lines[1], lines[0], *lines[2:]], "50 steps of the 50"),
        (
            "fp8_1",
            lambda lines: [*lines[:-1], {**lines[-1], "next_token_loss": float("nan")}],
            "next_token_loss = nan at step 50",
        ),
        ("fp8_1", lambda lines: [{"step": 1}, *lines[1:]], "next_token_loss = None at step 1"),
    ],
)
def test_a_log_that_cannot_be_compared_is_refused(
    judge: Callable[..., Report],
    logs: Logs,
    workspace: Workspace,
    name: str,
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
    message: str,
) -> None:
    with pytest.raises(DataError, match=rf"^{name}: .*history\.json") as caught:
        judge({**logs, name: change(logs[name])})
    assert message in str(caught.value)
    assert "rebuild this training with --force" in str(caught.value)
    assert not workspace.path("report.json").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read (FileNotFoundError"),
        ("{", "cannot be read (JSONDecodeError"),
        ("[]", "cannot be read (AttributeError"),
        ('{"step": 3}', "cannot be read (TypeError"),
        ("{}", "holds 0 steps of the 50"),
        (json.dumps({"step": list(range(1, 51)), "next_token_loss": CURVE[:-1]}), "at step 50"),
        (json.dumps({"step": list(range(1, 51)), "next_token_loss": ["1"] * 50}), "= 1 at step 1"),
    ],
)
def test_a_history_that_is_none_is_refused(
    judge: Callable[..., Report], logs: Logs, text: str | None, message: str
) -> None:
    with pytest.raises(DataError, match=r"^high_0: .*history\.json") as caught:
        judge(logs, histories={"high_0": text})
    assert message in str(caught.value)
    assert "rebuild this training with --force" in str(caught.value)


def test_the_losses_that_are_compared_are_those_that_manifests_cover(
    store_config: StoreConfig,
) -> None:
    """An edit of a step log changes no report; one of a history is damage, and found as that."""
    world = World(store_config)
    line = {name: curve(CurveConfig(losses=tuple(one))) for name, one in curves().items()}
    graph = make_graph(line | {"parity": face.loss_parity(SPEC, **line)}, world.store.hashes)

    def compared() -> bytes:
        run = world.run(graph=graph, selection=Selection(force=("parity",)))
        assert outcomes(run)["parity"] == "built"
        return (world.files(run, "parity") / "report.json").read_bytes()

    world.run(graph=graph)
    before = compared()
    made = world.store.find(graph["fp8_0"])
    assert made is not None
    made.artifact.beside(METRICS).write_text('{"step": 1, "next_token_loss": 1.0}\n')
    assert compared() == before
    history = made.artifact.path("history.json")
    history.write_text(history.read_text().replace("4.0", "4.1"))
    with pytest.raises(ArtifactError, match=r"history\.json has sha256"):
        verify(str(made.path))
    run = world.run(graph=graph)
    assert outcomes(run)["parity"] == "blocked"
    assert outcomes(run)["fp8_0"] == "failed"


def test_trainings_that_do_not_differ_at_all_are_no_comparison(
    judge: Callable[..., Report], logs: Logs, workspace: Workspace
) -> None:
    with pytest.raises(DataError, match="fp8_1 and high_1 have the same loss at every step"):
        judge({**logs, "fp8_1": logs["high_1"]})
    assert not workspace.path("report.json").exists()


def test_a_pair_that_is_not_whole_is_refused(judge: Callable[..., Report], logs: Logs) -> None:
    del logs["high_1"]
    with pytest.raises(DataError, match="wire one of each precision for each seed"):
        judge(logs)


def test_trainings_of_different_length_are_refused(tmp_path: Path, workspace: Workspace) -> None:
    lengths = {"fp8_0": 3, "high_0": 4, "fp8_1": 3, "high_1": 3}
    runs = {
        name: Checkpoint(
            uri=str(tmp_path), step=steps, sequences_seen=0, model=V3Config(), final_loss=None
        )
        for name, steps in lengths.items()
    }
    with pytest.raises(DataError, match="compare trainings of equal length"):
        loss_parity(SPEC, workspace, **runs)

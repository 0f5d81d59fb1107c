"""The loss-parity stage: what it reads, what it refuses, and that its report can fail."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from configs.errors import DataError
from configs.model import V3Config
from configs.parity import ParityConfig, ParitySpec
from stages.artifacts import Checkpoint, Report
from stages.contract import Workspace
from stages.loss_parity.loop import loss_parity
from stages.telemetry import MetricsFile, write_history
from tests.conftest import Recorder, workspace_at

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


@pytest.fixture
def logs() -> Logs:
    """Two seeds in parity: gaps of 0.1 % and -0.05 %."""
    return {"fp8_0": log(1.001), "high_0": log(), "fp8_1": log(0.9995), "high_1": log()}


@pytest.fixture
def judge(tmp_path: Path, workspace: Workspace) -> Callable[..., Report]:
    """Run the stage on checkpoints with these steps in their histories, all of `steps` steps.

    Each training's step log holds other losses, which must bear on nothing.
    """

    def run(logs: Mapping[str, list[dict[str, Any]]], steps: int = STEPS) -> Report:
        runs = {}
        for name, lines in logs.items():
            trained = workspace_at(tmp_path / name, workspace.tracker)
            metrics = MetricsFile(trained.beside())
            for line in lines:
                metrics.append(line, step=line["step"])
            write_history(trained)
            for line in lines:
                metrics.append({**line, "next_token_loss": 1.0}, step=line["step"])
            runs[name] = Checkpoint(
                uri=trained.out, step=steps, sequences_seen=0, model=V3Config(), final_loss=None
            )
        made = loss_parity.run(SPEC, workspace, **runs)
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
        loss_parity.run(SPEC, workspace, **runs)

"""Ranks report to the driver's folder, from wherever they are."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from cluster.checkpoint import save_shard, step_folder
from cluster.desk import Desk, FarDesk, open_desk
from cluster.files import COMPLETE
from cluster.save_state import SaveState
from configs.errors import DataError, MachineError
from configs.parallel import ClusterConfig
from stages.steps import read_metrics
from stages.telemetry import MetricsFile, open_metrics
from tests.supplies import saves_of


class Refusing:
    """A step log that takes nothing."""

    def append(self, metrics: dict[str, Any], *, step: int) -> None:
        raise DataError(f"no record of step {step}")


def refuse(step: int) -> Refusing:
    return Refusing()


@pytest.fixture
def builder(tmp_path: Path) -> Path:
    (tmp_path / "resume" / "saves").mkdir(parents=True)
    return tmp_path


@pytest.fixture(params=["here", "elsewhere"])
def desk(request: pytest.FixtureRequest, machines: ClusterConfig, builder: Path) -> Desk | FarDesk:
    """That of a process which sees the folder, and that of one which does not."""
    saves = saves_of(builder, builder / "earlier")
    log = partial(open_metrics, str(builder))
    return Desk(saves, log) if request.param == "here" else FarDesk(open_desk(saves, log), 60)


def test_steps_marks_and_failures_are_written_before_a_call_returns(
    desk: Desk | FarDesk, builder: Path
) -> None:
    own, saves = Desk(saves_of(builder), refuse), builder / "resume" / "saves"
    MetricsFile(builder).append({"loss": 9.0}, step=3)
    assert desk.open_log(2) is None
    assert read_metrics(builder / "metrics.jsonl") == []
    desk.append({"loss": 1.5}, 3)
    assert read_metrics(builder / "metrics.jsonl") == [{"step": 3, "loss": 1.5}]
    (builder / "earlier").mkdir()
    for step in (3, 6, 9):
        save_shard(step_folder(saves, step), {"any": torch.ones(1)}, {}, rank=0, world=1)
        desk.complete(SaveState(step))
    assert sorted(saves.glob("step-*")) == [step_folder(saves, step) for step in (6, 9)]
    assert (step_folder(saves, 9) / COMPLETE).is_file()
    assert not (builder / "earlier").exists()
    assert desk.choose() == (step_folder(saves, 9), 9)
    assert not desk.has_failed()
    desk.fail("DataError", "no rows")
    assert desk.has_failed()
    with pytest.raises(DataError, match=r"^no rows$"):
        own.raise_failure()
    assert not desk.has_failed()
    own.raise_failure()


def test_why_ranks_began_anew_is_told_once(desk: Desk | FarDesk, builder: Path) -> None:
    own = Desk(saves_of(builder), refuse)
    own.interrupt("trainer 1 failed")
    assert [desk.open_log(0), desk.open_log(0)] == ["trainer 1 failed", None]
    own.interrupt("trainer 2 failed")
    own.fail("DataError", "no rows")
    own.begin()  # The next run's.
    assert desk.open_log(0) is None
    assert not desk.has_failed()


def test_what_the_driver_s_machine_raises_is_raised_by_the_rank(
    machines: ClusterConfig, builder: Path
) -> None:
    desk = FarDesk(open_desk(saves_of(builder), refuse), 60)
    desk.open_log(0)
    with pytest.raises(DataError, match=r"^no record of step 1$"):
        desk.append({}, 1)


def test_a_driver_that_is_gone_is_told_of(machines: ClusterConfig, builder: Path) -> None:
    actor = open_desk(saves_of(builder), refuse)
    desk = FarDesk(actor, 60)
    assert not desk.has_failed()
    ray.kill(actor)
    with pytest.raises(MachineError, match=r"did not take a report \(append: .*run again"):
        desk.append({}, 1)

"""What Ray Train is told of a group of ranks, and what is kept of what it tells, without Ray."""

from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from ray.exceptions import RayTaskError
from ray.train.torch import TorchConfig
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

from cluster import fit
from cluster.desk import Desk
from cluster.workers import choose_network
from configs.errors import LeaseLost, MachineError
from configs.parallel import ClusterConfig
from stages.telemetry import open_metrics
from tests.cluster.jobs import NextToken, job
from tests.supplies import saves_of


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


LOST = LeaseLost("another builder holds the slot")


@pytest.mark.parametrize(
    "error",
    [
        LOST,
        raised_from(LeaseLost("no lease is there"), FileNotFoundError(2, "No such file")),
        RayTaskError("f", "Traceback", LOST),
        raised_from(MachineError("not written"), raised_from(LeaseLost("gone"), OSError("gone"))),
        RayTaskError("f", "Traceback", raised_from(MachineError("not written"), LOST)),
    ],
    ids=["itself", "with a cause", "wrapped", "in the middle", "below what is wrapped"],
)
def test_of_a_group_that_has_lost_its_slot_nothing_is_written_there(
    tmp_path: Path, error: Exception
) -> None:
    desk = Desk(saves_of(tmp_path), partial(open_metrics, str(tmp_path)))
    desk.begin()
    before = set(tmp_path.rglob("*"))
    told = fit._Interruptions(desk)
    told.after_exception(None, {0: RuntimeError("a peer is gone"), 1: error})
    assert set(tmp_path.rglob("*")) == before
    # Another error is kept for the group that follows, and that of a rank that died before others.
    died = WorkerHealthCheckFailedError("health check failed", failure=RuntimeError("killed\nlog"))
    for broken in (OSError("no disk"), raised_from(RuntimeError("no disk"), KeyError("x"))):
        told.after_exception(None, {1: broken})
    assert desk.open_log(0) == "restart 2: trainer 1 failed (no disk)"
    told.after_exception(None, {0: RuntimeError("a peer is gone"), 1: died})
    reason = desk.open_log(0)
    assert reason is not None
    assert reason.startswith("restart 3: trainer 1 failed (")


def test_ray_train_is_told_where_ranks_go_and_to_choose_their_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}
    monkeypatch.setattr(fit, "TorchTrainer", lambda function, **given: told.update(given))
    monkeypatch.setattr(fit, "_fit_interruptibly", lambda trainer: None)
    todo = job(tmp_path, NextToken())
    for placement in ("pack", "spread"):
        machines = ClusterConfig.model_validate({"placement": placement, "trainers": 3})
        fit._run(todo, machines, fit.desk_of(todo), str(tmp_path))
        scaling = told["scaling_config"]
        assert (scaling.placement_strategy, scaling.num_workers) == (placement.upper(), 3)
    calls: list[object] = []

    class Group:
        def execute(self, function: object) -> None:
            calls.append(function)

    real = TorchConfig(backend="gloo").backend_cls
    monkeypatch.setattr(real, "on_start", lambda *_: calls.append("meet"))
    config = told["torch_config"]
    config.backend_cls().on_start(cast(Any, Group()), config)
    assert calls == [choose_network, "meet"]

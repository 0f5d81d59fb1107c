"""The long loop under Ray Train: each step once, whatever dies in between."""

import os
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.checkpoint import latest, load_shards
from cluster.fit import FitJob, fit
from cluster.output import RESTART
from configs.errors import LeaseLost, MachineError, TrainingError
from configs.parallel import ClusterConfig
from stages.steps import read_metrics
from stages.telemetry import MetricsFile
from tests.cluster.jobs import STEPS, NextToken, job, repeatable, saves
from tests.supplies import saves_of

pytestmark = [
    pytest.mark.slow,
    # Ray sets a setting of its own that it deprecates.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]


@dataclass(frozen=True)
class KilledOnce(NextToken):
    """Rank 1's process dies in the fifth step, the first time."""

    marker: str = ""
    calls: list[int] = field(default_factory=list)

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """As ever, unless this is the moment."""
        self.calls.append(1)
        marker = Path(self.marker)
        if dist.get_rank() == 1 and len(self.calls) == 5 and not marker.exists():
            marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().counts(batch)


@dataclass(frozen=True)
class KilledAlways(NextToken):
    """Rank 1's process dies in its first step, every time."""

    def counts(self, batch: Mapping[str, Tensor]) -> dict[str, float]:
        """The end."""
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().counts(batch)


@dataclass(frozen=True)
class KilledBeforeLogging:
    """A step log whose writer dies as it is told of step 2, the first time."""

    log: MetricsFile
    marker: Path

    def append(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """As ever, unless this is the moment."""
        if step == 2 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        self.log.append(metrics, step=step)


def open_killed(folder: str, resume_step: int) -> KilledBeforeLogging:
    log = MetricsFile(folder, resume_step=resume_step)
    return KilledBeforeLogging(log, Path(folder) / "killed")


def refused() -> None:
    """This build may not write."""
    raise LeaseLost("another builder holds the slot")


def run(one: FitJob, machines: ClusterConfig, folder: Path) -> Path:
    """Fit it in the folder of a builder."""
    return fit(one, machines, str(folder), str(folder / "ray"))


def steps_of(folder: Path) -> list[dict[str, Any]]:
    """The step log without the rate, which is measured, and what each process says of itself."""
    own = {"tokens_per_second", "mfu", "tags", RESTART}
    return [
        {name: value for name, value in repeatable(line).items() if name not in own}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def test_a_killed_rank_costs_time_and_nothing_else(machines: ClusterConfig, tmp_path: Path) -> None:
    calm, rough = tmp_path / "calm", tmp_path / "rough"
    final = run(job(calm, NextToken()), machines, calm)
    assert [line["step"] for line in steps_of(calm)] == list(range(1, STEPS + 1))
    marker = rough / "killed"
    survived = run(job(rough, KilledOnce(marker=str(marker))), machines, rough)
    assert marker.exists()
    assert steps_of(rough) == steps_of(calm)
    (said,) = (line[RESTART] for line in read_metrics(rough / "metrics.jsonl") if RESTART in line)
    assert re.fullmatch(
        r"restart 1: trainer 1 failed \(.+\); goes on from the save of step 4", said
    )
    assert "\n" not in said
    expected, found = load_shards(final), load_shards(survived)
    assert set(expected) == set(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    # What is done is not done again, and more steps continue from it.
    assert run(job(calm, KilledAlways()), machines, calm) == final
    longer = run(job(calm, NextToken(), steps=STEPS + 2), machines, calm)
    assert longer.name.endswith("9")
    assert [line["step"] for line in steps_of(calm)] == list(range(1, STEPS + 3))
    assert steps_of(calm)[:STEPS] == steps_of(rough)


def test_a_build_goes_on_from_the_saves_of_an_earlier_builder_and_then_drops_them(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    calm, first, second = (tmp_path / name for name in ("calm", "first", "second"))
    final = run(job(calm, NextToken()), machines, calm)
    run(job(first, NextToken(), steps=4), machines, first)
    # A step that no save holds is made again.
    MetricsFile(first, resume_step=4).append({"loss": 0.0}, step=5)
    kept = set(first.rglob("*"))
    start = latest(Path(saves(first)))
    resumed = job(second, NextToken(), saves=saves_of(second, Path(saves(first)), start=start))
    MetricsFile(second, resume_step=4, earlier=first)
    with pytest.raises(LeaseLost):
        run(replace(resumed, may_write=refused), machines, second)
    # Whoever may not write deletes nothing either.
    assert set(first.rglob("*")) == kept
    made = run(resumed, machines, second)
    assert made == Path(saves(second)) / "step-00000007"
    assert not Path(saves(first)).exists()
    expected, found = load_shards(final), load_shards(made)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert steps_of(second) == steps_of(calm)


def test_a_crash_between_save_and_log_loses_no_step(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    rough = job(tmp_path, NextToken(), open_log=partial(open_killed, str(tmp_path)))
    run(rough, machines, tmp_path)
    assert (tmp_path / "killed").exists()
    assert [line["step"] for line in steps_of(tmp_path)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": NextToken(scale=float("nan"))}, TrainingError, "step 1: not finite"),
        ({"may_write": refused}, LeaseLost, "another builder holds the slot"),
        ({"loss": KilledAlways()}, MachineError, "training workers failed"),
    ],
    ids=["not-finite", "lease-lost", "always-killed"],
)
def test_what_trying_again_will_not_mend_ends_the_run_with_its_own_error(
    changes: dict[str, Any],
    error: type[Exception],
    message: str,
    tmp_path: Path,
    machines: ClusterConfig,
) -> None:
    once = machines.model_copy(update={"max_restarts": 1})
    settings = {"loss": NextToken()} | changes
    with pytest.raises(error, match=message) as caught:
        run(job(tmp_path, **settings), once, tmp_path)
    if error is MachineError:
        # Both attempts of the rank that died, and no word of the one that waited for it.
        note = caught.value.__notes__[0]
        log = tmp_path / "logs" / "trainer-1.log"
        assert note.startswith(f"the last lines of {log}:\n")
        assert note.count(" begins") == 2
        assert " trainer 1: died: " in note
    # Only what steps and saves wrote is there to resume from: Ray Train's notes lie elsewhere.
    assert {path.name for path in Path(saves(tmp_path)).iterdir()} == set()
    assert (tmp_path / "ray").is_dir()

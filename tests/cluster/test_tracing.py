"""Some steps on one rank are traced, and nothing else."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from torch.profiler import profile

from cluster import fit, tracing
from cluster.output import Output
from cluster.pool import TrainerSpec, open_trainers
from cluster.tracing import Tracer, trace_path, untraced
from configs.parallel import ClusterConfig
from configs.profile import Profile
from configs.train import BalanceConfig
from model.weights.files import save_pretrained
from stages.steps import read_metrics
from tests.cluster.jobs import OPTIM, NextToken, RandomBatches, job
from tests.ranks import on_ranks
from tests.references import random_model
from tests.supplies import local


def events(path: Path) -> list[dict[str, Any]]:
    """Those of a Chrome trace."""
    with gzip.open(path) as file:
        found: list[dict[str, Any]] = json.load(file)["traceEvents"]
    return found


def steps_in(path: Path) -> list[str]:
    marks = {one["name"]: one["ts"] for one in events(path) if one["name"].startswith("step ")}
    return sorted(marks, key=marks.__getitem__)


def train(builder: str, steps: int, first: int, last: int) -> list[str]:
    """A training of so many steps with rank 1 traced; which traces a rank finds when it is done."""
    asked = Profile(first, last, 1)
    todo = job(Path(builder), NextToken(), steps=steps, precision="high", profile=asked)
    fit._steps(todo, fit.desk_of(todo))
    return sorted(path.name for path in Path(builder, "logs").glob("*"))


def test_the_steps_that_were_asked_for_are_traced_on_that_rank(tmp_path: Path) -> None:
    on_ranks(2, tmp_path / "ranks", train, str(tmp_path), 4, 2, 3)
    path = tmp_path / "logs" / "trainer-1.steps-2-3.trace.json.gz"
    assert [one.name for one in path.parent.iterdir()] == [path.name]
    assert steps_in(path) == ["step 2", "step 3"]
    inside = {one["name"] for one in events(path)}
    # The model's products, their gradients and the optimiser's update.
    assert {"aten::mm", "aten::_fused_adamw_", "gloo:all_reduce"} <= inside
    assert any("Backward" in name for name in inside)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    told = {line["step"]: line["notes"] for line in lines if "notes" in line}
    assert told == {
        3: [
            f"a trace of steps 2-3 of trainer 1 is in {path}; https://ui.perfetto.dev shows it",
        ]
    }


@pytest.mark.slow
def test_a_resumed_training_traces_what_it_still_does(tmp_path: Path) -> None:
    on_ranks(2, tmp_path / "before", train, str(tmp_path), 2, 90, 99)
    assert not (tmp_path / "logs").exists()
    on_ranks(2, tmp_path / "after", train, str(tmp_path), 4, 1, 9)
    path = tmp_path / "logs" / "trainer-1.steps-1-4.trace.json.gz"
    assert steps_in(path) == ["step 3", "step 4"]


def test_other_steps_and_other_ranks_have_no_profiler(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(**_: object) -> None:
        raise AssertionError("nothing was asked for")

    monkeypatch.setattr(tracing, "profile", never)
    output = Output(str(tmp_path), "trainer")
    for asked in (None, Profile(2, 3, 1), Profile(5, 6, 0)):
        one = Tracer(asked, output, rank=0, steps=4)
        for step in range(1, 5):
            with one.step(step):
                pass
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_ends_its_trace(tmp_path: Path) -> None:
    output, asked = Output(str(tmp_path), "trainer"), Profile(1, 2, 0)
    for _ in range(2):
        # A profiler that still ran would refuse another.
        one = Tracer(asked, output, rank=0, steps=2)
        with pytest.raises(ValueError, match="on purpose"), one.step(1):
            raise ValueError("on purpose")
    assert not trace_path(output, asked).exists()
    one = Tracer(asked, output, rank=0, steps=2)
    for step in (1, 2):
        with one.step(step):
            pass
    assert steps_in(trace_path(output, asked)) == ["step 1", "step 2"]


def test_a_disk_that_takes_no_more_costs_the_trace_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(profile, "export_chrome_trace", full)
    output, asked = Output(str(tmp_path), "trainer"), Profile(1, 1, 0)
    with Tracer(asked, output, rank=0, steps=1).step(1):
        pass
    assert "no trace of steps 1: [Errno 28] No space left" in output.path(0).read_text()
    assert str(untraced(output, asked, 1)).startswith("no trace is in ")


def test_why_there_is_none_is_said(tmp_path: Path) -> None:
    output, asked = Output(str(tmp_path), "trainer"), Profile(3, 9, 0)
    assert untraced(output, None, 5) is None
    assert untraced(output, asked, 2) == (
        "nothing was profiled: the training has 2 steps, and --profile begins later"
    )
    path = tmp_path / "trainer-0.steps-3-5.trace.json.gz"
    assert str(untraced(output, asked, 5)).startswith(f"no trace is in {path}: an earlier run did")
    path.touch()
    assert untraced(output, asked, 5) is None


@pytest.mark.slow
def test_a_pool_traces_a_step_of_several_calls(machines: ClusterConfig, tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path / "start")
    balance = BalanceConfig(bias_update_speed=0.01)
    spec = TrainerSpec(optim=OPTIM, balance=balance, precision="high", seed=0, reference=False)
    one, supply = machines.model_copy(update={"trainers": 1}), local(tmp_path)
    asked = Profile(2, 2, 0)
    with open_trainers(
        one, tmp_path / "start", spec, logs=tmp_path / "logs", supply=supply
    ) as pool:
        for step in (1, 2):
            with pool.tracing(asked, step, of=2):
                for _ in range(2):
                    pool.forward_backward(RandomBatches().batch(step, rank=0, world=1), NextToken())
                    pool.optim_step(0.01)
        path = trace_path(pool.output, asked)
    assert steps_in(path) == ["step 2"]
    names = [found["name"] for found in events(path)]
    assert names.count("aten::embedding") == 2 * 2
    assert "aten::_fused_adamw_" in names

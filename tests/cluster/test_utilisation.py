"""MFU: the model's operations a second over a peak that was measured."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from cluster import fit, utilisation
from cluster.utilisation import Utilisation, measure
from stages.steps import read_metrics
from tests.cluster.jobs import LENGTH, SEQUENCES, NextToken, job
from tests.ranks import on_ranks
from tests.references import TINY


def test_the_peak_is_what_a_product_takes() -> None:
    measure(torch.device("cpu"), torch.float32)
    found = measure(torch.device("cpu"), torch.float32)
    a = torch.randn(1024, 1024)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        torch.mm(a, a)
        seconds.append(time.perf_counter() - begin)
    # Beside other load: far enough from each other to see a wrong unit or factor.
    assert 1 / 4 < found / (2 * 1024**3 / min(seconds)) < 4


def test_measuring_costs_a_moment() -> None:
    measure(torch.device("cpu"), torch.float32)
    begin = time.process_time()
    measure(torch.device("cpu"), torch.float32)
    assert time.process_time() - begin < 0.3


def test_a_training_that_does_nothing_but_products_of_its_model_has_one() -> None:
    assert Utilisation(3e9, 6e11, "").of(200.0) == pytest.approx(1.0)
    assert Utilisation(3e9, 6e11, "").of(20.0) == pytest.approx(0.1)


def train(builder: str, flops: float | None) -> list[Any]:
    todo = job(Path(builder), NextToken(), steps=2, precision="high", flops_per_token=flops)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utilisation, "measure", lambda *_: 1e12)
        fit._steps(todo, fit.desk_of(todo))
    return []


def test_each_step_of_all_ranks_tells_it_and_the_first_the_peak(tmp_path: Path) -> None:
    flops = TINY.training_flops_per_token(LENGTH)
    on_ranks(2, tmp_path / "ranks", train, str(tmp_path), flops)
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert len(lines) == 2
    for line in lines:
        assert line["mfu"] == pytest.approx(line["tokens_per_second"] * flops / 2e12)
    told = lines[0]["tags"]["mfu.peak"]
    assert told == (
        "2,000.0 GFLOP/s (cpu of 2 workers, float32 products, measured when training began)"
    )
    assert SEQUENCES * LENGTH / lines[0]["tokens_per_second"] > 0


def test_a_job_that_knows_of_no_operations_is_held_against_nothing(tmp_path: Path) -> None:
    on_ranks(1, tmp_path / "ranks", train, str(tmp_path), None)
    (first, _) = read_metrics(tmp_path / "metrics.jsonl")
    assert "mfu" not in first
    assert "mfu.peak" not in first["tags"]

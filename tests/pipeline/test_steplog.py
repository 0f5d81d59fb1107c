"""However long a step log is, what is shown of it is bounded and still tells how it went."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from pipeline.steplog import (
    COLUMNS,
    LOG_BYTES,
    THINNED,
    Evenly,
    Points,
    collect,
    fp8_table,
    log_to_send,
    read_log,
)
from stages.steps import read_metrics

ROLES = [f"{part}_{kind}" for part in ("attention", "experts") for kind in ("weights", "inputs")]


def long_log(path: Path, *, steps: int) -> Path:
    """A step log as pretraining writes it: loads, held-out losses and FP8 now and then."""
    load = [[round(1 / 16 + number / 1000, 5) for number in range(16)] for _ in range(3)]
    with path.open("w") as file:
        for step in range(steps + 1):
            record: dict[str, Any] = {"step": step}
            if step:
                record |= {"loss": 9 / step, "mtp_loss": 8 / step, "grad_norm": 1 / step}
                record |= {"learning_rate": 1e-3, "imbalance": 0.5 + 1 / step, "expert_load": load}
                record |= {"tokens_per_second": 1234.56789 + step, "balance_loss": 3 + 1 / step}
            if step % 251 == 0:
                record |= {"held_out_loss": 7.0 - step / 1e5, "held_out_loss/text": 6.9}
            if step % 20 == 1:
                for figure in ("flushed", "clipped", "scale_low", "scale_high"):
                    record |= {f"fp8_{figure}/{role}": step / 1e6 for role in ROLES}
            file.write(json.dumps(record) + "\n")
    return path


@pytest.mark.parametrize("count", [0, 1, 2, 9, 10, 11, 99, 100, 1000, 1001])
def test_what_is_chosen_evenly_is_bounded_and_has_both_ends(count: int) -> None:
    evenly: Evenly[int] = Evenly(10)
    for number in range(count):
        evenly.add(number)
    chosen = evenly.items()
    assert len(chosen) <= 11
    assert len(chosen) == count or len(chosen) > 5
    assert chosen[:1] + chosen[-1:] == (([0, count - 1]) if count else [])
    gaps = {b - a for a, b in pairwise(chosen[:-1])}
    assert len(gaps) <= 1


def test_a_spike_of_one_step_is_seen_in_a_thinned_curve() -> None:
    points = Points()
    for step in range(20_000):
        points.steps.append(step)
        points.values.append({7_777: 100.0, 12_345: -100.0}.get(step, step / 1e6))
    steps, values = points.thinned()
    assert len(steps) == len(values) <= 2 * COLUMNS + 2
    assert (steps[0], steps[-1]) == (0, 19_999)
    assert (7_777, 100.0) in zip(steps, values, strict=True)
    assert (12_345, -100.0) in zip(steps, values, strict=True)
    assert steps == sorted(steps)


def test_values_that_are_not_finite_are_in_no_curve() -> None:
    log = collect([{"step": 1, "loss": float("inf")}, {"step": 2, "loss": 1.0, "x": float("nan")}])
    assert {name: list(p.values) for name, p in log.curves.items()} == {"loss": [1.0]}


def test_a_short_log_is_sent_as_it_is(tmp_path: Path) -> None:
    path = long_log(tmp_path / "metrics.jsonl", steps=100)
    sent = log_to_send(path, read_log(path), tmp_path / "into")
    assert sent is not None
    assert sent[0] == path
    assert "whole" in sent[1]


def test_no_log_is_nothing_to_send(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert log_to_send(path, read_log(path), tmp_path) is None


def test_a_long_log_is_sent_thinned_and_says_so_and_where_the_whole_one_lies(
    tmp_path: Path,
) -> None:
    path = long_log(tmp_path / "metrics.jsonl", steps=20_000)
    assert path.stat().st_size > 2 * LOG_BYTES
    sent, told = log_to_send(path, read_log(path), tmp_path / "into") or (path, "")
    assert sent.name == THINNED
    assert "thinned" in sent.name
    assert str(path) in told
    assert LOG_BYTES / 10 < sent.stat().st_size < LOG_BYTES
    whole = {record["step"]: record for record in read_metrics(path)}
    lines = read_metrics(sent)
    steps = [line["step"] for line in lines]
    assert (steps[0], steps[-1]) == (0, 20_000)
    assert steps == sorted(set(steps))
    for line in lines:
        assert line.items() <= whole[line["step"]].items()
        assert not any(isinstance(value, list) or "fp8" in name for name, value in line.items())
    measured = [step for step, record in whole.items() if "held_out_loss" in record]
    assert set(measured) <= set(steps)
    assert f"{len(lines):,} of the step log's 20,001 lines" in told


def test_every_line_measured_does_not_make_what_is_sent_larger(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    measured = {f"held_out_loss/source_{number}": 1 / 3 for number in range(40)}
    with path.open("w") as file:
        file.writelines(json.dumps({"step": s, **measured}) + "\n" for s in range(1, 5_001))
    sent, _ = log_to_send(path, read_log(path), tmp_path) or (path, "")
    assert sent.stat().st_size < LOG_BYTES
    assert read_metrics(sent)[-1]["step"] == 5_000


def test_what_fp8_did_is_a_table_of_one_row_for_each_part_and_figure() -> None:
    records = [
        {"step": 1, "loss": 1.0, "fp8_alarms": 0, "fp8_flushed/b": 0.3, "fp8_scale_low/b": -3},
        {"step": 2, "loss": 1.0, "fp8_alarms": 0, "fp8_flushed/b": 0.1, "fp8_flushed/a": 0.5},
        {"step": 3, "loss": 1.0, "fp8_alarms": 0, "fp8_flushed/b": 0.2},
    ]
    assert fp8_table(collect(records)) == {
        "columns": ["part", "figure", "first", "median", "last", "lowest", "highest"],
        "data": [
            ["a", "flushed", 0.5, 0.5, 0.5, 0.5, 0.5],
            ["b", "flushed", 0.3, 0.2, 0.2, 0.1, 0.3],
            ["b", "scale_low", -3.0, -3.0, -3.0, -3.0, -3.0],
        ],
    }


def test_a_training_without_fp8_has_no_such_table() -> None:
    assert fp8_table(collect([{"step": 1, "loss": 1.0, "fp8_alarms": 0}])) is None

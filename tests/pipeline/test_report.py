"""Plots show every scalar there is, and are images."""

import json
from pathlib import Path
from typing import Any

from matplotlib.image import imread

from pipeline.report import plot_report, plot_steps

LOAD = [[0.25] * 4, [0.7, 0.1, 0.1, 0.1]]


def names(paths: list[Path]) -> set[str]:
    for path in paths:
        assert imread(path).ndim == 3
    return {path.name for path in paths}


def test_every_scalar_is_plotted_and_losses_share_one(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"step": step, "loss": 1 / step, "mtp_loss": 2.0, "grad_norm": 1.0, "expert_load": LOAD}
        for step in range(1, 5)
    ]
    assert names(plot_steps(records, tmp_path)) == {"loss.png", "grad_norm.png", "expert_load.png"}


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}]
    assert names(plot_steps(records, tmp_path)) == {"loss.png"}


def test_a_heat_map_shows_where_the_load_is(tmp_path: Path) -> None:
    def brightness(layer: list[float]) -> float:
        records = [{"step": step, "expert_load": [layer]} for step in (1, 2)]
        (path,) = plot_steps(records, tmp_path)
        return float(imread(path)[:, :, :3].mean())

    assert brightness([1.0, 0.0, 0.0, 0.0]) != brightness([0.25] * 4)


def test_a_log_without_steps_has_no_plots(tmp_path: Path) -> None:
    assert plot_steps([], tmp_path) == []


def test_before_and_after_stand_side_by_side(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    headline = {"before_pass_at_1": 0.2, "after_pass_at_1": 0.6, "ngram_bits_per_byte": 3.0}
    headline |= {f"{side}_pass_at_1_low": 0.1 for side in ("before", "after")}
    headline |= {f"{side}_pass_at_1_high": 0.7 for side in ("before", "after")}
    report.write_text(json.dumps({"headline": headline}))
    assert names(plot_report(report, tmp_path)) == {"before_after.png"}


def test_a_report_without_pairs_has_no_plot(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    report.write_text(json.dumps({"headline": {"after_pass_at_1": 0.5}}))
    assert plot_report(report, tmp_path) == []

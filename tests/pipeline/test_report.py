"""Plots show every scalar there is, and are images."""

import itertools
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread
from numpy.typing import NDArray

from configs.errors import ArtifactError
from configs.model import V3Config
from configs.parity import ParityConfig
from pipeline.figures import show_figures
from pipeline.report import plot_artifact, plot_log, plot_steps
from pipeline.steplog import read_log
from stages.artifacts import Checkpoint, Report
from stages.loss_parity.gaps import Pair, compare
from stages.loss_parity.render import plot
from stages.plots import Bar, Bars, Plot, write_plots
from stages.telemetry import MetricsFile
from tests.pipeline.test_steplog import long_log

BOUNDS = {"held_out_pass_at_1_low": 0.05, "held_out_pass_at_1_high": 0.9}
LOAD = [[0.25] * 4, [0.7, 0.1, 0.1, 0.1]]


def names(paths: list[Path]) -> set[str]:
    for path in paths:
        assert imread(path).ndim == 3
    return {path.name for path in paths}


def test_a_pretraining_is_shown_in_few_plots_each_with_what_belongs_together(
    tmp_path: Path,
) -> None:
    records: list[dict[str, Any]] = [{"step": 0, "held_out_loss": 3.0, "held_out_loss/text": 3.1}]
    records += [
        {"step": step, "loss": 1 / step, "mtp_loss": 2.0, "expert_load": LOAD}
        | {"grad_norm": 1.0, "learning_rate": min(step, 2), "tokens_per_second": 5.0}
        | {f"fp8_flushed/role_{number}": 0.01 * number for number in range(20)}
        | {f"fp8_scale_low/role_{number}": -number for number in range(20)}
        for step in range(1, 5)
    ]
    expected = {"loss.png", "optim.png", "fp8.png", "expert_load.png", "other.png"}
    assert names(plot_steps(records, tmp_path)) == expected


def test_a_post_training_is_shown_by_its_reward(tmp_path: Path) -> None:
    measured = {"held_out_pass_at_1": 0.5, "best_step": 0}
    bounds = {"held_out_pass_at_1_low": 0.4, "held_out_pass_at_1_high": 0.6}
    records = [{"step": 0, **measured, **bounds}, {"step": 1, "reward": 0.5}]
    assert names(plot_steps(records, tmp_path)) == {"reward.png"}


def test_a_plugins_figures_stand_in_one_grid(tmp_path: Path) -> None:
    records = [
        {"step": step} | {f"mine_{n}${{": step * n for n in range(60)} | {"by/a": 1, "by/b": 2}
        for step in (1, 2)
    ]
    assert names(plot_steps(records, tmp_path)) == {"other.png"}


def different(a: list[dict[str, Any]], b: list[dict[str, Any]], name: str, folder: Path) -> bool:
    """Whether two step logs have another picture of this name."""
    first, second = (
        next(path for path in plot_steps(records, folder / str(number)) if path.name == name)
        for number, records in enumerate((a, b))
    )
    one, other = imread(first), imread(second)
    return one.shape != other.shape or bool((one != other).any())


@pytest.mark.parametrize(
    ("name", "figure", "beside"),
    [
        ("loss.png", "mtp_loss", {"loss": 0.9}),
        ("loss.png", "held_out_loss/text", {"loss": 0.9}),
        ("optim.png", "grad_norm", {}),
        ("fp8.png", "fp8_flushed/attention", {}),
        ("fp8.png", "fp8_clipped/attention", {"fp8_flushed/attention": 0.1}),
        ("reward.png", "held_out_pass_at_1", BOUNDS),
        ("reward.png", "held_out_pass_at_1_low", {**BOUNDS, "held_out_pass_at_1": 0.6}),
        ("other.png", "imbalance", {}),
    ],
)
def test_each_figure_is_in_its_plot(
    tmp_path: Path, name: str, figure: str, beside: dict[str, float]
) -> None:
    usual: list[dict[str, Any]] = [{"step": step, **beside, figure: 0.1} for step in (1, 2, 3)]
    moved = [usual[0], usual[1] | {figure: 0.5}, usual[2]]
    assert different(usual, moved, name, tmp_path)


def test_where_the_rate_begins_to_fall_is_marked_in_the_losses(tmp_path: Path) -> None:
    flat = [{"step": step, "loss": 1 / step, "learning_rate": 1.0} for step in range(1, 9)]
    falling = [one | {"learning_rate": 1.0 if one["step"] < 6 else 0.5} for one in flat]
    assert different(flat, falling, "loss.png", tmp_path)


def test_a_log_of_20000_steps_is_read_and_drawn_in_seconds(tmp_path: Path) -> None:
    """Processor time, which what runs beside it changes less than the clock's."""
    log = long_log(tmp_path / "metrics.jsonl", steps=20_000)
    began = time.process_time()
    paths = plot_log(read_log(log), tmp_path / "plots")
    assert time.process_time() - began < 10
    assert len(paths) == 5
    assert sum(path.stat().st_size for path in paths) < 1_000_000


def test_values_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    records = [{"step": 1, "loss": float("nan")}, {"step": 2, "loss": 1.0}]
    assert names(plot_steps(records, tmp_path)) == {"loss.png"}


def test_a_heat_map_shows_where_the_load_is(tmp_path: Path) -> None:
    """Experts lie upwards: what changes from one to the next lies higher and higher."""

    def picture(layer: list[float]) -> NDArray[np.float32]:
        records = [{"step": step, "expert_load": [layer]} for step in (1, 2)]
        (path,) = plot_steps(records, tmp_path)
        return imread(path)[:, :, :3]

    pictures = [picture([float(number == loaded) for number in range(4)]) for loaded in range(4)]
    assert all(np.any(a != b) for a, b in itertools.pairwise(pictures))
    rows = [np.nonzero(a != b)[0].mean() for a, b in itertools.pairwise(pictures)]
    assert rows == sorted(rows, reverse=True)
    assert rows[0] - rows[-1] > len(pictures[0]) / 4


def test_a_log_without_steps_has_no_plots(tmp_path: Path) -> None:
    assert plot_steps([], tmp_path) == []


@pytest.mark.parametrize("bounded", [True, False])
def test_models_stand_side_by_side_with_their_intervals(tmp_path: Path, bounded: bool) -> None:
    bounds = {"low": 0.1, "high": 0.7} if bounded else {}
    values = {"before": 0.2, "after": 0.6, "sft": 0.3}
    bars = {name: Bar(value=value, **bounds) for name, value in values.items()}
    panel = Bars(title="pass at 1", bars=bars)
    write_plots(tmp_path, Plot(name="models", panels=(panel, panel)))
    assert names(plot_artifact(tmp_path, tmp_path / "out")) == {"models.png"}


@pytest.mark.parametrize("seeds", [1, 3])
def test_losses_of_two_precisions_stand_above_their_gap(tmp_path: Path, seeds: int) -> None:
    def drawn(early: float, folder: str) -> Path:
        """The FP8 loss is this many times the other, but for the tail, where they are equal."""
        high = [5 - step / 40 for step in range(100)]
        fp8 = [early * loss for loss in high[:80]] + high[80:]
        pairs = dict.fromkeys(range(seeds), Pair(fp8=fp8, high=high))
        (tmp_path / folder).mkdir()
        write_plots(tmp_path / folder, plot(compare(pairs, ParityConfig())))
        (path,) = plot_artifact(tmp_path / folder, tmp_path / folder)
        return path

    near, far = drawn(1.0, "near"), drawn(1.003, "far")
    assert names([near, far]) == {"loss_parity.png"}
    # Titles and axes are equal; the lower half is the gap's.
    half = imread(near).shape[0] // 2
    assert (imread(near)[half:] != imread(far)[half:]).any()


def test_a_gap_is_shown_in_percent() -> None:
    report = Report(uri="/", headline={"relative_gap": 0.000834, "largest_gap": 0.001})
    told = show_figures(report.key_figures())
    assert told == "relative gap 0.083 %, largest gap 0.100 %"


def test_an_artifact_that_describes_no_plots_has_none(tmp_path: Path) -> None:
    assert plot_artifact(tmp_path, tmp_path) == []


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"name": "a/b", "panels": []}]'])
def test_plots_that_cannot_be_drawn_are_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "plots.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"not plots that can be drawn .* mend the stage"):
        plot_artifact(tmp_path, tmp_path)


def test_a_trainings_rate_is_that_of_its_usual_step(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    for step, rate in enumerate((1.0, 900.0, 1000.0, 1100.0, 50.0), 1):
        log.append({"loss": 4.0 - step, "tokens_per_second": rate}, step=step)
    made = Checkpoint(
        uri=str(tmp_path / "files"), step=5, sequences_seen=0, model=V3Config(), final_loss=None
    )
    assert made.key_figures() == {"loss": -1.0, "tokens_per_second": 900.0}

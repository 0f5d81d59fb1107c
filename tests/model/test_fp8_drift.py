"""Alarms over what FP8 does to a model's tensors."""

import pytest

from model.fp8.drift import BASELINE_SAMPLES, Drift
from model.fp8.recorder import Tally

CALM = Tally(nonzero=1000.0, clipped=0.0, flushed=20.0, lost=0.0, low=-12.0, high=-3.0)


def settled() -> Drift:
    drift = Drift()
    for _ in range(BASELINE_SAMPLES):
        assert drift.alarms({"head_weights": CALM}) == []
    return drift


def test_what_stays_as_it_was_raises_no_alarm() -> None:
    drift = settled()
    near = Tally(nonzero=1000.0, clipped=0.0, flushed=60.0, lost=0.0, low=-60.0, high=4.0)
    assert drift.alarms({"head_weights": near}) == []


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (
            Tally(1000.0, 0.0, 200.0, 0.0, -12.0, -3.0),
            "20.0% of its values become zero, against 2.0%",
        ),
        (Tally(1000.0, 0.0, 20.0, 0.0, -12.0, 14.0), "its largest scale is 2^14, against 2^-3"),
    ],
)
def test_what_moved_from_the_usual_is_told_with_both_figures(now: Tally, told: str) -> None:
    (alarm,) = settled().alarms({"head_weights": now})
    assert alarm.startswith(f"head_weights: {told}")
    # Without a usual there is nothing that it moved from.
    assert Drift().alarms({"head_weights": now}) == []


@pytest.mark.parametrize(
    ("now", "told"),
    [
        (Tally(1000.0, 5.0, 0.0, 0.0, -12.0, -3.0), "0.50% of its values are beyond the largest"),
        (Tally(1000.0, 0.0, 20.0, 5.0, -12.0, -3.0), "0.50% of its values lie in tiles too small"),
        (Tally(1000.0, 0.0, 20.0, 0.0, -112.0, -3.0), "its smallest scale is 2^-112; under 2^-126"),
    ],
)
def test_what_is_always_wrong_is_told_at_once(now: Tally, told: str) -> None:
    (alarm,) = Drift().alarms({"head_weights": now})
    assert told in alarm


def test_where_nothing_was_fp8_there_are_no_figures() -> None:
    assert Drift().figures({}) == {}


def test_a_role_without_values_says_nothing() -> None:
    drift = settled()
    assert drift.alarms({"head_weights": Tally()}) == []


def test_what_is_counted_becomes_metrics_and_what_is_wrong_a_note() -> None:
    seen = {
        "head_weights": Tally(200.0, 0.0, 20.0, 0.0, -9.0, -3.0),
        "gate_weights": Tally(100.0, 5.0, 0.0, 0.0, -4.0, -4.0),
        "engram_weights": Tally(),
    }
    figures = Drift().figures(seen)
    assert figures["fp8_flushed/head_weights"] == 0.1
    assert figures["fp8_clipped/gate_weights"] == 0.05
    assert figures["fp8_scale_low/head_weights"] == -9.0
    assert figures["fp8_scale_high/head_weights"] == -3.0
    assert "fp8_scale_low/engram_weights" not in figures  # it would be infinite
    assert figures["fp8_alarms"] == 1
    (note,) = figures["notes"]
    assert note.startswith("warning: FP8: gate_weights: 5.00% of its values are beyond")

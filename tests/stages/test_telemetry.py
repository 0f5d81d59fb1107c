"""The step log has each step once, whatever crashed and resumed; its follower reports each once."""

import json
import time
from pathlib import Path

from stages.telemetry import METRICS, MetricsFile, following, read_metrics
from tests.conftest import Recorder


def test_a_resumed_log_holds_each_step_once(tmp_path: Path) -> None:
    first = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        first.append({"loss": step}, step=step)
    second = MetricsFile(tmp_path, resume_step=2)
    second.append({"loss": 30}, step=3)
    assert read_metrics(tmp_path / METRICS) == [
        {"step": 1, "loss": 1},
        {"step": 2, "loss": 2},
        {"step": 3, "loss": 30},
    ]


def test_a_fresh_build_forgets_an_older_log(tmp_path: Path) -> None:
    MetricsFile(tmp_path).append({"loss": 1}, step=1)
    MetricsFile(tmp_path)
    assert read_metrics(tmp_path / METRICS) == []


def test_a_line_cut_short_by_a_crash_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text(json.dumps({"step": 1}) + "\n" + '{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1}]
    MetricsFile(tmp_path, resume_step=1).append({}, step=2)
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


def test_a_log_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / METRICS) == []


def test_a_follower_reports_every_step_once_across_a_restart(
    tmp_path: Path, recorder: Recorder
) -> None:
    MetricsFile(tmp_path).append({"loss": 1.0}, step=1)
    with following(tmp_path, recorder):
        log = MetricsFile(tmp_path, resume_step=1)
        log.append({"loss": 2.0}, step=2)
        log.append({"loss": 3.0}, step=3)
        # A restarted worker resumes from step 1 and computes 2 and 3 again.
        log = MetricsFile(tmp_path, resume_step=1)
        for step in (2, 3, 4):
            log.append({"loss": float(step)}, step=step)
    assert recorder.logged == [(step, {"loss": float(step)}) for step in (1, 2, 3, 4)]


def test_what_a_step_has_to_say_reaches_the_user_once(tmp_path: Path, recorder: Recorder) -> None:
    with following(tmp_path, recorder):
        log = MetricsFile(tmp_path)
        log.append({"loss": 1.0, "tags": {"fp8.products": "cpu: compiled"}}, step=1)
        log.append({"loss": 2.0, "notes": ["warning: it drifts"]}, step=2)
        log = MetricsFile(tmp_path, resume_step=1)
        log.append({"loss": 2.0, "notes": ["warning: it drifts"]}, step=2)
    assert recorder.notes == ["step 2: warning: it drifts"]
    assert recorder.tags == {"fp8.products": "cpu: compiled"}
    assert recorder.logged == [(1, {"loss": 1.0}), (2, {"loss": 2.0})]


def test_a_worker_that_took_over_says_what_it_computes_with(
    tmp_path: Path, recorder: Recorder
) -> None:
    with following(tmp_path, recorder):
        log = MetricsFile(tmp_path)
        log.append({"loss": 1.0, "tags": {"fp8.products": "cpu: compiled"}}, step=1)
        log.append({"loss": 2.0}, step=2)
        deadline = time.monotonic() + 10
        while len(recorder.logged) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        log = MetricsFile(tmp_path, resume_step=1)
        log.append({"loss": 2.0, "tags": {"fp8.products": "cpu: eager"}}, step=2)
    assert recorder.tags == {"fp8.products": "cpu: eager"}
    assert recorder.logged == [(1, {"loss": 1.0}), (2, {"loss": 2.0})]


def test_nothing_is_lost_between_the_last_look_and_the_end(
    tmp_path: Path, recorder: Recorder
) -> None:
    with following(tmp_path, recorder):
        log = MetricsFile(tmp_path)
        for step in range(1, 200):
            log.append({"loss": 0.5}, step=step)
    assert [step for step, _ in recorder.logged] == list(range(1, 200))

"""The step log has each step once, whatever crashed and resumed; its follower reports each once."""

import json
import os
import time
from pathlib import Path

import pytest

from cluster.output import RESTART
from stages.contract import Workspace
from stages.steps import METRICS, computed, read_metrics
from stages.telemetry import (
    HISTORY,
    SAVES,
    MetricsFile,
    begin_metrics,
    following,
    write_history,
)
from tests.conftest import Recorder, workspace_at


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


def test_a_line_is_on_the_disk_before_whoever_wrote_it_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, seen = MetricsFile(tmp_path), []

    def sync(descriptor: int) -> None:
        seen.append(os.fstat(descriptor).st_size)

    monkeypatch.setattr(os, "fsync", sync)
    log.append({"loss": 1.0}, step=1)
    assert seen == [log.path.stat().st_size]
    assert seen[0] > 0


def test_a_fresh_build_forgets_an_older_log(tmp_path: Path) -> None:
    MetricsFile(tmp_path).append({"loss": 1}, step=1)
    MetricsFile(tmp_path)
    assert read_metrics(tmp_path / METRICS) == []


def test_a_log_begins_with_what_an_earlier_builder_recorded_up_to_its_save(
    tmp_path: Path,
) -> None:
    earlier, mine = tmp_path / "earlier", tmp_path / "mine"
    for folder in (earlier, mine):
        folder.mkdir()
    first = MetricsFile(earlier)
    for step in (1, 2, 3):
        first.append({"loss": step}, step=step)
    before = (earlier / METRICS).read_bytes()
    MetricsFile(mine, resume_step=2, earlier=earlier).append({"loss": 30}, step=3)
    assert [line["loss"] for line in read_metrics(mine / METRICS)] == [1, 2, 30]
    # Its own log, once it has one, is the one that counts.
    MetricsFile(mine, resume_step=3, earlier=earlier)
    assert [line["loss"] for line in read_metrics(mine / METRICS)] == [1, 2, 30]
    assert (earlier / METRICS).read_bytes() == before


def test_a_build_begins_its_log_with_that_of_the_builder_whose_save_it_takes(
    tmp_path: Path, recorder: Recorder
) -> None:
    builders = [tmp_path / "g1" / name for name in ("000001-first", "000002-second")]
    for number, builder in enumerate(builders, 1):
        builder.mkdir(parents=True)
        MetricsFile(builder).append({"loss": number}, step=1)
    work = workspace_at(tmp_path / "g1", recorder, earlier=tuple(map(str, reversed(builders))))
    save = builders[0] / "resume" / SAVES / "step-00000001"
    log = begin_metrics(work, (save, 1))
    assert read_metrics(log.path) == [{"step": 1, "loss": 1}]
    assert log.path == work.beside(METRICS)
    assert read_metrics(begin_metrics(work, None).path) == []


def test_a_history_holds_losses_and_rewards_and_nothing_that_differs_between_builds(
    tmp_path: Path, recorder: Recorder
) -> None:
    texts = []
    for rate in (1000.0, 2000.0):
        work = workspace_at(tmp_path / f"{rate}", recorder)
        log = MetricsFile(work.beside())
        log.append({"loss": 2.0, "mtp_loss": 0.5, "tokens_per_second": rate}, step=1)
        log.append({"loss": 1.5, "reward": 0.25, "tags": {"host": f"{rate}"}}, step=2)
        records = write_history(work)
        assert records == read_metrics(log.path)
        texts.append(work.path(HISTORY).read_text())
    assert texts[0] == texts[1]
    assert json.loads(texts[0]) == {
        "step": [1, 2],
        "loss": [2.0, 1.5],
        "mtp_loss": [0.5, None],
        "reward": [None, 0.25],
    }


def test_what_is_measured_on_held_out_data_has_a_table_of_its_own_steps(
    workspace: Workspace,
) -> None:
    log = MetricsFile(workspace.beside())
    log.append({"held_out_loss/a": 5.0, "held_out_loss": 4.0}, step=0)
    log.append({"loss": 2.0}, step=1)
    log.append({"loss": 1.5, "held_out_loss/a": 4.5, "held_out_loss": 3.0, "best_step": 2}, step=2)
    assert log.records() == read_metrics(log.path)
    write_history(workspace)
    assert json.loads(workspace.path(HISTORY).read_text()) == {
        "step": [1, 2],
        "loss": [2.0, 1.5],
        "held_out": {
            "step": [0, 2],
            "held_out_loss/a": [5.0, 4.5],
            "held_out_loss": [4.0, 3.0],
            "best_step": [None, 2],
        },
    }


def test_a_build_that_begins_anew_measures_again_what_was_before_its_first_step(
    tmp_path: Path,
) -> None:
    MetricsFile(tmp_path).append({"held_out_loss": 4.0}, step=0)
    log = MetricsFile(tmp_path)
    log.append({"held_out_loss": 4.0}, step=0)
    log.append({"loss": 2.0}, step=1)
    MetricsFile(tmp_path, resume_step=1)
    assert [line["step"] for line in read_metrics(tmp_path / METRICS)] == [0, 1]


def test_what_was_before_the_first_step_is_reported_once(
    tmp_path: Path, recorder: Recorder
) -> None:
    with following(tmp_path, recorder):
        for _ in range(2):
            log = MetricsFile(tmp_path)
            log.append({"held_out_loss": 4.0}, step=0)
            deadline = time.monotonic() + 10
            while not recorder.logged and time.monotonic() < deadline:
                time.sleep(0.01)
        log.append({"loss": 2.0}, step=1)
    assert recorder.logged == [(0, {"held_out_loss": 4.0}), (1, {"loss": 2.0})]


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


def test_why_workers_began_anew_is_told_though_the_step_was_told_before(
    tmp_path: Path, recorder: Recorder
) -> None:
    why = "trainer 1 failed (killed); goes on from the save of step 1"
    with following(tmp_path, recorder):
        log = MetricsFile(tmp_path)
        log.append({"loss": 1.0}, step=1)
        log.append({"loss": 2.0}, step=2)
        deadline = time.monotonic() + 10
        while len(recorder.logged) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        log = MetricsFile(tmp_path, resume_step=1)
        log.append({"loss": 2.0, RESTART: why}, step=2)
        while not recorder.notes and time.monotonic() < deadline:
            time.sleep(0.01)
        # Rewritten once more: the line of step 2 stays, and is read again.
        MetricsFile(tmp_path, resume_step=2).append({"loss": 3.0}, step=3)
    assert recorder.notes == [why]
    assert recorder.logged == [(step, {"loss": float(step)}) for step in (1, 2, 3)]


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


def test_an_artifact_says_what_it_was_computed_on(tmp_path: Path) -> None:
    log = MetricsFile(tmp_path)
    first = {"fp8.products": "cpu: compiled by cc", "device": "cpu", "compute": "float32"}
    log.append({"loss": 1.0, "tags": {**first, "other": "1"}}, step=1)
    log.append({"loss": 1.0}, step=2)
    log.append({"loss": 1.0, "tags": {"device": "NVIDIA H100"}}, step=3)
    found = computed(read_metrics(tmp_path / METRICS))
    assert found == {"device": "NVIDIA H100", "compute": "float32", "products": "cpu"}
    assert computed([{"loss": 1.0}]) == {}


def test_nothing_is_lost_between_the_last_look_and_the_end(
    tmp_path: Path, recorder: Recorder
) -> None:
    with following(tmp_path, recorder):
        log = MetricsFile(tmp_path)
        for step in range(1, 200):
            log.append({"loss": 0.5}, step=step)
    assert [step for step, _ in recorder.logged] == list(range(1, 200))

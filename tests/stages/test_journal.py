"""A process's step log: the lease before each line, and its news in the first."""

import pytest

from configs.errors import LeaseLost
from stages.contract import Workspace
from stages.posttrain.journal import Journal, Stopwatch
from stages.steps import METRICS, read_metrics
from tests.conftest import steal


def test_the_first_line_of_a_process_bears_its_news_and_later_lines_their_own(
    workspace: Workspace,
) -> None:
    journal = Journal(workspace, resume_step=0)
    journal.announce({"tags": {"fp8.products": "cpu"}, "notes": ["warning: no FP8"]})
    journal.write({"held_out_pass_at_1": 0.5}, step=0)
    journal.write({"loss": 1.0}, step=1, notes=["it drifts"])
    journal.write({"loss": 0.5}, step=2)
    again = Journal(workspace, resume_step=1)
    again.announce({"tags": {"fp8.products": "cuda"}})
    again.write({"loss": 0.5}, step=2, notes=["still"])
    assert read_metrics(workspace.beside(METRICS)) == [
        {
            "step": 0,
            "held_out_pass_at_1": 0.5,
            "notes": ["warning: no FP8"],
            "tags": {"fp8.products": "cpu"},
        },
        {"step": 1, "loss": 1.0, "notes": ["it drifts"]},
        {"step": 2, "loss": 0.5, "notes": ["still"], "tags": {"fp8.products": "cuda"}},
    ]
    assert again.records() == read_metrics(workspace.beside(METRICS))


def test_a_process_that_begins_anew_measures_again_what_was_before_the_first_step(
    workspace: Workspace,
) -> None:
    first = Journal(workspace, resume_step=0)
    first.write({"held_out_pass_at_1": 0.5}, step=0)
    first.write({"loss": 1.0}, step=1)
    assert Journal(workspace, resume_step=1).records() == first.records()
    assert Journal(workspace, resume_step=0).records() == []


def test_no_line_is_written_once_the_lease_is_lost(workspace: Workspace) -> None:
    journal = Journal(workspace, resume_step=0)
    journal.write({"loss": 1.0}, step=1)
    steal(workspace)
    with pytest.raises(LeaseLost):
        journal.write({"loss": 0.5}, step=2)
    assert [line["step"] for line in journal.records()] == [1]


def test_laps_are_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 12.0, 17.0])
    monkeypatch.setattr("stages.posttrain.journal.time.perf_counter", lambda: next(clock))
    watch = Stopwatch()
    watch.lap("sampling_seconds")
    watch.lap("learning_seconds")
    assert watch.seconds == {"sampling_seconds": 2.0, "learning_seconds": 5.0}

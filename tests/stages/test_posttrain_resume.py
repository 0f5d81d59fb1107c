"""Post-training that is cut short anywhere goes on to what an uninterrupted run makes."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from cluster.workers import WorkerDied
from configs.errors import DeadlineError, MachineError
from configs.parallel import ClusterConfig
from model.weights.files import load_pretrained
from stages.artifacts import Checkpoint
from stages.contract import Workspace
from stages.telemetry import HISTORY, SAVES
from tests.conftest import Recorder, workspace_at
from tests.stages.pools import Book, digest
from tests.stages.rl_lab import Lab, make_lab

DEATH = WorkerDied("trainer 1 died: killed")
MOMENTS = [
    ("sample", 2),  # while the base is measured
    ("sample", 3),  # in the first step, after that
    ("optim_step", 2),
    ("update_weights", 2),
    ("sample", 6),  # while the second step is measured, before its line and its save
    ("save", 1),
    ("forward_backward", 6),  # between the third step's minibatches
    ("save", 3),  # after the last line
]
"""Calls in which a worker dies; steps 2 and 4 of 5 are saved, steps 0, 2, 4 and 5 measured."""


@dataclass(frozen=True)
class Whole:
    """What a run that nothing disturbed made."""

    lab: Lab
    log: list[dict[str, Any]]
    history: bytes
    weights: str
    rates: dict[int, list[float]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Whole]:
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        lab = make_lab(folder / "lab", patch)
        work = workspace_at(folder / "slot", Recorder())
        made = lab.run(work)
        yield Whole(
            lab,
            without_tags(lab.log(work)),
            made.path(HISTORY).read_bytes(),
            digest(load_pretrained(made.path())),
            rates(lab.book, {1, 2, 3, 4, 5}),
        )


@pytest.fixture
def lab(whole: Whole) -> Lab:
    """The same lab with pools that nobody has asked anything."""
    whole.lab.fresh()
    return whole.lab


def without_tags(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each process says once how it computes."""
    return [{k: v for k, v in line.items() if k != "tags"} for line in log]


def rates(book: Book, steps: set[int]) -> dict[int, list[float]]:
    """The learning rates of each of the steps that were done."""
    found = [call.arguments["learning_rate"] for call in book.of("optim_step")]
    assert len(found) == 2 * len(steps)
    return {step: found[2 * at : 2 * at + 2] for at, step in enumerate(sorted(steps))}


def assert_equal_to(whole: Whole, lab: Lab, work: Workspace, made: Checkpoint) -> None:
    assert without_tags(lab.log(work)) == whole.log
    assert made.path(HISTORY).read_bytes() == whole.history
    assert digest(load_pretrained(made.path())) == whole.weights


@pytest.mark.parametrize(("verb", "number"), MOMENTS)
def test_a_dead_worker_is_followed_by_new_pools_and_the_same_training(
    whole: Whole, lab: Lab, workspace: Workspace, recorder: Recorder, verb: str, number: int
) -> None:
    lab.book.fail(verb, number, DEATH)
    made = lab.run(workspace)
    assert_equal_to(whole, lab, workspace, made)
    assert recorder.notes[0] == f"{DEATH}; starting the workers anew"
    assert len(lab.book.of("open_trainers")) == len(lab.book.of("open_generation")) == 2
    assert [step for step, _ in recorder.logged] == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(("verb", "number"), [MOMENTS[1], MOMENTS[4], MOMENTS[6], MOMENTS[7]])
def test_a_builder_that_died_is_followed_by_one_that_makes_the_same(
    whole: Whole,
    lab: Lab,
    make_workspace: Callable[..., Workspace],
    recorder: Recorder,
    verb: str,
    number: int,
) -> None:
    lab.book.fail(verb, number, KeyboardInterrupt())
    first = make_workspace("first")
    with pytest.raises(KeyboardInterrupt):
        lab.run(first)
    recorder.logged.clear()
    lab.fresh()
    second = replace(make_workspace("second"), earlier=(str(first.beside()),))
    made = lab.run(second)
    assert_equal_to(whole, lab, second, made)
    assert [step for step, _ in recorder.logged] == [0, 1, 2, 3, 4, 5]
    # With a save of its own the earlier builder's are of no use.
    assert not first.resumable(SAVES)[0].exists()


def test_a_resumed_step_has_the_moments_the_version_and_the_rate_of_its_number(
    whole: Whole, lab: Lab, workspace: Workspace
) -> None:
    lab.book.fail("forward_backward", 6, DEATH)
    lab.run(workspace)
    after = lab.book.verbs()[lab.book.verbs().index("load") :]
    assert after[:3] == ["load", "weights", "update_weights"]
    (load,) = lab.book.of("load")
    assert load.arguments["step"] == 4  # two minibatches of each of two steps
    assert load.arguments["folder"].name == "step-00000002"
    versions = [call.arguments["version"] for call in lab.book.of("update_weights")]
    assert versions == [1, 2, 2, 3, 4, 5]
    # The first half of step 3 was done before the death; the whole of it after.
    found = [call.arguments["learning_rate"] for call in lab.book.of("optim_step")]
    assert found[-6:] == [rate for step in (3, 4, 5) for rate in whole.rates[step]]


def test_a_training_that_ended_before_its_commit_is_not_done_again(
    whole: Whole, lab: Lab, make_workspace: Callable[..., Workspace]
) -> None:
    first = make_workspace("first")
    lab.run(first)
    lab.fresh()
    second = replace(make_workspace("second"), earlier=(str(first.beside()),))
    made = lab.run(second)
    assert lab.book.verbs() == []
    assert_equal_to(whole, lab, second, made)


@pytest.mark.parametrize(("allowed", "deaths"), [(0, 1), (1, 2), (2, 3)])
def test_more_deaths_than_allowed_end_the_build_with_both_numbers(
    lab: Lab, make_workspace: Callable[..., Workspace], allowed: int, deaths: int
) -> None:
    for number in range(1, deaths + 1):
        lab.book.fail("optim_step", number, DEATH)
    work = make_workspace(machines=ClusterConfig(max_restarts=allowed))
    told = rf"^{DEATH}; workers died {deaths} times, cluster.max_restarts = {allowed}; run again"
    with pytest.raises(MachineError, match=told):
        lab.run(work)
    assert len(lab.book.of("open_trainers")) == deaths


def test_as_many_deaths_as_allowed_are_survived(
    whole: Whole, lab: Lab, make_workspace: Callable[..., Workspace]
) -> None:
    for number in (1, 4):
        lab.book.fail("optim_step", number, DEATH)
    work = make_workspace(machines=ClusterConfig(max_restarts=2))
    assert_equal_to(whole, lab, work, lab.run(work))


def test_a_worker_that_is_alive_and_failed_is_not_tried_again(
    lab: Lab, workspace: Workspace
) -> None:
    lab.book.fail("optim_step", 1, DeadlineError("trainer 0 did not answer"))
    with pytest.raises(DeadlineError):
        lab.run(workspace)
    assert len(lab.book.of("open_trainers")) == 1


def test_saves_of_another_folder_are_left_alone_until_there_is_one_of_ones_own(
    lab: Lab, make_workspace: Callable[..., Workspace]
) -> None:
    first = make_workspace("first")
    lab.book.fail("sample", 7, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        lab.run(first)
    saves: Path = first.resumable(SAVES)[0]
    assert [path.name for path in saves.iterdir()] == ["step-00000002"]
    lab.fresh()
    lab.book.fail("optim_step", 3, KeyboardInterrupt())
    second = replace(make_workspace("second"), earlier=(str(first.beside()),))
    with pytest.raises(KeyboardInterrupt):
        lab.run(second)
    assert [path.name for path in saves.iterdir()] == ["step-00000002"]

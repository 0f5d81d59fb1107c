"""What is killed is continued, to the last bit, and each step stands in the log once."""

import json
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.line.runs import (
    artifact,
    descendants,
    history,
    ingot,
    metrics,
    start,
    step_log,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

STEPS = 60
WORDS = ("smoke", "--set", f"pretrain.steps={STEPS}", "--set", "pretrain.checkpoint_every_steps=10")


def prepare(folder: Path) -> Path:
    """Build the corpus, so that the next command begins with pretraining."""
    folder.mkdir()
    done = ingot(folder, "run", *WORDS, "--only", "data")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Losses of a run that nothing disturbed, those on held-out text among them."""
    folder = prepare(tmp_path_factory.mktemp("crash") / "calm")
    done = ingot(folder, "run", *WORDS, "--only", "pretrain")
    assert done.returncode == 0, done.stdout + done.stderr
    found = history(folder, "pretrain")
    assert found["held_out"]["step"] == [*range(0, STEPS, 8), STEPS]
    return found


def assert_equal_to(calm: dict[str, Any], folder: Path) -> None:
    lines = metrics(folder, "pretrain")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert history(folder, "pretrain") == calm
    assert artifact(folder, "pretrain")[1]["facts"]["final_loss"] == calm["loss"][-1]


def test_a_killed_rank_is_replaced_and_the_same_run_goes_on(
    uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    folder = prepare(tmp_path / "rank")
    running = start(folder, "run", *WORDS, "--only", "pretrain")
    wait_for(lambda: len(metrics(folder, "pretrain")) > 12, "12 steps")
    ranks = descendants(running.pid, "RayTrainWorker")
    assert len(ranks) == 2
    os.kill(ranks[1].pid, signal.SIGKILL)
    assert running.wait(timeout=240) == 0, (folder / "output.txt").read_text()
    assert_equal_to(uninterrupted, folder)


def test_a_killed_driver_leaves_a_run_that_the_next_command_continues(
    uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    folder = prepare(tmp_path / "driver")
    running = start(folder, "run", *WORDS, "--only", "pretrain")
    wait_for(lambda: len(metrics(folder, "pretrain")) > 12, "12 steps")
    running.send_signal(signal.SIGKILL)
    running.wait(timeout=30)
    again = ingot(folder, "run", *WORDS, "--only", "pretrain")
    assert again.returncode == 0, again.stdout + again.stderr
    assert "continues the interrupted build" in again.stdout
    assert_equal_to(uninterrupted, folder)


def test_an_interrupted_run_says_how_to_go_on_and_does(
    uninterrupted: dict[str, Any], tmp_path: Path
) -> None:
    folder = prepare(tmp_path / "interrupt")
    running = start(folder, "run", *WORDS, "--only", "pretrain")
    wait_for(lambda: len(metrics(folder, "pretrain")) > 12, "12 steps")
    running.send_signal(signal.SIGINT)
    assert running.wait(timeout=60) == 130
    assert "ingot run smoke" in (folder / "output.txt").read_text()
    again = ingot(folder, "run", *WORDS, "--only", "pretrain")
    assert again.returncode == 0, again.stdout + again.stderr
    assert_equal_to(uninterrupted, folder)


def test_a_killed_trainer_or_sampler_of_post_training_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "rl"
    folder.mkdir()
    words = ("smoke", "--set", "posttrain.steps=12")
    for stage in ("data", "pretrain", "posttrain"):
        done = ingot(folder, "run", *words, "--only", stage)
        assert done.returncode == 0, done.stdout + done.stderr
    calm = step_log(folder, "posttrain")
    assert [line["step"] for line in calm] == list(range(13))
    slots = folder / ".ingot" / "artifacts" / "posttrain"

    def again() -> list[dict[str, object]]:
        (found,) = slots.glob("*/g2/*/metrics.jsonl")
        return [json.loads(line) for line in found.read_text().split("\n")[:-1]]

    running = start(folder, "run", *words, "--force", "posttrain")
    for worker, step in (("_TrainWorker", 3), ("_Sampler", 6)):
        wait_for(partial(slot_has, slots, step), f"step {step}")
        os.kill(descendants(running.pid, worker)[0].pid, signal.SIGKILL)
    assert running.wait(timeout=240) == 0, (folder / "output.txt").read_text()
    keys = ("step", "loss", "reward", "grad_norm", "policy_version", "held_out_pass_at_1")
    assert [[line.get(key) for key in keys] for line in again()] == [
        [line.get(key) for key in keys] for line in calm
    ]


def slot_has(slots: Path, step: int) -> bool:
    """Whether the forced rebuild has recorded `step`."""
    found = list(slots.glob("*/g2/*/metrics.jsonl"))
    # Step 0 has a line too, and the last line end closes one.
    return bool(found) and len(found[0].read_text().split("\n")) > step + 1

"""Training and sampling on a device: the CPU's numbers, and no tensor on the wrong side.

On the stand-in of `tests.standin`, each recipe in a process of its own.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster import checkpoint
from cluster.trainer import Trainer
from model.decode import Sample
from tests import standin
from tests.devices import LOSS, batch_of, each_recipe, sampled, trainer_of
from tests.ranks import apart

STEPS = 3
"""Before a save, and after it."""
CLOSE = 1e-4
"""Of float32 sums in another order, through some hundred operations."""

pytestmark = pytest.mark.skipif(bool(standin.MISSING), reason=standin.MISSING)


def train(trainer: Trainer, recipe: str, steps: range, *, on_device: bool) -> Iterator[Tensor]:
    """Each step's loss and norm, and the gradients of the first."""
    for step in steps:
        found = trainer.forward_backward(batch_of(recipe, step, on_device=on_device), LOSS)
        if step == 0:
            yield from gradients(trainer)
        norms = trainer.optim_step(1e-3, indexer_learning_rate=1e-3)
        yield torch.tensor([found["loss"], norms["grad_norm"]])


def gradients(trainer: Trainer) -> Iterator[Tensor]:
    for parameter in trainer.model.parameters():
        if parameter.grad is not None:
            yield standin.on_host(parameter.grad)


def trained_on_host(recipe: str) -> dict[str, Any]:
    trainer = trainer_of(recipe, on_device=False)
    values = list(train(trainer, recipe, range(2 * STEPS), on_device=False))
    return {"values": values, "answers": [plain(a) for a in sampled(trainer.model)]}


def plain(answer: Sample) -> dict[str, Any]:
    return {"token_ids": answer.token_ids, "logprobs": answer.logprobs}


def trained_on_device(recipe: str, folder: Path) -> dict[str, Any]:
    """Steps, a save and as many steps more; then the first step and, from the save, the last."""
    first, last = range(STEPS), range(STEPS, 2 * STEPS)
    with standin.device() as ledger:
        whole = trainer_of(recipe, on_device=True)
        values = list(train(whole, recipe, first, on_device=True))
        whole.save(folder)
        checkpoint.mark_complete(folder, {"step": STEPS})
        values += train(whole, recipe, last, on_device=True)
        later = trainer_of(recipe, on_device=True)
        repeated = list(train(later, recipe, first[:1], on_device=True))
        later.load(folder, step=STEPS)
        state = {
            f"{name} {key}": str(tensor.device)
            for name, parameter in later.model.named_parameters()
            for key, tensor in later.optimizer.state[parameter].items()
        }
        resumed = list(train(later, recipe, last, on_device=True))
        answers = [plain(answer) for answer in sampled(whole.model)]
    weights = zip(whole.model.parameters(), later.model.parameters(), strict=True)
    return {
        "values": values,
        "repeated": repeated,
        "resumed": resumed,
        "weights_repeat": all(
            torch.equal(standin.on_host(ours), standin.on_host(theirs)) for ours, theirs in weights
        ),
        "state": state,
        "answers": answers,
        "refused": ledger.of("mixed devices", "mixed dtypes"),
    }


@pytest.fixture(scope="module", params=each_recipe("tiny"))
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, Any], dict[str, Any]]:
    """(on the host, on the device)."""
    folder = tmp_path_factory.mktemp(request.param)
    on_device = apart(folder / "process", trained_on_device, request.param, folder / "save")
    return trained_on_host(request.param), on_device


def test_losses_gradients_and_norms_are_the_cpus(both: tuple[dict[str, Any], ...]) -> None:
    on_host, on_device = both
    assert len(on_host["values"]) > 2 * STEPS
    largest = max(float(theirs.abs().max()) for theirs in on_host["values"])
    for ours, theirs in zip(on_device["values"], on_host["values"], strict=True):
        # Slopes of some single weights cancel to a thousandth of what they are sums of, or less.
        size = max(float(theirs.abs().max()), 1e-3 * largest)
        assert float((ours - theirs).abs().max()) <= CLOSE * size


def test_no_tensor_lies_on_the_wrong_side(both: tuple[dict[str, Any], ...]) -> None:
    assert both[1]["refused"] == []


def test_what_the_optimiser_knows_is_loaded_to_its_parameter(both: tuple[Any, ...]) -> None:
    state = both[1]["state"]
    assert state
    assert {name: place for name, place in state.items() if place != standin.NPU} == {}


def test_a_step_repeats_to_the_bit(both: tuple[dict[str, Any], ...]) -> None:
    values, repeated = both[1]["values"], both[1]["repeated"]
    assert len(repeated) > 1
    assert all(map(torch.equal, repeated, values))


def test_a_training_that_resumes_repeats_to_the_bit(both: tuple[dict[str, Any], ...]) -> None:
    values, resumed = both[1]["values"], both[1]["resumed"]
    assert len(resumed) == STEPS
    assert all(map(torch.equal, resumed, values[-STEPS:]))
    assert both[1]["weights_repeat"]


def test_answers_are_the_cpus(both: tuple[dict[str, Any], ...]) -> None:
    on_host, on_device = both
    for ours, theirs in zip(on_device["answers"], on_host["answers"], strict=True):
        assert ours["token_ids"] == theirs["token_ids"]
        assert ours["logprobs"] == pytest.approx(theirs["logprobs"], abs=1e-3)

"""Where training and sampling wait for a device, add in any order, or need float64, by place.

The tables hold how often a step of each small recipe may do so, at most, at each place of the
project; a place that is not there may not. A step that waits once is the aim: whoever rids a place
of its waits lowers its row or drops it. `pytest -s` prints what is found, with the lines.

The stand-in of `tests.standin` says what waits; what it cannot see is said there. A first step is
not counted: it makes tables and moments that stay.
"""

from collections.abc import Mapping
from functools import reduce
from itertools import pairwise
from operator import or_
from typing import Any

import pytest
from torch import Tensor

from model.decode import Session
from tests import standin
from tests.devices import LOSS, RECIPES, batch_of, each_recipe, sampled, trainer_of
from tests.ledger import Kind, Ledger
from tests.ranks import apart

pytestmark = pytest.mark.skipif(bool(standin.MISSING), reason=standin.MISSING)

Limits = Mapping[str, tuple[int, ...]]
"""By place, for each of `RECIPES`: tiny, tiny-v3.2, tiny-v4, tiny-engram."""

TRAINING_WAITS: Limits = {
    "cluster/figures.py _words": (1, 1, 1, 1),
    # Of a batch that lies on the device before it is counted.
    "stages/pretrain/objective.py PretrainLoss.counts": (2, 2, 2, 2),
}
DECODING_WAITS: Limits = {"model/decode.py _read": (1, 1, 1, 1)}
TRAINING_ATOMICS: Limits = {}
FLOAT64: set[str] = set()
"""Places that make tensors of a type that NPUs lack."""

WAITS: tuple[Kind, ...] = ("sync", "upload")
PROMPTS = ([5] * 13, [7] * 14)
"""Every kind of compressed block ends within the next steps, one row's before the other's."""


def steps_of(recipe: str) -> dict[str, Any]:
    """What the ledger has of a second training step, and of decoding steps."""
    begins: list[int] = []
    step = Session.step

    def marked(self: Session, tokens_B: Tensor) -> Tensor:
        begins.append(len(ledger.notes))
        logits_BV: Tensor = step(self, tokens_B)
        return logits_BV

    with standin.device() as ledger, pytest.MonkeyPatch.context() as patch:
        trainer = trainer_of(recipe, on_device=True)
        for number in range(2):
            ledger.clear()
            trainer.train_step(batch_of(recipe, number, on_device=True), LOSS, 1e-3)
        training = Ledger(list(ledger.notes))
        ledger.clear()
        patch.setattr(Session, "step", marked)
        sampled(trainer.model, PROMPTS, new_tokens=6)
    # From one token's pass to the next one's.
    tokens = [Ledger(ledger.notes[begin:end]) for begin, end in pairwise(begins)]
    most = reduce(or_, (token.counts(*WAITS) for token in tokens))
    return {
        "training": dict(training.counts(*WAITS)),
        "atomics": dict(training.counts("atomics")),
        "float64": [*training.counts("float64"), *ledger.counts("float64")],
        "training lines": training.of(*WAITS, "atomics"),
        "decoding": dict(most),
        "decoding lines": tokens[-1].of(*WAITS),
    }


@pytest.fixture(scope="module", params=each_recipe("tiny", "tiny-v4"))
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of one recipe, under `recipe`."""
    recipe: str = request.param
    steps: dict[str, Any] = apart(tmp_path_factory.mktemp(recipe), steps_of, recipe)
    return {"recipe": recipe} | steps


def beyond(limits: Limits, recipe: str, found: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """(found, allowed) of each place that does more than it may."""
    column = RECIPES.index(recipe)
    print(f"\n{recipe}: {sum(found.values())}", *sorted(found.items()), sep="\n  ")
    allowed = {place: limits[place][column] if place in limits else 0 for place in found}
    return {p: (count, allowed[p]) for p, count in found.items() if count > allowed[p]}


def test_a_training_step_waits_no_more_than_it_may(found: dict[str, Any]) -> None:
    waits = found["training"]
    assert beyond(TRAINING_WAITS, found["recipe"], waits) == {}, found["training lines"]


def test_a_training_step_adds_in_a_fixed_order(found: dict[str, Any]) -> None:
    atomics = found["atomics"]
    assert beyond(TRAINING_ATOMICS, found["recipe"], atomics) == {}, found["training lines"]


def test_a_token_waits_no_more_than_it_may(found: dict[str, Any]) -> None:
    waits = found["decoding"]
    assert waits, "whoever reads a token waits for it"
    assert beyond(DECODING_WAITS, found["recipe"], waits) == {}, found["decoding lines"]


def test_tensors_of_the_device_have_types_that_it_knows(found: dict[str, Any]) -> None:
    assert set(found["float64"]) <= FLOAT64

"""Steps of decoding on a device are the same operations on the same shapes, so that they can be
recorded once and replayed; on the stand-in of `tests.standin`.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from model.decode import SHORTEST_REACH, Session
from tests import standin
from tests.devices import each_recipe, trainer_of
from tests.ranks import apart

pytestmark = pytest.mark.skipif(bool(standin.MISSING), reason=standin.MISSING)

LENGTHS = (5, 13)
"""Of two rows, whose blocks end at different steps."""
STEPS = 20
"""Enough to end a block of every kind that ends within `SHORTEST_REACH` tokens."""


class Operations(TorchDispatchMode):
    """What is done, on tensors of which shapes and types."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.done: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        told = [described(one) for one in (*args, *(kwargs or {}).values())]
        self.done.append(f"{func}({', '.join(told)})")
        return func(*args, **(kwargs or {}))


def described(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(described, value))}]"
    return str(value)


def steps_of(recipe: str) -> list[list[str]]:
    """The operations of each of the steps that follow each other."""
    found = []
    with standin.device(), torch.no_grad():
        model = trainer_of(recipe, on_device=True).model.eval()
        session = Session(model, rows=len(LENGTHS), tokens=2 * SHORTEST_REACH)
        session.join([[7] * length for length in LENGTHS])
        tokens_B = standin.to_device(torch.tensor([3, 4]))
        session.step(tokens_B)  # makes the tables that stay
        for _ in range(STEPS):
            with Operations() as operations:
                session.step(tokens_B)
            found.append(operations.done)
    return found


@pytest.mark.parametrize("recipe", each_recipe("tiny", "tiny-v4"))
def test_steps_of_one_reach_are_the_same_operations(recipe: str, tmp_path: Path) -> None:
    first, *others = apart(tmp_path, steps_of, recipe)
    assert len(first) > 50
    for number, other in enumerate(others):
        assert differences(first, other) == [], number


def differences(first: Sequence[str], other: Sequence[str]) -> list[tuple[str, str]]:
    """The first few operations that are not the same."""
    assert len(first) == len(other)
    return [pair for pair in zip(first, other, strict=True) if pair[0] != pair[1]][:3]

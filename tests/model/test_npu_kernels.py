"""Whether Ascend's NPUs have a kernel for what training and sampling ask of them."""

from pathlib import Path
from typing import Any

import pytest

from tests import standin
from tests.devices import LOSS, RECIPES, batch_of, sampled, trainer_of
from tests.npu_dispatch import missing, without_kernel
from tests.ranks import apart

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(standin.MISSING), reason=standin.MISSING),
]

ON_THE_HOST: dict[str, str] = {}
"""Operations without a kernel, and why they may be computed on the host."""


def operations_of(recipe: str) -> list[str]:
    """Of two training steps and of sampling."""
    with standin.device() as ledger:
        trainer = trainer_of(recipe, on_device=True)
        for step in range(2):
            trainer.train_step(batch_of(recipe, step, on_device=True), LOSS, 1e-3)
        sampled(trainer.model, new_tokens=16)
    return sorted(ledger.operations)


@pytest.fixture(scope="module", autouse=True)
def table() -> None:
    if reason := missing():
        pytest.skip(reason)


def test_the_table_tells_kernels_from_their_lack() -> None:
    asked = ["aten::mm", "aten::nextafter", "aten::reshape"]
    assert without_kernel(asked) == ["aten::nextafter"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_operation_has_a_kernel_on_the_npu(recipe: str, tmp_path: Path) -> None:
    found: list[Any] = apart(tmp_path, operations_of, recipe)
    assert len(found) > 50
    lacking = without_kernel(found)
    assert set(lacking) <= set(ON_THE_HOST)

"""Where a training step in FP8 waits for a device: counted on the stand-in, which has no FP8.

Casts are the slow twin's, products of experts are made here from what the device knows of them; the
kernels that do both on GPUs are launched by code that asks the host for as little.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.models import Computing
from cluster.trainer import Trainer
from configs.reading import load_recipe
from model.fp8 import scheme
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized
from model.fp8.recorder import Recorder, Tally, tally
from model.fp8.reference import Reference
from model.fp8.scheme import Numerics
from model.transformer import Transformer
from tests import standin
from tests.devices import LOSS, batch_of
from tests.ledger import Kind
from tests.ranks import apart

pytestmark = pytest.mark.skipif(bool(standin.MISSING), reason=standin.MISSING)

WAITS: tuple[Kind, ...] = ("sync", "upload")
OF_A_STEP = {
    "cluster/figures.py _words": 1,
    # Of a batch that lies on the device before it is counted.
    "stages/pretrain/objective.py PretrainLoss.counts": 2,
}
"""Those of any training step, which are not of FP8."""


class OnDevice(Reference):
    """The slow twin, whose products of experts do not ask for counts."""

    def grouped_matmul(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        rows, matrices = self.dequantize(a), self.dequantize(b)
        return torch.bmm(rows[:, None], matrices.index_select(0, groups.of_rows)).squeeze(1)

    def grouped_outer(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        every_E = torch.arange(len(groups), device=groups.of_rows.device)
        mine_ER1 = (groups.of_rows == every_E[:, None]).float()[:, :, None]
        return (self.dequantize(a) * mine_ER1).mT @ self.dequantize(b)


def steps_of(recipe: str) -> dict[str, Any]:
    """What the ledger and the recorder have of a second training step, a counted one."""
    with standin.device() as ledger, pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheme, "backend_for", lambda device, wanted: OnDevice())
        trainer = trainer_of(recipe)
        for number in range(2):
            ledger.clear()
            batch = batch_of(recipe, number, on_device=True)
            trainer.train_step(batch, LOSS, 1e-3, counting=True)
        tallies = trainer.fp8_tallies()
        step = dict(ledger.counts(*WAITS))
        lines = ledger.of(*WAITS, "atomics")
        atomics = dict(ledger.counts("atomics"))
        ledger.clear()
        assert trainer.fp8_tallies() == tallies
        assert ledger.counts(*WAITS) == {}
        recorder = trainer.numerics.recorder
        recorder.start(counting=False)
        trainer.forward_backward(batch, LOSS)
        ledger.clear()
        assert recorder.first_not_finite() is None
        asked = dict(ledger.counts(*WAITS))
    assert len(tallies) > 15
    assert all(one.nonzero > 1000 for one in tallies.values())
    return {"step": step, "atomics": atomics, "lines": lines, "asked": asked}


def trainer_of(recipe: str) -> Trainer:
    """In FP8, of the recipe's shapes, on the device."""
    asked = load_recipe(recipe)
    assert asked.pretrain is not None
    numerics = Numerics("fp8", recorder=Recorder())
    model = Transformer(asked.model, precision=numerics).initialize(0).train()
    standin.move(model)
    return Trainer(
        model,
        Computing(numerics, "fp8", "fp8"),
        optim=asked.pretrain.optim,
        balance=asked.pretrain.balance,
    )


def _numbers(one: Tally) -> tuple[float, ...]:
    return one.nonzero, one.clipped, one.flushed, one.lost, one.low, one.high


@pytest.fixture(scope="module", params=["tiny", pytest.param("tiny-v4", marks=pytest.mark.slow)])
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Any]:
    """Of one recipe, under `recipe`."""
    recipe: str = request.param
    steps: dict[str, Any] = apart(tmp_path_factory.mktemp(recipe), steps_of, recipe, seconds=240)
    return {"recipe": recipe} | steps


def test_fp8_adds_one_wait_to_a_counted_step(found: dict[str, Any]) -> None:
    """Experts' counts, quantising and tallies ask nothing; reading the tallies is one wait."""
    allowed = OF_A_STEP | {"model/fp8/recorder.py _read": 1}
    beyond = {p: count for p, count in found["step"].items() if count > allowed.get(p, 0)}
    assert beyond == {}, found["lines"]


def test_fp8_adds_in_a_fixed_order(found: dict[str, Any]) -> None:
    assert not [place for place in found["atomics"] if "fp8" in place], found["lines"]


def test_the_first_tensor_that_is_not_finite_is_found_in_one_wait(found: dict[str, Any]) -> None:
    assert found["asked"] == {"model/fp8/recorder.py Recorder.first_not_finite": 1}


def tallies_by_side() -> list[tuple[list[float], list[float]]]:
    """(a device's tally, the host's) of tensors with tiles too small and one not finite."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 200, generator=generator)
    x = torch.ldexp(x, (8 * torch.randn(300, 200, generator=generator)).round().int())
    x[:128, :128], x[::7, ::5], x[200, 3] = 1e-43, 0, torch.nan
    counts, slow, found = torch.tensor([0, 130, 1, 169]), Reference(), []
    with standin.device() as ledger:
        on_device = Groups.counted(standin.to_device(counts), 300)
        for tile in (ACTIVATION, ALONG_TOKENS, BLOCK):
            for groups in (None, Groups.counted(counts, 300)):
                q = slow.quantize(x, tile, groups=groups)
                there = standin.to_device(x)
                ledger.clear()
                q_there = slow.quantize(there, tile, groups=None if groups is None else on_device)
                assert ledger.counts(*WAITS) == {}
                pair = tally(there, q_there), tally(x, q)
                found.append((_numbers(pair[0]), _numbers(pair[1])))
    return [(list(one), list(other)) for one, other in found]


def test_tallies_of_a_device_are_those_of_the_host(tmp_path: Path) -> None:
    pairs = apart(tmp_path, tallies_by_side)
    assert len(pairs) == 6
    for of_device, of_host in pairs:
        assert of_device == of_host
        nonzero, _, flushed, lost, low, high = of_host
        assert nonzero > flushed > lost > 0
        assert low < high

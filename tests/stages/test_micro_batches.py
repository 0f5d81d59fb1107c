"""A step's rows in parts, one after another: the gradients and figures of the whole."""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.trainer import Batch, LossSpec, Trainer, build_trainer, parted
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.reading import load_recipe
from configs.train import BalanceConfig, OptimConfig, Precision
from model.passes import IndexerPhase
from stages.pretrain.objective import PretrainLoss
from tests.memory import saved_tensors
from tests.ranks import on_ranks
from tests.references import TINY, random_tokens, tiny_v4, tiny_v32

ROWS, LENGTH = 8, 24
OPTIM = OptimConfig(learning_rate=1e-2, epsilon=1e-3, max_grad_norm=0.5)
MODELS: dict[str, tuple[ModelConfig, IndexerPhase]] = {
    "v3": (TINY, "off"),
    "v3.2": (tiny_v32(), "sparse"),
    "v4": (tiny_v4(), "sparse"),
}


def loss(phase: IndexerPhase) -> PretrainLoss:
    return PretrainLoss(0.3, 0.05, attend_across_documents=False, indexer=phase)


def batch() -> dict[str, Tensor]:
    """Rows of documents that end at different places, so that parts count differently."""
    tokens = random_tokens(ROWS, LENGTH)
    for row in range(ROWS):
        tokens[row, row :: 7 + row] = 0
    return {"tokens": tokens}


def trainer(config: ModelConfig, precision: Precision = "high") -> Trainer:
    return build_trainer(config, optim=OPTIM, balance=BalanceConfig(), precision=precision, seed=0)


@pytest.mark.parametrize("name", MODELS)
def test_gradients_in_float64_are_those_of_the_whole(name: str) -> None:
    config, phase = MODELS[name]
    found: list[dict[str, Tensor]] = []
    figures: list[dict[str, Any]] = []
    for parts in (1, 4):
        one = trainer(config)
        one.model.double()
        figures.append(one._backward(parted(batch(), parts), loss(phase), counting=False))
        found.append(one._grads() | {"load": one.load_LE})
    whole, added = found
    assert set(whole) == set(added)
    assert torch.equal(whole.pop("load"), added.pop("load"))
    for parameter, grad in whole.items():
        largest = float(grad.abs().max())
        torch.testing.assert_close(added[parameter], grad, rtol=0, atol=1e-9 * largest + 1e-15)
    for key, value in figures[0].items():
        assert float(figures[1][key]) == pytest.approx(float(value), rel=1e-9)


def steps(one: Trainer, parts: int) -> list[dict[str, Any]]:
    given = batch()
    rows = {name: tensor.chunk(one.world)[one.rank] for name, tensor in given.items()}
    return [
        one.train_step(rows, loss("off"), 1e-2, counting=counting, micro_batches=parts)
        for counting in (False, True)
    ]


@pytest.mark.parametrize("precision", ["high", "fp8"])
def test_steps_are_those_of_the_whole(precision: Precision) -> None:
    """In FP8 the scales of weights' gradients are those of 128 tokens, and in parts of others: what
    is rounded by up to 1/16 differs, and after the first update everything does."""
    whole, added = (steps(trainer(TINY, precision), parts) for parts in (1, 4))
    tolerance, alike = (1e-5, 2) if precision == "high" else (1e-2, 1)
    for one, other in list(zip(whole, added, strict=True))[:alike]:
        assert set(one) == set(other)
        for name in ("loss", "grad_norm", "next_token_loss"):
            assert other[name] == pytest.approx(one[name], rel=tolerance)
    assert whole[0]["expert_load"] == added[0]["expert_load"]


def on_rank() -> list[float]:
    return [report["loss"] for report in steps(trainer(TINY), 2)]


def test_ranks_take_parts_together(tmp_path: Path) -> None:
    expected = [report["loss"] for report in steps(trainer(TINY), 1)]
    for found in on_ranks(2, tmp_path, on_rank):
        assert found == pytest.approx(expected, rel=1e-5)


class Watching:
    """A trainer's forward pass that looks, when a part begins, whether anything of the part before
    is left."""

    def __init__(self, one: Trainer) -> None:
        self.forward = one._forward
        self.of_model = {id(own) for own in (*one.model.parameters(), *one.model.buffers())}
        self.before: list[weakref.ref[Tensor]] = []
        self.kept: list[int] = []

    def __call__(
        self, part: Batch, loss: LossSpec, totals: Mapping[str, float]
    ) -> tuple[Tensor, Mapping[str, float | Tensor]]:
        """The trainer's own."""
        assert not any(one() is not None for one in self.before)
        with saved_tensors() as tensors:
            found = self.forward(part, loss, totals)
        own = [one for one in tensors if one.is_floating_point() and id(one) not in self.of_model]
        self.before = [weakref.ref(one) for one in own]
        self.kept.append(sum(one.numel() for one in own))
        return found


def test_one_part_is_kept_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    for parts in (1, 4):
        one = trainer(TINY)
        watching = Watching(one)
        monkeypatch.setattr(one, "_forward", watching)
        one.train_step(batch(), loss("off"), 1e-2, micro_batches=parts)
        assert len(watching.kept) == parts
        kept.append(max(watching.kept))
    assert kept[1] < 0.3 * kept[0]


def test_parts_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"cluster\.micro_batches = 3 does not divide 8 rows"):
        parted(batch(), 3)
    assert [part["tokens"].shape[0] for part in parted(batch(), 4)] == [2, 2, 2, 2]


def test_a_recipe_whose_rows_do_not_divide_is_refused() -> None:
    load_recipe("tiny", sets=["cluster.micro_batches=2"])
    with pytest.raises(ConfigError, match=r"cluster\.trainers \* cluster\.micro_batches = 10"):
        load_recipe("tiny", sets=["cluster.micro_batches=5"])

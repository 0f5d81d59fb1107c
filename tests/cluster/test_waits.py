"""A training step reads no number of its own from where it computes, but for a few at its end."""

import math
from collections import Counter

import pytest
import torch

from cluster.figures import fetch, read
from cluster.trainer import build_trainer
from configs.train import BalanceConfig
from stages.pretrain.objective import PretrainLoss
from tests.cluster.jobs import OPTIM
from tests.references import TINY
from tests.waits import Waits

LOSS = PretrainLoss(mtp_weight=0.3, balance_weight=1e-4, attend_across_documents=False)


def test_numbers_come_in_one_copy_and_are_what_they_were() -> None:
    a, c = torch.tensor(0.1), torch.tensor(1 / 3)
    values: dict[str, float | torch.Tensor] = {"a": a, "b": 2.5, "c": c}
    with Waits() as waits:
        found = read(values)
    assert not waits.places
    assert found == {"a": float(a), "b": 2.5, "c": float(c)}
    wide = torch.tensor(0.1, dtype=torch.float64)
    assert read({"a": wide, "b": torch.tensor(0.5)}) == {"a": 0.1, "b": 0.5}
    assert read({"b": 2.5}) == {"b": 2.5}


def test_a_step_waits_for_what_the_loss_counts_of_its_batch_alone() -> None:
    trainer = build_trainer(
        TINY, optim=OPTIM, balance=BalanceConfig(bias_update_speed=0.01), precision="high", seed=0
    )
    batch = {"tokens": torch.randint(3, TINY.vocab_size, (4, 12))}
    trainer.forward_backward(batch, LOSS)
    trainer.optim_step(1e-3)
    with Waits() as waits:
        metrics = trainer.forward_backward(batch, LOSS)
        metrics |= trainer.optim_step(1e-3)
    assert {"loss", "mtp_loss", "grad_norm", "imbalance", "expert_load"} <= metrics.keys()
    by_file = Counter[str]()
    for place, times in waits.places.items():
        by_file[place.partition(":")[0]] += times
    # Two counts of scored targets, of a batch that the host has.
    assert by_file == {"stages/pretrain/objective.py": 2}, waits.places


def test_a_step_in_one_is_its_two_halves_to_the_last_bit() -> None:
    balance = BalanceConfig(bias_update_speed=0.01)
    whole, halves = (
        build_trainer(TINY, optim=OPTIM, balance=balance, precision="high", seed=0)
        for _ in range(2)
    )
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        batch = {"tokens": torch.randint(3, TINY.vocab_size, (4, 12), generator=generator)}
        first = halves.forward_backward(batch, LOSS)
        assert whole.train_step(batch, LOSS, 1e-3) == first | halves.optim_step(1e-3)
    for one, other in zip(whole.model.parameters(), halves.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_what_is_fetched_keeps_its_type_and_shape() -> None:
    """Counts beyond float32, numbers of each width, and one that is none."""
    values: dict[str, float | torch.Tensor] = {
        "counts": torch.tensor([[2**40 + 1, 3], [-1, 0]]),
        "narrow": torch.tensor(1.5, dtype=torch.bfloat16),
        "wide": torch.tensor([0.1, math.inf], dtype=torch.float64),
        "lost": torch.tensor(math.nan),
        "known": 0.25,
    }
    found = fetch(values)
    assert found["counts"].tolist() == [[2**40 + 1, 3], [-1, 0]]
    assert found["wide"].tolist() == [0.1, math.inf]
    assert (float(found["narrow"]), float(found["known"])) == (1.5, 0.25)
    assert math.isnan(float(found["lost"]))


def test_the_count_sees_a_read() -> None:
    with Waits() as waits:
        assert LOSS.counts({"tokens": torch.ones(1, 4, dtype=torch.long)})["sequences"] == 1
    assert sum(waits.places.values()) == 2
    with pytest.raises(AssertionError, match="nobody"), Waits():
        float(torch.ones(()))

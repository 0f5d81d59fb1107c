"""What FP8 costs on a CPU: one training step in either precision, side by side in one process."""

import statistics
import time

import pytest
import torch

from cluster.trainer import Trainer
from configs.recipe import load_recipe
from stages.pretrain.objective import PretrainLoss

pytestmark = pytest.mark.slow

ROUNDS = 7


def seconds(trainer: Trainer, loss: PretrainLoss, batch: dict[str, torch.Tensor]) -> float:
    begin = time.perf_counter()
    trainer.forward_backward(batch, loss)
    trainer.optim_step(1e-4)
    return time.perf_counter() - begin


def test_training_tokens_per_second_of_tiny_in_fp8_against_float32() -> None:
    torch.set_num_threads(1)
    recipe = load_recipe("tiny")
    train = recipe.pretrain
    loss = PretrainLoss(train.mtp_loss_weight, train.balance.sequence_loss_weight, False)
    trainers = {
        precision: Trainer(
            recipe.model, optim=train.optim, balance=train.balance, precision=precision, seed=0
        )
        for precision in ("fp8", "high")
    }
    shape = (8, recipe.data.sequence_tokens)
    generator = torch.Generator().manual_seed(0)
    batch = {"tokens": torch.randint(2, recipe.model.vocab_size, shape, generator=generator)}
    times: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(ROUNDS):
        for name, trainer in trainers.items():
            times[name].append(seconds(trainer, loss, batch))
    median = {name: statistics.median(taken[1:]) for name, taken in times.items()}
    tokens = shape[0] * shape[1]
    ratios = [fp8 / high for fp8, high in zip(times["fp8"], times["high"], strict=True)]
    ratio = statistics.median(ratios[1:])
    print(f"\nfp8 {tokens / median['fp8']:,.0f} tokens/s, float32 {tokens / median['high']:,.0f}")
    print(f"an fp8 step takes {ratio:.2f} times a float32 step (medians of {ROUNDS - 1})")
    assert ratio > 1, "emulated FP8 cannot be quicker than the float32 it emulates it with"

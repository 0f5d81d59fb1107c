"""The small recipes' models, trained and sampled on the host or on the stand-in device."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from cluster.models import Computing
from cluster.trainer import Batch, Trainer
from configs.reading import load_recipe
from model.decode import Sample, sample
from model.drawing import Drawing
from model.fp8.scheme import Numerics
from model.transformer import Transformer
from stages.pretrain.objective import PretrainLoss
from tests import standin

RECIPES = ("tiny", "tiny-v3.2", "tiny-v4", "tiny-engram")
ROWS, TOKENS = 2, 64
PROMPTS = ([5, 9, 3], [8, 2, 7, 6, 5], list(range(1, 41)))
LOSS = PretrainLoss(
    mtp_weight=0.3, balance_weight=1e-4, attend_across_documents=False, indexer="sparse"
)


def each_recipe(*quick: str) -> list[Any]:
    """All recipes as parameters of a test, those that are not `quick` among the slow ones."""
    return [pytest.param(r, marks=() if r in quick else pytest.mark.slow) for r in RECIPES]


def trainer_of(recipe: str, *, on_device: bool) -> Trainer:
    """In float32, of the recipe's shapes."""
    asked = load_recipe(recipe)
    assert asked.pretrain is not None
    model = Transformer(asked.model).initialize(0).train()
    if on_device:
        standin.move(model)
    computing = Computing(Numerics(), "high precision", "high")
    trainer = Trainer(model, computing, optim=asked.pretrain.optim, balance=asked.pretrain.balance)
    if on_device:
        trainer.load_LE = trainer.load_LE.to(standin.NPU)
    return trainer


def batch_of(recipe: str, step: int, *, on_device: bool) -> Batch:
    """Two rows of several documents each."""
    generator = torch.Generator().manual_seed(step)
    tokens_BS = torch.randint(
        load_recipe(recipe).model.vocab_size, (ROWS, TOKENS), generator=generator
    )
    tokens_BS[:, :: TOKENS // 3] = 0
    return {"tokens": standin.to_device(tokens_BS) if on_device else tokens_BS}


def sampled(
    model: Transformer, prompts: Sequence[Sequence[int]] = PROMPTS, *, new_tokens: int = 4
) -> list[Sample]:
    """Answers, two at a time, of which the last begins where another ends."""
    return sample(
        model,
        prompts,
        max_new_tokens=new_tokens,
        drawing=Drawing(0.9, top_k=50, top_p=0.95),
        stop_tokens=(),
        seeds=range(len(prompts)),
        max_rows=2,
    )

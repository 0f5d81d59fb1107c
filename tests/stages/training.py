"""Pretraining in the test's own process: its only rank, a small model and a corpus of few rows."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch.distributed as dist
from numpy.typing import NDArray

from cluster import fit as fit_module
from cluster.fit import FitJob
from cluster.groups import join_group
from cluster.trainer import build_trainer
from configs.model import AnyModelConfig
from configs.parallel import ClusterConfig
from configs.train import PretrainConfig, PretrainSpec
from stages.artifacts import Corpus
from stages.pretrain import loop
from stages.pretrain.held_out_text import HeldOutText, held_out_text
from stages.pretrain.loop import loss_at
from stages.shards import write_rows
from tests.references import TINY

ROW_TOKENS = 12
SETTINGS: dict[str, Any] = {
    "steps": 4,
    "batch_sequences": 4,
    "warmup_steps": 1,
    "checkpoint_every_steps": 2,
    "evaluate_every_steps": 2,
    "evaluate_rows": 5,
    "precision": "high",
    "optim": {"learning_rate": 1e-2},
}


def spec(model: AnyModelConfig = TINY, seed: int = 0, **changes: Any) -> PretrainSpec:
    train = PretrainConfig.model_validate(SETTINGS | changes)
    return PretrainSpec(seed=seed, model=model, pretrain=train)


def fit_here(job: FitJob, machines: ClusterConfig, home: str, notes: str) -> Path:
    """What Ray's one worker would do, in this process."""
    job.saves.root.mkdir(parents=True)
    Path(notes).mkdir()
    Path(notes, "state.json").touch()
    fit_module._steps(job, fit_module.desk_of(job))
    saved = job.saves.newest()
    assert saved is not None
    return saved[0]


@contextmanager
def one_rank(folder: Path) -> Iterator[None]:
    """Let this process be the only rank of a group, in which the pretrain stage trains."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "GLOO_SOCKET_IFNAME", "lo")
        patch.setattr(loop, "fit", fit_here)
        join_group(f"file://{folder}/rendezvous", 0, 1, 60)
        try:
            yield
        finally:
            dist.destroy_process_group()


def write_corpus(folder: Path, held_out: Mapping[str, NDArray[np.int64]]) -> Corpus:
    """Sixteen random training rows, and the given held-out rows of each source."""
    tokens = np.random.default_rng(0).integers(2, TINY.vocab_size, size=(16, ROW_TOKENS))
    write_rows(folder / "train", tokens)
    for name, rows in held_out.items():
        write_rows(folder / "held_out" / name, rows)
    (folder / "tokenizer.json").write_text("{}")
    return Corpus(
        uri=str(folder),
        train_rows=16,
        held_out_rows={name: len(rows) for name, rows in held_out.items()},
        sequence_tokens=ROW_TOKENS,
        vocab_size=TINY.vocab_size,
        train_problems=0,
        held_out_problems=0,
    )


def packed_rows(count: int, *, seed: int) -> NDArray[np.int64]:
    """Held-out rows [N, S] of short documents, the last of which ends in padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(2, TINY.vocab_size, size=(count, ROW_TOKENS))
    begins = rng.random(tokens.shape) < 0.15
    tokens[begins] = 0
    tokens[:, :-1][begins[:, 1:] & ~begins[:, :-1]] = 1
    tokens[-1, ROW_TOKENS // 2 :] = 0
    return tokens


def text_of(config: PretrainSpec, corpus: Corpus) -> HeldOutText:
    found = held_out_text(config, corpus, partial(loss_at, config.pretrain))
    assert found is not None
    return found


def measure_on_rank(corpus: Corpus) -> dict[str, float]:
    """What ranks measure of a fresh model together."""
    config = spec(evaluate_rows=7)
    text = text_of(config, corpus)
    trainer = build_trainer(
        TINY,
        optim=config.pretrain.optim,
        balance=config.pretrain.balance,
        precision="high",
        seed=0,
    )
    batches = list(text.batches(rank=trainer.rank, world=trainer.world))
    sums = trainer.measure(batches, partial(text.sums, step=0))
    assert trainer.model.training
    assert not trainer.load_LE.any()
    return {"batches": float(len(batches)), **sums, **text.figures(sums)}

"""Part 8: a training that repeats, and one that resumes, to the last bit."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cluster import checkpoint
from cluster.trainer import Trainer
from model.optim import moments
from tests.bench.gpu.models import TINY, Precision, batch_of, trainer_of
from tests.bench.gpu.rows import Row, attempted
from tests.bench.gpu.setting import Setting

STEPS = 20
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")


def rows(setting: Setting) -> Iterator[Row]:
    """In each precision."""
    for precision in PRECISIONS:
        what = f"{setting.pick(STEPS, 4)} steps of tiny"
        yield from attempted(setting, what, precision, _repeated, what, precision)


@dataclass(frozen=True, slots=True)
class _Run:
    losses: list[float]
    tensors: dict[str, Tensor]
    """Weights and moments, on the host."""


def _train(trainer: Trainer, setting: Setting, steps: range) -> _Run:
    losses = []
    for step in steps:
        batch, loss = batch_of(TINY, setting.pick((16, 128), (2, 32)), documents=4, seed=step)
        losses.append(float(trainer.train_step(batch, loss, 1e-3)["loss"]))
    model = trainer.model
    state = model.state_dict() | moments(trainer.optimizer, model.named_parameters())
    return _Run(losses, {name: tensor.detach().cpu().clone() for name, tensor in state.items()})


def _repeated(setting: Setting, what: str, precision: Precision) -> Iterator[Row]:
    """All steps; all of them again; and the second half from a save after the first."""
    count = setting.pick(STEPS, 4)
    half = count // 2

    def trainer() -> Trainer:
        return trainer_of(TINY, precision, setting.device, drawn=True)

    first = _train(trainer(), setting, range(count))
    again = _train(trainer(), setting, range(count))
    yield _compared(f"{what}, twice", precision, first, again, begin=0)
    interrupted = trainer()
    _train(interrupted, setting, range(half))
    with tempfile.TemporaryDirectory() as folder:
        interrupted.save(Path(folder))
        checkpoint.mark_complete(Path(folder), {"step": half})
        later = trainer()
        later.load(Path(folder), step=half)
    resumed = _train(later, setting, range(half, count))
    yield _compared(f"{what}, resumed after {half}", precision, first, resumed, begin=half)


def _compared(what: str, precision: Precision, first: _Run, other: _Run, *, begin: int) -> Row:
    """How many losses, weights and moments are others."""
    pairs = list(zip(first.losses[begin:], other.losses, strict=True))
    differ = [begin + step for step, (one, two) in enumerate(pairs) if one != two]
    names = [name for name, one in first.tensors.items() if not _equal(one, other.tensors[name])]
    note = f"first in step {differ[0]}" if differ else ""
    more = {"losses": float(len(differ)), "tensors": float(len(names))}
    figure = float(len(differ) + len(names))
    return Row(what, precision, figure, "differ", most=0, more=more, note=note)


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)

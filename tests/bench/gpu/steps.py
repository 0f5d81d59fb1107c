"""Part 6: training steps of a whole model, in bfloat16 and in FP8.

Two models: a billion parameters of which a token meets a quarter, and two layers of DeepSeek-V3's
widths. A step is `Trainer.train_step`. Utilisation is arithmetic by `models.token_flops` over the
step's time, against the best product in bfloat16 that this card was seen to do; in FP8 too, whose
peak is twice that.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch

from cluster.trainer import Batch, Trainer
from configs.model import V3Config
from model.weight_cache import forget
from stages.pretrain.objective import PretrainLoss
from tests.bench.gpu.models import (
    ONE_BILLION,
    SLICE,
    Precision,
    batch_of,
    small,
    token_flops,
    trainer_of,
)
from tests.bench.gpu.profile import Work, work_of
from tests.bench.gpu.rows import SKIPPED, Figure, Row, attempted, ratio, share
from tests.bench.gpu.setting import Setting, best_rate
from tests.losses import part_of

ROUNDS, FIRST = 7, 2
TOP = 6
GIB = 2**30
MODELS: dict[str, tuple[V3Config, tuple[int, int]]] = {
    "1B MoE": (ONE_BILLION, (8, 2048)),
    "slice of V3": (SLICE, (4, 4096)),
}
"""With sequences and tokens of each."""
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp8")


def rows(setting: Setting) -> Iterator[Row]:
    """Each model in each precision; FP8's times beside BF16's."""
    rates: list[Figure] = []
    yield from attempted(setting, "square product, best", "bf16", _peak, rates)
    peak = rates[0] if rates else ""
    for name, (config, shape) in MODELS.items():
        baseline: list[Figure] = []
        for precision in PRECISIONS:
            yield from attempted(
                setting, name, precision, _stepped, name, config, shape, precision, peak, baseline
            )


def _peak(setting: Setting, rates: list[Figure]) -> Iterator[Row]:
    rates.append(best_rate(setting))
    yield Row("square product, best", "bf16", share(rates[0], 1e12), "TFLOP/s")


def _stepped(
    setting: Setting,
    name: str,
    full: V3Config,
    full_shape: tuple[int, int],
    precision: Precision,
    peak: Figure,
    baseline: list[Figure],
) -> Iterator[Row]:
    config, shape = small(full, setting), setting.pick(full_shape, (2, 32))
    trainer = trainer_of(config, precision, setting.device)
    if precision == "fp8" and trainer.numerics.precision != "fp8":
        yield Row(name, precision, f"{SKIPPED}{trainer.computing.products}")
        return
    batch, loss = batch_of(config, shape, documents=1)
    step = partial(trainer.train_step, batch, loss, 1e-4)
    seconds = step_seconds(setting, step)
    if precision == "bf16":
        baseline.append(seconds)
    against = ratio(baseline[0], seconds) if baseline else ""
    tokens = shape[0] * shape[1]
    work = tokens * token_flops(config, shape[1]) / seconds
    yield Row(f"{name}: step", precision, seconds * 1e3, "ms", ratio=against, of="times bf16")
    utilisation = ratio(work, peak)
    more: dict[str, Figure] = {"TFLOP/s": work / 1e12}
    if utilisation != "":
        more["of the best bf16 product"] = utilisation
    yield Row(f"{name}: tokens", precision, tokens / seconds, "tokens/s", more=more)
    yield from _memory(setting, name, precision, trainer, batch, loss)
    if not setting.on_cuda:
        yield Row(f"{name}: launches", precision, f"{SKIPPED}only CUDA tells launches")
        return
    yield from work_rows(name, precision, work_of(setting, step), seconds)


def step_seconds(setting: Setting, step: Callable[[], object]) -> float:
    """The median of steps after the first, by the host's clock: a step ends in a read."""
    taken = []
    for _ in range(FIRST + setting.pick(ROUNDS, 1)):
        setting.wait()
        begin = time.perf_counter()
        step()
        setting.wait()
        taken.append(time.perf_counter() - begin)
    return statistics.median(taken[FIRST:])


def _memory(
    setting: Setting,
    name: str,
    precision: Precision,
    trainer: Trainer,
    batch: Batch,
    loss: PretrainLoss,
) -> Iterator[Row]:
    """Bytes of the models and its optimiser, of copies of weights, of what backward waits for."""
    if not setting.on_cuda:
        yield Row(f"{name}: memory", precision, f"{SKIPPED}only CUDA tells memory")
        return
    forget(trainer.model)
    resident = setting.allocated()
    totals, placed = loss.counts(batch), trainer.backend.place(batch)
    with torch.no_grad():
        part_of(loss, trainer.model, placed, totals)
    copies = setting.allocated() - resident
    value = part_of(loss, trainer.model, placed, totals)[0]
    kept = setting.allocated() - resident - copies
    del value
    setting.reset_peak()
    trainer.train_step(batch, loss, 1e-4)
    yield Row(
        f"{name}: memory at its peak",
        precision,
        setting.peak() / GIB,
        "GiB",
        more={
            "at rest": resident / GIB,
            "copies of weights": copies / GIB,
            "kept for backward": kept / GIB,
        },
    )


def work_rows(name: str, precision: Precision, work: Work, seconds: float) -> Iterator[Row]:
    """Launches, the share of a step's time without any of them at work, and the longest."""
    yield Row(f"{name}: launches", precision, float(work.launches), "a step")
    idle = 1 - work.busy_seconds / seconds
    yield Row(f"{name}: without a kernel", precision, idle, "of a step")
    for kernel, taken in list(work.by_name.items())[:TOP]:
        what = f"{name}: in {kernel[:60]}"
        yield Row(what, precision, taken * 1e3, "ms", ratio=taken / seconds, of="a step")

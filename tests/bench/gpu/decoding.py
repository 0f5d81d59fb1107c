"""Part 7: tokens a second of generation, in bfloat16, one step after another as it is asked for."""

import statistics
import time
from collections.abc import Iterator

import torch

from model.decode import sample
from model.drawing import Drawing
from model.transformer import Transformer
from tests.bench.gpu.models import ONE_BILLION, small, trainer_of
from tests.bench.gpu.profile import work_of
from tests.bench.gpu.rows import Row, attempted
from tests.bench.gpu.setting import Setting

ROWS = (1, 32, 256)
PROMPT, FEW, MANY = 128, 4, 36
"""Tokens of prompts, and of two answers, between which the time of a step is told."""
ROUNDS = 3


def rows(setting: Setting) -> Iterator[Row]:
    """By how many rows take a step together."""
    models: list[Transformer] = []
    yield from attempted(setting, "1B MoE, its answers", "bf16", _made, models)
    for number in setting.pick(ROWS, (1, 3)):
        if models:
            what = f"1B MoE, answers to {number} prompts"
            yield from attempted(setting, what, "bf16", _decoded, what, models[0], number)


def _made(setting: Setting, models: list[Transformer]) -> Iterator[Row]:
    """The trainer keeps copies of weights until they change, as a sampler does."""
    trainer = trainer_of(small(ONE_BILLION, setting), "bf16", setting.device)
    models.append(trainer.model.requires_grad_(False))
    yield from ()


def _decoded(setting: Setting, what: str, model: Transformer, number: int) -> Iterator[Row]:
    few, many = setting.pick((FEW, MANY), (1, 3))
    _answer(setting, model, number, few)
    apart = []
    for _ in range(setting.pick(ROUNDS, 1)):
        short = _seconds(setting, model, number, few)
        apart.append((_seconds(setting, model, number, many) - short) / (many - few))
    step = statistics.median(apart)
    more = {"ms a step": step * 1e3}
    if setting.on_cuda:
        first, last = (
            work_of(setting, lambda tokens=tokens: _answer(setting, model, number, tokens))  # type: ignore[misc]
            for tokens in (few, few + 4)
        )
        more["launches a step"] = (last.launches - first.launches) / 4
        more["without a kernel"] = 1 - (last.busy_seconds - first.busy_seconds) / 4 / step
    yield Row(what, "bf16, eager", number / step, "tokens/s", more=more)


def _seconds(setting: Setting, model: Transformer, number: int, tokens: int) -> float:
    setting.wait()
    begin = time.perf_counter()
    _answer(setting, model, number, tokens)
    setting.wait()
    return time.perf_counter() - begin


def _answer(setting: Setting, model: Transformer, number: int, tokens: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = number, setting.pick(PROMPT, 8)
    prompts = torch.randint(2, model.config.vocab_size, shape, generator=generator).tolist()
    sample(
        model,
        prompts,
        max_new_tokens=tokens,
        drawing=Drawing(0.9, top_k=50, top_p=0.95),
        stop_tokens=(),
        seeds=range(number),
    )

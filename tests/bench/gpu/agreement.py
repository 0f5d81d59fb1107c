"""Part 3: `tiny` on the device beside the CPU, what the host waits for, experts by offsets."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from cluster import trainer as trainer_module
from model import decode
from model.decode import sample
from model.drawing import Drawing
from tests.bench.gpu.experts import expert_rows
from tests.bench.gpu.models import TINY, Precision, batch_of, trainer_of
from tests.bench.gpu.rows import SKIPPED, Row, attempted
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.waits import counted, refused

CLOSE = 1e-5
"""Of float32 sums in another order, through some hundred operations."""
TURNED = {"bf16": 0.02, "fp8": 0.1}
"""How far a gradient may turn, as 1 - cosine: a few layers that round states to 8 bits, or operands
to 4, at other places, where a score that rounds the other way may choose another expert. On a CPU
states in float32 turn these gradients by 0.005 and 0.055."""
LOSS_GAPS = {"float32": CLOSE, "bf16": 1e-3, "fp8": 5e-3}
"""Those change the loss by 1e-5 and 5e-4."""
DOCUMENTS = {"whole texts": 1, "documents": 4}
STEPS = 3
FEW, MANY = 2, 10
"""Tokens of two answers, between which the waits of a step are told."""


def rows(setting: Setting) -> Iterator[Row]:
    """First what is cheap to compile, then the rest."""
    precisions: list[Precision] = ["float32", "bf16", "fp8"]
    kinds = setting.pick(list(DOCUMENTS), ["documents"])
    for precision in precisions:
        for kind in kinds:
            what = f"tiny, {kind}"
            yield from attempted(setting, what, precision, _beside_the_cpu, precision, kind)
    yield from expert_rows(setting)
    for precision in precisions[1:]:
        for kind in kinds:
            what = f"waits of a step, {kind}"
            yield from attempted(setting, what, precision, _waits_of_a_step, what, precision, kind)
    yield from attempted(setting, "waits of a generated token", "bf16", _waits_of_a_token)


@dataclass(frozen=True, slots=True)
class _Pass:
    loss: float
    gradients: dict[str, Tensor]
    """float64, on the host."""
    load_LE: Tensor
    """How often each expert was chosen, which tells where a choice fell otherwise."""


def _pass_of(setting: Setting, precision: Precision, device: torch.device, kind: str) -> _Pass:
    trainer = trainer_of(TINY, precision, device, drawn=True)
    shape = setting.pick((8, 128), (2, 32))
    batch, loss = batch_of(TINY, shape, documents=DOCUMENTS[kind])
    found = trainer.forward_backward(batch, loss)
    parameters = trainer.model.named_parameters()
    gradients = {n: p.grad.cpu().double() for n, p in parameters if p.grad is not None}
    return _Pass(found["loss"], gradients, trainer.load_LE.cpu())


def _beside_the_cpu(setting: Setting, precision: Precision, kind: str) -> Iterator[Row]:
    here = _pass_of(setting, precision, setting.device, kind)
    there = _pass_of(setting, precision, torch.device("cpu"), kind)
    elsewhere = float((here.load_LE - there.load_LE).abs().sum()) / 2
    more = {"choices elsewhere": elsewhere}
    gap = abs(here.loss - there.loss) / abs(there.loss)
    yield Row(
        f"tiny's loss, {kind}", precision, gap, "of the CPU's", most=LOSS_GAPS[precision], more=more
    )
    missing = here.gradients.keys() ^ there.gradients.keys()
    note = f"gradients on one side alone: {', '.join(sorted(missing))}" if missing else ""
    ours, theirs = (
        torch.cat([one.gradients[name].flatten() for name in sorted(there.gradients)])
        for one in (here, there)
    )
    if precision == "float32":
        gap = float((ours - theirs).norm() / theirs.norm())
        worst = max(
            float((here.gradients[name] - grad).norm() / grad.norm().clamp_min(1e-12))
            for name, grad in there.gradients.items()
        )
        what, more = f"tiny's gradients, {kind}", {"worst parameter": worst}
        yield Row(what, precision, gap, "of the CPU's", most=CLOSE, more=more, note=note)
        return
    turned = 1 - float(ours @ theirs / (ours.norm() * theirs.norm()))
    what = f"tiny's gradients, {kind}"
    yield Row(what, precision, turned, "1 - cosine", most=TURNED[precision], note=note)


def _waits_of_a_step(setting: Setting, what: str, precision: Precision, kind: str) -> Iterator[Row]:
    trainer = trainer_of(TINY, precision, setting.device, drawn=True)
    shape = setting.pick((8, 128), (2, 32))
    batch, loss = batch_of(TINY, shape, documents=DOCUMENTS[kind])
    for counting in (False, True) if precision == "fp8" else (False,):
        # Twice: what is compiled or tabled at first is no part of a step.
        for _ in range(2):
            trainer.train_step(batch, loss, 1e-4, counting=counting)
        with counted(setting) as waits:
            trainer.train_step(batch, loss, 1e-4, counting=counting)
        by = f"{precision}, counted" if counting else precision
        yield _told(setting, what, by, waits.total(), 2 if counting else 1, waits)
    if precision == "bf16":
        with refused(setting, (trainer_module, "fetch")):
            for _ in range(STEPS):
                trainer.train_step(batch, loss, 1e-4)
        yield _told(setting, f"{what}, but the one read, refused", precision, 0.0, 0, Counter())


def _waits_of_a_token(setting: Setting) -> Iterator[Row]:
    model = trainer_of(TINY, "bf16", setting.device, drawn=True).model
    waits = []

    def answer(tokens: int) -> None:
        sample(
            model,
            [[5, 9, 3], [8, 2, 7, 6, 5]],
            max_new_tokens=tokens,
            drawing=Drawing(0.9, top_k=50, top_p=0.95),
            stop_tokens=(),
            seeds=[1, 2],
        )

    answer(MANY)
    for tokens in (FEW, MANY):
        with counted(setting) as found:
            answer(tokens)
        waits.append(found)
    each = (waits[1].total() - waits[0].total()) / (MANY - FEW)
    what = "waits of a generated token"
    yield _told(setting, what, "bf16", each, 1, waits[1] - waits[0])
    # Prompts are read when rows join, which steps do not wait for.
    allowed = (
        (decode, "_read"),
        (decode.Session, "join"),
        (decode._Uniforms, "join"),
    )
    with refused(setting, *allowed):
        answer(MANY)
    yield _told(setting, f"{what}, but the one read, refused", "bf16", 0.0, 0, Counter())


def _told(
    setting: Setting, what: str, by: str, count: float, most: float, places: Counter[str]
) -> Row:
    """A row of waits, which only CUDA tells."""
    if not setting.on_cuda:
        return Row(what, by, f"{SKIPPED}only CUDA tells waits")
    note = ", ".join(f"{place} {number}" for place, number in places.most_common(8))
    return Row(what, by, count, "waits", most=most, note=note)

"""What the parts of the benchmark ask of CUDA, told by stand-ins: all but the kernels run here."""

import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.bench.gpu import agreement, card, decoding, models, steps
from tests.bench.gpu.profile import Work
from tests.bench.gpu.rows import Row
from tests.bench.gpu.setting import Setting, clock_of

GIB = 2**30
WORK = Work(7, 1e-9, {"a long name of a kernel, " + 60 * "x": 6e-10, "b": 4e-10})


class Pretending(Setting):
    """A CPU that answers as CUDA does."""

    @property
    def on_cuda(self) -> bool:
        """As the parts see it."""
        return True


HERE = Pretending(torch.device("cpu"), short=True)


class Event:
    """A moment of a device that is not there."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        """Now."""

    synchronize = record

    def elapsed_time(self, other: "Event") -> float:
        """Milliseconds."""
        return 250.0


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    allocated = iter(range(0, 2**20 * GIB, GIB))
    properties = SimpleNamespace(
        total_memory=80 * GIB, multi_processor_count=132, name="a card", major=9, minor=0
    )
    answers: dict[str, Any] = {
        "synchronize": None,
        "empty_cache": None,
        "reset_peak_memory_stats": None,
        "max_memory_allocated": 40 * GIB,
        "get_device_properties": properties,
        "get_sync_debug_mode": 0,
        "set_sync_debug_mode": None,
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: next(allocated))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    for part in (steps, decoding):
        monkeypatch.setattr(part, "work_of", lambda *_: WORK)
    yield


def named(rows: Iterator[Row]) -> dict[tuple[str, str], Row]:
    found = {(row.what, row.by): row for row in rows}
    assert not [row for row in found.values() if row.is_fault]
    return found


def test_the_card_tells_its_clocks(monkeypatch: pytest.MonkeyPatch) -> None:
    told = "a card, 580.1, 1980 MHz, 2619 MHz, 1980 MHz, 700.00 W, 31, 81559 MiB\n"
    done = subprocess.CompletedProcess([], 0, stdout=told)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)
    rows = named(card.rows(HERE))
    assert rows["clocks.sm", "nvidia-smi"].figure == "1980 MHz"
    assert rows["power.limit", "nvidia-smi"].figure == "700.00 W"
    assert rows["card", "torch"].figure == "a card"
    assert rows["card", "torch"].more["GiB"] == 80


def test_a_step_tells_memory_launches_and_idle_time() -> None:
    rows = named(steps.rows(HERE))
    memory = rows["1B MoE: memory at its peak", "bf16"]
    # Each look finds a GiB more than the last.
    assert (memory.figure, memory.more["copies of weights"]) == (40.0, 1.0)
    assert memory.more["kept for backward"] == 1.0
    assert rows["slice of V3: launches", "fp8"].figure == 7
    step = float(rows["1B MoE: step", "bf16"].figure) / 1e3
    assert rows["1B MoE: without a kernel", "bf16"].figure == 1 - 1e-9 / step
    kernels = [row for (what, _), row in rows.items() if " in a long name" in what]
    assert len(kernels) == 4 and all(len(row.what) < 80 for row in kernels)
    assert rows["1B MoE: step", "bf16"].ratio == 1.0
    assert isinstance(rows["1B MoE: step", "fp8"].ratio, float)
    tokens = rows["1B MoE: tokens", "bf16"]
    assert tokens.figure == pytest.approx(2 * 32 / step)
    assert "of the best bf16 product" in tokens.more


def test_generation_tells_launches_and_idle_time() -> None:
    rows = named(decoding.rows(HERE))
    row = rows["1B MoE, answers to 3 prompts", "bf16, eager"]
    # Short and long answers have the same work here.
    assert (row.more["launches a step"], row.more["without a kernel"]) == (0.0, 1.0)
    assert row.more["ms a step"] == pytest.approx(3e3 / float(row.figure))


def test_waits_are_told_by_step_and_token() -> None:
    rows = named(
        row
        for precision in steps.PRECISIONS
        for row in agreement._waits_of_a_step(HERE, "waits of a step", precision, "documents")
    )
    rows |= named(agreement._waits_of_a_token(HERE))
    for what in ("waits of a step", "waits of a step, but the one read, refused"):
        assert rows[what, "bf16"].figure == 0
    assert rows["waits of a step", "fp8, counted"].most == 2
    assert rows["waits of a generated token, but the one read, refused", "bf16"].figure == 0


def test_a_call_is_timed_by_events(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[torch.Tensor] = []
    empty = torch.empty

    def host(*shape: Any, device: Any, **options: Any) -> torch.Tensor:
        made.append(empty(8, **options))
        return made[-1]

    monkeypatch.setattr(torch, "empty", host)
    clock, calls = clock_of(torch.device("cuda")), list[int]()
    assert [clock(lambda: calls.append(1)) for _ in range(2)] == [0.25, 0.25]
    # The caches are emptied before each call, by one tensor.
    assert (len(calls), len(made)) == (2, 1)


def test_a_model_without_fp8_is_not_measured_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def high(precision: models.Precision, device: torch.device) -> Any:
        return real("bf16", device)[0], "high precision, not FP8: no products"

    real = models.numerics_of
    monkeypatch.setattr(models, "numerics_of", high)
    row = named(steps.rows(HERE))["1B MoE", "fp8"]
    assert row.figure == "not measured: high precision, not FP8: no products"

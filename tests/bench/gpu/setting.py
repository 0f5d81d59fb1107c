"""Where the benchmark measures, for how long, and by which clock."""

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

WARM_UP, ROUNDS = 3, 9
CACHE_BYTES = 2**28
"""More than any cache holds."""
SQUARE = 8192
"""Rows of the product whose rate others are held against."""

T = TypeVar("T")
Clock = Callable[[Callable[[], object]], float]
"""Seconds of one call."""


@dataclass(frozen=True)
class Setting:
    """The device of a part, and when the part must be done."""

    device: torch.device
    short: bool = False
    """Small shapes and few rounds, whose figures mean nothing: it shows that all parts run."""
    until: float = float("inf")
    """By `time.monotonic`."""

    @cached_property
    def clock(self) -> Clock:
        """How one call is timed."""
        return clock_of(self.device)

    @property
    def on_cuda(self) -> bool:
        """Whether there is a GPU to measure on."""
        return self.device.type == "cuda"

    def left(self) -> float:
        """Seconds until the part must be done."""
        return self.until - time.monotonic()

    def pick(self, full: T, short: T) -> T:
        """A size, a number of rounds, or several."""
        return short if self.short else full

    def wait(self) -> None:
        """Until the device has done all that it was told."""
        if self.on_cuda:
            torch.cuda.synchronize(self.device)

    def tidy(self) -> None:
        """Give back the memory of what was measured last."""
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def allocated(self) -> int:
        """Bytes that tensors occupy."""
        return torch.cuda.memory_allocated(self.device) if self.on_cuda else 0

    def peak(self) -> int:
        """The most bytes that they occupied since `reset_peak`."""
        return torch.cuda.max_memory_allocated(self.device) if self.on_cuda else 0

    def reset_peak(self) -> None:
        """Begin to look for a peak."""
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def seconds(self, run: Callable[[], object], rounds: int = ROUNDS) -> float:
        """The median of several calls after a warm-up."""
        for _ in range(self.pick(WARM_UP, 1)):
            run()
        return statistics.median(self.clock(run) for _ in range(self.pick(rounds, 1)))


def clock_of(device: torch.device) -> Clock:
    """A clock by CUDA events, which empties the caches before each call; on CPUs the host's."""
    if device.type != "cuda":

        def by_host(run: Callable[[], object]) -> float:
            begin = time.perf_counter()
            run()
            return time.perf_counter() - begin

        return by_host
    scrap: list[Tensor] = []

    def by_events(run: Callable[[], object]) -> float:
        if not scrap:
            scrap.append(torch.empty(CACHE_BYTES, dtype=torch.uint8, device=device))
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        scrap[0].zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3

    return by_events


def interleaved(
    variants: Mapping[str, Callable[[], object] | str],
    setting: Setting,
    why: Callable[[BaseException], str],
    rounds: int = ROUNDS,
) -> dict[str, float | str]:
    """Median seconds of each, all in turn every round; what fails once is out, and says why."""
    found: dict[str, float | str] = {}
    alive: dict[str, Callable[[], object]] = {}
    for name, run in variants.items():
        if isinstance(run, str):
            found[name] = run
            continue
        try:
            for _ in range(setting.pick(WARM_UP, 1)):
                run()
            alive[name] = run
        except Exception as error:
            found[name] = why(error)
    times: dict[str, list[float]] = {name: [] for name in alive}
    for _ in range(rounds):
        for name in list(alive):
            try:
                times[name].append(setting.clock(alive[name]))
            except Exception as error:
                found[name] = why(error)
                del alive[name]
    return found | {name: statistics.median(times[name]) for name in alive}


def best_rate(setting: Setting, dtype: torch.dtype = torch.bfloat16) -> float:
    """FLOP/s of the quickest of several square products."""
    rows = setting.pick(SQUARE, 64)
    a, b = (torch.randn(rows, rows, device=setting.device).to(dtype) for _ in range(2))
    for _ in range(WARM_UP):
        torch.mm(a, b)
    rounds = setting.pick(ROUNDS, 1)
    return 2 * rows**3 / min(setting.clock(lambda: torch.mm(a, b)) for _ in range(rounds))


def no_device() -> str:
    """Why there is no GPU to measure on, or nothing."""
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch finds no CUDA device"

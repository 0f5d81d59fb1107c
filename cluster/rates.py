"""How quickly a device multiplies and moves bytes, measured by itself in a moment.

What is measured is what a step can be held against: the arithmetic of large products in the type
that is computed in, and reading and writing main memory. It chooses nothing.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

_LEAST_SECONDS = 0.005
"""Of one timed call: short enough to take many, and far above what a clock or a launch costs."""
_ROUNDS = 5
_SMALLEST, _LARGEST = 512, 16384
"""Rows of a product."""
_FEWEST_BYTES, _MOST_BYTES = 32 * 2**20, 2**30


@dataclass(frozen=True, slots=True)
class Rates:
    """What was measured."""

    flops_per_second: float
    """Of a square product, in the dtype that was asked for; an addition counts beside its
    multiplication."""
    bytes_per_second: float
    """Read and written together, by a copy that no cache holds."""


def measure(device: torch.device, dtype: torch.dtype) -> Rates:
    """The best of a few rounds, a fraction of a second in all, on the calling thread's cores."""
    return Rates(_multiplying(device, dtype), _moving(device))


def _multiplying(device: torch.device, dtype: torch.dtype) -> float:
    rows = _SMALLEST
    while True:
        a, b = (torch.ones(rows, rows, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _best(partial(torch.mm, a, b, out=out), device)
        if seconds >= _LEAST_SECONDS or rows >= _LARGEST:
            return 2 * rows**3 / seconds
        rows *= 2


def _moving(device: torch.device) -> float:
    size = _FEWEST_BYTES
    while True:
        source = torch.ones(size // 4, dtype=torch.float32, device=device)
        target = torch.empty_like(source)
        seconds = _best(partial(target.copy_, source), device)
        if seconds >= _LEAST_SECONDS or size >= _MOST_BYTES:
            return 2 * size / seconds
        size *= 2


def _best(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of the quickest of a few calls, the first of which only warms up."""
    module = torch.get_device_module(device)
    call()
    seconds = []
    for _ in range(_ROUNDS):
        module.synchronize()
        begin = time.perf_counter()
        call()
        module.synchronize()
        seconds.append(time.perf_counter() - begin)
    return min(seconds)

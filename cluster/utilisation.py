"""MFU: the share of the machines' arithmetic that a training uses for its model.

Model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B) is the model's operations a second
over the most that the devices do. That most is measured here, once, when a group of workers
begins: so it is what these devices do beside whatever else runs on them, and no data sheet's word.
On a machine that others use as well both figures are noisy, and so is their quotient.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist

from cluster.figures import fetch, summed
from cluster.trainer import Trainer

MFU = "mfu"
_ROUNDS, _LEAST_SECONDS = 5, 0.004
"""Of a timed product: long beside a clock's grain and a launch, short enough to take several."""
_SMALLEST, _LARGEST = 256, 16384
"""Rows of a product."""


@dataclass(frozen=True, slots=True)
class Utilisation:
    """What the speed of a training is held against."""

    flops_per_token: float
    """The model's own, of a training step."""
    peak: float
    """FLOP/s of all ranks together."""
    told: str
    """The peak in words, for records."""

    def of(self, tokens_per_second: float) -> float:
        """The share of the peak that so many tokens of all ranks a second need."""
        return tokens_per_second * self.flops_per_token / self.peak


def hold_against_peak(trainer: Trainer, flops_per_token: float) -> Utilisation:
    """Measure the peak on all ranks at a time, which they then train at a time as well."""
    device = trainer.model.lm_head.weight.device
    dtype = trainer.numerics.compute or torch.float32
    if trainer.parallel:
        dist.barrier()
    own = measure(device, dtype)
    peak = float(summed(fetch({"peak": own}), over_ranks=trainer.parallel)["peak"])
    what = f"{device.type} of {trainer.world} workers, {str(dtype).removeprefix('torch.')}"
    told = f"{peak / 1e9:,.1f} GFLOP/s ({what} products, measured when training began)"
    return Utilisation(flops_per_token, peak, told)


def measure(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of this process's square products, the best of a few that take milliseconds each."""
    rows = _SMALLEST
    while True:
        a, b = (torch.ones(rows, rows, dtype=dtype, device=device) for _ in range(2))
        out = torch.empty_like(a)
        seconds = _best(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), device)  # type: ignore[misc]
        if seconds >= _LEAST_SECONDS or rows >= _LARGEST:
            return 2 * rows**3 / seconds
        rows *= 2


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

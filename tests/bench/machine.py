"""What a measured ratio depends on besides the code, in one line, printed with every ratio."""

import os
import time

import torch

from pipeline.provenance import ALLOCATOR, processor


def describe() -> str:
    """Processor, cores, threads, torch and the allocator's settings of this process."""
    settings = [f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ]
    return (
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, allocator {' '.join(settings) or 'as it comes'}"
    )


def matmul_flops_per_second(dtype: torch.dtype = torch.float32) -> float:
    """The best of some products of 1024 x 1024 matrices; of few where they take long."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    best, begun = float("inf"), time.perf_counter()
    for _ in range(8):
        begin = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - begin)
        if time.perf_counter() - begun > 1:
            break
    return 2 * 1024**3 / best


def why_no_bfloat16() -> str | None:
    """Why a run in bfloat16 would tell nothing here; None where it does."""
    narrow, wide = map(matmul_flops_per_second, (torch.bfloat16, torch.float32))
    if narrow < wide / 2:
        return f"this processor multiplies bfloat16 at {narrow / wide:.0%} of float32's speed"
    return None

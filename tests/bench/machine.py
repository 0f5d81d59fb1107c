"""What a measured ratio depends on besides the code, in one line, printed with every ratio."""

import os

import torch

from pipeline.provenance import ALLOCATOR, processor


def describe() -> str:
    """Processor, cores, threads, torch and the allocator's settings of this process."""
    settings = [f"{name}={os.environ[name]}" for name in ALLOCATOR if name in os.environ]
    return (
        f"{processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, allocator {' '.join(settings) or 'as it comes'}"
    )

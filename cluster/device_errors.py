"""What torch raises where a device runs out of memory or is lost, as one sentence."""

import re

import torch

from cluster.backend import ACCELERATORS
from cluster.output import TRAINER

_OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")
"""Libraries of devices and the host's allocator raise plain errors that say so."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocator had no more."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(one in str(error) for one in _OUT_OF_MEMORY)


def out_of_memory(error: BaseException, role: str = TRAINER) -> str | None:
    """That memory ran out, in one line, and what lowers the need of a worker of this `role`; none
    for another error."""
    if not is_out_of_memory(error):
        return None
    if role != TRAINER:
        return (
            f"out of memory ({first_line(error)}); lower posttrain.max_new_tokens, or raise "
            "cluster.samplers, which divides the answers, and run again"
        )
    return (
        f"out of memory ({first_line(error)}); raise cluster.micro_batches in pretraining or "
        "posttrain.minibatches, or cluster.trainers, which divides batches and experts (where "
        "cluster.ep is set, that does); run again to continue from the newest save"
    )


def device_lost(error: BaseException) -> str | None:
    """That the device failed under the process, in one line; none for another error."""
    said = first_line(error)
    if isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError)
        and any(words in said for one in ACCELERATORS for words in one.lost)
    ):
        return f"its device failed ({said})"
    return None


def first_line(error: BaseException) -> str:
    """The first sentence, since torch goes on with advice that fits other programs."""
    # Its allocator of the host begins with the line of its own code that noticed.
    said = re.sub(r"^\[enforce fail[^]]*\][^.]*\. ", "", str(error))
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return lines[0].split(". ")[0].rstrip(".") if lines else type(error).__name__

"""Counts where the host would wait for a device: the reads of single numbers, by place in the code.

On a CPU nothing waits, but the same calls are made: `float(x)`, `x.item()`, `bool(x)` are one
operation of torch, and each of them stops a GPU's queue.
"""

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

ROOT = Path(__file__).parents[1]
FLOORS = tuple(str(ROOT / floor) for floor in ("model", "cluster", "stages"))
_WAITING = (torch.ops.aten._local_scalar_dense.default,)


class Waits(TorchDispatchMode):
    """A mode that notes the innermost line of the project at each such read."""

    def __init__(self) -> None:
        # torch leaves this initialiser untyped.
        super().__init__()  # type: ignore[no-untyped-call]
        self.places: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _WAITING:
            self.places[_place()] += 1
        return func(*args, **(kwargs or {}))


def _place() -> str:
    """`file:line` of the innermost frame in the project's own code."""
    frame = sys._getframe(2)
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(FLOORS):
            return f"{Path(name).relative_to(ROOT).as_posix()}:{frame.f_lineno}"
        assert frame.f_back is not None, "called by nobody of the project"
        frame = frame.f_back
    raise AssertionError

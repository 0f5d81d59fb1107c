"""What tests watch of memory: what is made, what is allocated, what waits for a backward pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode


class LargestTensor(TorchDispatchMode):
    """Within it, `values` is the size of the largest tensor that any operation made."""

    def __init__(self) -> None:
        # By its name: of `super()` mypy does not see that torch left it untyped.
        TorchDispatchMode.__init__(self)
        self.values = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operation and look at what it returns."""
        made = function(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.values = max(self.values, tensor.numel())
        return made


@contextmanager
def saved_tensors() -> Iterator[list[Tensor]]:
    """Within it, the list fills with every tensor that is saved for a backward pass."""
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


def largest_allocation(action: Callable[[], object]) -> int:
    """Bytes of the largest piece of memory that `action` asks the CPU's allocator for."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    return max(int(event.cpu_memory_usage) for event in seen.events())

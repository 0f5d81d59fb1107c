"""Stands in for torch_npu where there is no NPU: every name is there, and none computes.

Enough to import vllm-ascend and to let its loader fill parameters; never on the path otherwise.
"""

import sys
import types
from typing import Any
from unittest.mock import MagicMock

import torch

_PARTS = (
    *("npu", "npu.utils", "profiler", "utils", "_inductor"),
    *("op_plugin", "op_plugin.atb", "op_plugin.atb._atb_ops"),
)


class _Named(types.ModuleType):
    """A module in which every public name is found."""

    def __init__(self, name: str) -> None:
        """A package, so that its parts can be imported."""
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        """Something that takes any call; nothing for names of Python's own."""
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


def __getattr__(name: str) -> Any:
    """As of its parts."""
    if name.startswith("__"):
        raise AttributeError(name)
    return MagicMock(name=f"torch_npu.{name}")


for _part in _PARTS:
    sys.modules[f"{__name__}.{_part}"] = _Named(f"{__name__}.{_part}")
_device: Any = _Named("torch.npu")
_device.is_available = lambda: False
sys.modules["torch.npu"] = _device
vars(torch)["npu"] = _device

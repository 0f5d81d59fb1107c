"""A device that is none: a row of the table whose tensors lie on the host."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from cluster.backend import CUDA, Backend, Found


def found() -> Found:
    """One is there."""
    return Found(1, "stand-in")


@dataclass(frozen=True, slots=True)
class StandIn(Backend):
    """Asks Ray for what a CUDA device does, and computes on the CPU in float32.

    What it stands in for is all that is done about a device: it is reserved, chosen and named, and
    batches are brought to it.
    """

    @property
    def module(self) -> Any:
        """What a worker asks of its device."""
        return SimpleNamespace(
            set_device=lambda index: None, get_device_name=lambda: self.look().name
        )

    def pinned(self, tensor: Tensor) -> Tensor:
        """There is no device to pin it for."""
        return tensor

    def place(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A copy, as on a device."""
        return {name: tensor.clone() for name, tensor in batch.items()}


def stand_in(**changes: Any) -> StandIn:
    """One with these fields."""
    row = {name: getattr(CUDA, name) for name in CUDA.__dataclass_fields__}
    own: dict[str, Any] = {
        "device": "cpu",
        "group": "gloo",
        "compute": None,
        "look": found,
        "env": {},
    }
    return replace(StandIn(**row), **own | changes)

"""Where each layer's routed experts live, as plain numbers.

Every rank of the `ep` axis has as many slots as every other; slot s of a layer holds the expert
`physical_to_logical[s]`, and rank r has the slots from r * R / ranks on. A model, its saves and its
exports know experts by their logical numbers alone, so that weights do not change when their places
do.

Axes: L layers with experts, R slots of a layer, E experts, M most replicas of an expert.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from configs.errors import ConfigError

Int64 = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Placement:
    """Which slot of which rank holds which expert of which layer."""

    layers: tuple[str, ...]
    """Module names, as `model.layers.3`."""
    physical_to_logical: Int64
    """[L, R]: the expert in each slot."""
    nodes: int = 1
    devices: int = 1
    """Ranks of the `ep` axis on each node."""
    version: int = 0
    """Counts placements of one training."""

    def __post_init__(self) -> None:
        """ConfigError unless slots divide over the ranks and hold each layer's experts once."""
        layers, slots = self.physical_to_logical.shape
        if layers != len(self.layers):
            raise ConfigError(
                f"a placement has {layers} rows for {len(self.layers)} layers; give one each"
            )
        if slots % self.ranks or slots < self.ranks:
            raise ConfigError(
                f"{slots} experts do not divide over {self.ranks} ranks; change the model, "
                "cluster.trainers or cluster.ep"
            )
        for name, row_R in zip(self.layers, self.physical_to_logical, strict=True):
            if sorted(row_R.tolist()) != list(range(slots)):
                raise ConfigError(
                    f"the placement of {name} does not hold each of {slots} experts once; replicas "
                    "are not built yet: give a permutation"
                )

    @classmethod
    def contiguous(
        cls, layers: Sequence[str], experts: int, *, nodes: int = 1, devices: int = 1
    ) -> "Placement":
        """Experts in their order, an equal share for each rank."""
        every_LR = np.tile(np.arange(experts, dtype=np.int64), (len(layers), 1))
        return cls(tuple(layers), every_LR, nodes, devices)

    @property
    def ranks(self) -> int:
        """Of the `ep` axis."""
        return self.nodes * self.devices

    @property
    def slots_each(self) -> int:
        """Slots of one rank in each layer."""
        return int(self.physical_to_logical.shape[1]) // self.ranks

    @cached_property
    def replica_count(self) -> Int64:
        """[L, E]: slots that hold each expert."""
        return np.stack([np.bincount(row_R) for row_R in self.physical_to_logical])

    @cached_property
    def logical_to_physical(self) -> Int64:
        """[L, E, M]: the slots that hold each expert, -1 where it has fewer."""
        return self.physical_to_logical.argsort(axis=1, kind="stable")[:, :, None]

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all that decides where an expert is, in hexadecimal."""
        said = hashlib.sha256(repr((self.layers, self.nodes, self.devices)).encode())
        said.update(np.ascontiguousarray(self.physical_to_logical, dtype="<i8").tobytes())
        return said.hexdigest()

    def experts_of(self, layer: str) -> list[int]:
        """The expert in each slot of a layer."""
        experts: list[int] = self.physical_to_logical[self.layers.index(layer)].tolist()
        return experts

    def at(self, layer: str, ep_index: int) -> tuple[int, ...]:
        """The experts of a layer on a rank of the axis, in the order of its slots."""
        first = ep_index * self.slots_each
        row_R = self.physical_to_logical[self.layers.index(layer)]
        return tuple(row_R[first : first + self.slots_each].tolist())

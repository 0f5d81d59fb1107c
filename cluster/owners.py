"""Which rank owns each parameter: its master weights, its moments, and its update.

ZeRO, by whole parameters: each matrix has one owner among the ranks that hold copies of it, as
DeepSeek-V3's ZeRO-1 has, and as an optimiser that needs whole matrices asks (Muon; V4, section
2.4). The owner is found from names, shapes and the mesh alone, so that all ranks agree without a
word.
"""

import math
from collections.abc import Mapping, Set
from dataclasses import dataclass

from cluster.mesh import AxisName, Mesh


@dataclass(frozen=True)
class Owners:
    """Each parameter's owner, by its place on the axis of its copies."""

    places: Mapping[str, int]
    sharded: frozenset[str]
    """Names of experts' parameters: their copies lie on the `dp` axis, all others' on `data`."""
    mesh: Mesh

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, ...]], sharded: Set[str], mesh: Mesh) -> "Owners":
        """The largest parameters first, each to the first of the ranks that own the fewest values.

        A stack of experts counts for every rank of its owner's `ep` axis, of which each owns its
        own experts.
        """
        held = [0] * (mesh.dp * mesh.ep)
        places: dict[str, int] = {}
        for name in sorted(shapes, key=lambda one: (-math.prod(shapes[one]), one)):
            groups = (
                [range(copy * mesh.ep, (copy + 1) * mesh.ep) for copy in range(mesh.dp)]
                if name in sharded
                else [range(place, place + 1) for place in range(len(held))]
            )
            loads = [max(held[place] for place in group) for group in groups]
            places[name] = loads.index(min(loads))
            for place in groups[places[name]]:
                held[place] += math.prod(shapes[name])
        return cls(places, frozenset(sharded), mesh)

    def axis(self, name: str) -> AxisName:
        """The axis that copies of the parameter lie on."""
        return "dp" if name in self.sharded else "data"

    def rank(self, name: str) -> int:
        """The rank that owns the parameter, as this one holds it."""
        return self.mesh.axis(self.axis(name)).ranks[self.places[name]]

    def mine(self, name: str) -> bool:
        """Whether this rank owns what it holds of the parameter."""
        return self.mesh.axis(self.axis(name)).index == self.places[name]

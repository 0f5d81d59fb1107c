"""The process groups of a mesh's axes."""

from collections.abc import Iterable
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from cluster.mesh import AxisName, Mesh


class Groups:
    """What this rank's collectives go over, by axis.

    An axis of all ranks is the process's own group, and one of a single rank has none.
    """

    def __init__(self, mesh: Mesh, seconds: float | None = None) -> None:
        """Made on all ranks together; collectives of the groups wait `seconds`, until told anew."""
        self.mesh = mesh
        names: Iterable[AxisName] = ("dp", "ep")
        self._made = {name: made for name in names if (made := _own(mesh, name, seconds))}

    @classmethod
    def of_world(cls, ep: int | None = None, seconds: float | None = None) -> "Groups":
        """Of the process's group, or of this process alone where it is in none.

        ConfigError if `ep` does not divide the ranks.
        """
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        return cls(Mesh.of(world, rank, ep), seconds)

    def __getitem__(self, name: AxisName) -> dist.ProcessGroup | None:
        """The group of an axis of several ranks; None is the process's own.

        ValueError for an axis that has no group.
        """
        if name not in self._made and self.mesh.axis(name).size != self.mesh.world:
            raise ValueError(f"the {name} axis of {self.mesh} has no group")
        return self._made.get(name)

    def wait_at_most(self, seconds: float) -> None:
        """From now on collectives of this process wait so long and no longer."""
        if dist.is_initialized():
            for group in (None, *self._made.values()):
                _set_pg_timeout(timedelta(seconds=seconds), group)


def _own(mesh: Mesh, name: AxisName, seconds: float | None) -> dist.ProcessGroup | None:
    """This rank's group of the axis. Every rank makes the groups of all, in the same order."""
    if mesh.axis(name).size in (1, mesh.world):
        return None
    if seconds is None:
        raise ValueError(f"the groups of the {name} axis need a deadline")
    own = None
    for ranks in mesh.lines(name):
        made = dist.new_group(list(ranks), timeout=timedelta(seconds=seconds))
        if mesh.rank in ranks:
            own = made
    return own

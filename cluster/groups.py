"""Ranks that meet: the process's group, and those of a mesh's axes."""

import hashlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from itertools import groupby

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from cluster.backend import CPU, Backend
from cluster.mesh import AxisName, Mesh
from configs.errors import ConfigError, MachineError

_NAME_BYTES = 64
"""Of a device's name, as ranks tell each other."""
_HOPS = "across", "within"
"""Two parts of an `ep` axis that spans nodes."""


class Groups:
    """What this rank's collectives go over, by axis.

    An axis of all ranks is the process's own group, and one of a single rank has none.
    """

    def __init__(self, mesh: Mesh, seconds: float | None = None, *, nodes: int = 1) -> None:
        """Made on all ranks together; collectives of the groups wait `seconds`, until told anew.

        `nodes` are those that one `ep` axis spans, with equally many neighbours of it on each.
        """
        self.mesh, self.nodes = mesh, nodes
        parts = _hops(mesh, nodes)
        names: Iterable[AxisName] = ("dp", "ep", "data")
        self._made: dict[str, dist.ProcessGroup] = {}
        for name in names:
            # Reductions must not queue before exchanges of tokens, though both be over all ranks.
            apart = name == "data" and seconds is not None
            if (made := _own(mesh, mesh.lines(name), seconds, apart=apart)) is not None:
                self._made[name] = made
        for hop, lines in zip(_HOPS, parts, strict=False):
            if (made := _own(mesh, lines, seconds)) is not None:
                self._made[hop] = made

    @classmethod
    def of_world(
        cls, ep: int | None = None, seconds: float | None = None, *, node: str | None = None
    ) -> "Groups":
        """Of the process's group, or of this process alone where it is in none.

        With the name of each rank's `node`, tokens travel across nodes in two hops where every `ep`
        axis spans several of several ranks each.

        ConfigError if `ep` does not divide the ranks.
        """
        world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
        mesh = Mesh.of(world, rank, ep)
        nodes = 1 if node is None or world == 1 else nodes_spanned(mesh, _told_by_all(node))
        return cls(mesh, seconds, nodes=nodes)

    def __getitem__(self, name: AxisName) -> dist.ProcessGroup | None:
        """The group of an axis of several ranks; None is the process's own.

        ValueError for an axis that has no group.
        """
        if name not in self._made and self.mesh.axis(name).size != self.mesh.world:
            raise ValueError(f"the {name} axis of {self.mesh} has no group")
        return self._made.get(name)

    @property
    def hops(self) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """The groups of this rank's part of the `ep` axis: across nodes, of the ranks in its place
        on each, and within its node. Made where it spans several of several."""
        return self._made[_HOPS[0]], self._made[_HOPS[1]]

    def wait_at_most(self, seconds: float) -> None:
        """From now on collectives of this process wait so long and no longer."""
        if dist.is_initialized():
            for group in (None, *self._made.values()):
                _set_pg_timeout(timedelta(seconds=seconds), group)


def join_group(
    rendezvous: str, rank: int, world: int, timeout_seconds: float, backend: Backend = CPU
) -> None:
    """Make this process rank `rank` of `world`; `rendezvous` is `tcp://host:port`.

    Every later collective fails after `timeout_seconds` instead of hanging: in the rank that waits,
    or on devices by the end of its process.
    """
    dist.init_process_group(
        backend.group,
        init_method=rendezvous,
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=timeout_seconds),
        # A device that cannot be used is told of now, and not at the first collective.
        device_id=None if backend.is_host else torch.device(backend.device),
    )


def require_equal_cards(card: str) -> None:
    """MachineError, on every rank alike, unless all ranks' devices are called `card`.

    The slowest would hold up the others, and the same weights would not give the same numbers.
    """
    own = torch.zeros(_NAME_BYTES, dtype=torch.uint8)
    name = card.encode()[:_NAME_BYTES]
    own[: len(name)] = torch.tensor(list(name), dtype=torch.uint8)
    all_of_them = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, own)
    found: dict[str, list[int]] = {}
    for rank, one in enumerate(all_of_them):
        found.setdefault(bytes(one.tolist()).rstrip(b"\0").decode(errors="replace"), []).append(
            rank
        )
    if len(found) > 1:
        kinds = " and ".join(f"{name} (rank {_listed(ranks)})" for name, ranks in found.items())
        raise MachineError(
            f"the trainers of one group compute on {kinds}; name a cluster of one kind in "
            "cluster.address, or lower cluster.trainers until they find room on one"
        )


def _listed(ranks: list[int]) -> str:
    return ", ".join(map(str, ranks))


def nodes_spanned(mesh: Mesh, node_of_rank: Sequence[object]) -> int:
    """How many nodes each `ep` axis spans, if all do so alike: equally many neighbours on each; 1
    where they do not."""
    lengths = {
        tuple(len(list(same)) for _, same in groupby(line, key=lambda rank: node_of_rank[rank]))
        for line in mesh.lines("ep")
    }
    different = {len({node_of_rank[rank] for rank in line}) for line in mesh.lines("ep")}
    if len(lengths) > 1:
        return 1
    (runs,) = lengths
    return len(runs) if len(set(runs)) == 1 and different == {len(runs)} else 1


def _told_by_all(node: str) -> list[int]:
    """A number for each rank's node, the same for ranks of one."""
    own = torch.tensor([int(hashlib.sha256(node.encode()).hexdigest()[:15], 16)])
    every = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(every, own)
    return [int(one) for one in every]


def _hops(mesh: Mesh, nodes: int) -> list[list[tuple[int, ...]]]:
    """The ranks of every group across nodes and of every one within; none unless both are there."""
    devices, rest = divmod(mesh.ep, nodes)
    if rest:
        raise ConfigError(
            f"an ep axis of {mesh.ep} ranks does not divide over {nodes} nodes; choose a divisor"
        )
    if nodes == 1 or devices == 1:
        return []
    lines = mesh.lines("ep")
    return [
        [line[place::devices] for line in lines for place in range(devices)],
        [line[begin : begin + devices] for line in lines for begin in range(0, mesh.ep, devices)],
    ]


def _own(
    mesh: Mesh, lines: Sequence[tuple[int, ...]], seconds: float | None, *, apart: bool = False
) -> dist.ProcessGroup | None:
    """This rank's group among those of `lines`, none where it is alone in one, nor where all ranks
    are in one, unless that is to be `apart` from the process's own.

    Every rank makes all groups, in the same order.
    """
    if len(lines[0]) == 1 or (len(lines[0]) == mesh.world and not apart):
        return None
    if seconds is None:
        raise ValueError(f"groups of {len(lines[0])} of {mesh.world} ranks need a deadline")
    own = None
    for ranks in lines:
        made = dist.new_group(list(ranks), timeout=timedelta(seconds=seconds))
        if mesh.rank in ranks:
            own = made
    return own

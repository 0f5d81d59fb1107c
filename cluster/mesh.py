"""How ranks are divided: over experts and over copies of them, as plain numbers.

A rank's place is (pp, dp, ep), ep fastest, so that neighbours exchange the most. Ranks of one `ep`
axis hold a layer's experts between them; ranks of one `dp` axis hold the same experts, whose
gradients they add up; all ranks of a stage, the `data` axis, see rows of their own and hold the
same dense weights.
"""

from dataclasses import dataclass
from typing import Literal

from configs.errors import ConfigError
from configs.parallel import ClusterConfig, degrees_fault

AxisName = Literal["pp", "dp", "ep", "data"]


@dataclass(frozen=True, slots=True)
class Axis:
    """The ranks that differ from one in a single coordinate, and its place among them."""

    size: int
    index: int
    ranks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Mesh:
    """The degrees of each axis, and one rank's place."""

    ep: int = 1
    dp: int = 1
    pp: int = 1
    rank: int = 0

    def __post_init__(self) -> None:
        """ConfigError for a degree below 1, or a rank that the mesh does not have."""
        for name in ("pp", "dp", "ep"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} = {getattr(self, name)} is below 1; set it to 1 or more")
        if not 0 <= self.rank < self.world:
            raise ConfigError(
                f"rank {self.rank} is none of the {self.world} of a mesh of pp {self.pp} * dp "
                f"{self.dp} * ep {self.ep}; start as many workers as it has"
            )

    @classmethod
    def of(cls, world: int, rank: int, ep: int | None = None, pp: int = 1) -> "Mesh":
        """A mesh of `world` ranks in `pp` stages; without `ep` all of a stage share its experts.

        ConfigError if `pp` times `ep` does not divide the world.
        """
        if fault := degrees_fault(world, pp, ep):
            raise ConfigError(fault)
        ep = world // pp if ep is None else ep
        return cls(ep=ep, dp=world // (pp * ep), pp=pp, rank=rank)

    @property
    def world(self) -> int:
        """All ranks."""
        return self.pp * self.dp * self.ep

    def axis(self, name: AxisName) -> Axis:
        """This rank's axis of that name; `data` is dp and ep together."""
        stage, place = divmod(self.rank, self.dp * self.ep)
        copy, slot = divmod(place, self.ep)
        begin = stage * self.dp * self.ep
        match name:
            case "pp":
                found = range(place, self.world, self.dp * self.ep), stage
            case "dp":
                found = range(begin + slot, begin + self.dp * self.ep, self.ep), copy
            case "ep":
                found = range(begin + copy * self.ep, begin + (copy + 1) * self.ep), slot
            case "data":
                found = range(begin, begin + self.dp * self.ep), place
        ranks, index = found
        return Axis(len(ranks), index, tuple(ranks))

    def lines(self, name: AxisName) -> list[tuple[int, ...]]:
        """The ranks of every axis of that name in the mesh, each once, in order."""
        every = (
            Mesh(ep=self.ep, dp=self.dp, pp=self.pp, rank=rank).axis(name).ranks
            for rank in range(self.world)
        )
        return list(dict.fromkeys(every))


def require_one_stage(machines: ClusterConfig) -> None:
    """ConfigError for pipeline stages, over which nobody trains yet."""
    if machines.pp > 1:
        raise ConfigError(
            f"cluster.pp = {machines.pp}: training over several pipeline stages is not built yet; "
            "set it to 1"
        )

"""Who owns a parameter, and who tells of a placement: plain numbers, the same on every rank."""

import numpy as np
import pytest

from cluster.mesh import Mesh
from cluster.owners import Owners
from cluster.placement import Placement
from configs.errors import ConfigError

SHAPES = {
    "dense.a": (64, 32),
    "dense.b": (32, 32),
    "dense.c": (32,),
    "experts.gate_up": (4, 32, 16),
    "experts.down": (4, 16, 16),
}
EXPERTS = {"experts.gate_up", "experts.down"}


@pytest.mark.parametrize("mesh", [Mesh(), Mesh(ep=4), Mesh(dp=4), Mesh(dp=2, ep=2)])
def test_every_copy_has_one_owner_and_all_ranks_agree(mesh: Mesh) -> None:
    seen = [
        Owners.of(SHAPES, EXPERTS, Mesh(ep=mesh.ep, dp=mesh.dp, rank=rank))
        for rank in range(mesh.world)
    ]
    for name in SHAPES:
        assert len({one.places[name] for one in seen}) == 1
        owning = [rank for rank, one in enumerate(seen) if one.mine(name)]
        # Of experts one for each part of them.
        assert len(owning) == (mesh.ep if name in EXPERTS else 1)
        assert {one.rank(name) for one in seen} == set(owning)


def test_the_order_of_names_decides_nothing() -> None:
    mesh = Mesh(dp=2, ep=2)
    turned = dict(reversed(SHAPES.items()))
    assert Owners.of(SHAPES, EXPERTS, mesh).places == Owners.of(turned, EXPERTS, mesh).places


def test_no_rank_owns_much_more_than_another() -> None:
    shapes = {f"layer.{i}.{kind}": (64, 32 + i) for i in range(40) for kind in "abc"}
    owners = Owners.of(shapes, set(), Mesh(dp=8))
    held = [0] * 8
    for name, (height, width) in shapes.items():
        held[owners.places[name]] += height * width
    assert max(held) < 1.05 * min(held)


def test_a_placement_tells_both_ways_and_what_each_rank_holds() -> None:
    order = np.array([[3, 1, 0, 2], [0, 1, 2, 3]])
    placement = Placement(("one", "two"), order, nodes=2, devices=1)
    assert placement.at("one", 0) == (3, 1)
    assert placement.at("one", 1) == (0, 2)
    assert placement.at("two", 1) == (2, 3)
    for layer in range(2):
        for expert in range(4):
            (slot,) = placement.logical_to_physical[layer, expert]
            assert placement.physical_to_logical[layer, slot] == expert
    assert placement.replica_count.tolist() == [[1] * 4] * 2
    assert placement.experts_of("one") == [3, 1, 0, 2]


def test_a_digest_is_of_what_decides_where_experts_are() -> None:
    plain = Placement.contiguous(["one"], 4, devices=2)
    assert plain.digest == Placement.contiguous(["one"], 4, devices=2).digest
    others = [
        Placement.contiguous(["two"], 4, devices=2),
        Placement.contiguous(["one"], 4, devices=4),
        Placement.contiguous(["one"], 4, nodes=2),
        Placement(("one",), np.array([[1, 0, 2, 3]]), devices=2),
    ]
    assert len({plain.digest, *(one.digest for one in others)}) == 5


@pytest.mark.parametrize(
    ("order", "layers", "ranks", "told"),
    [
        ([[0, 1, 2]], ["one"], 2, "3 experts do not divide over 2 ranks"),
        ([[0, 1]], ["one"], 4, "2 experts do not divide over 4 ranks"),
        ([[0, 0]], ["one"], 2, "the placement of one does not hold each of 2 experts once"),
        ([[0, 1]], ["one", "two"], 2, "has 1 rows for 2 layers"),
    ],
)
def test_what_is_no_placement_is_refused(
    order: list[list[int]], layers: list[str], ranks: int, told: str
) -> None:
    with pytest.raises(ConfigError, match=told):
        Placement(tuple(layers), np.array(order), devices=ranks)

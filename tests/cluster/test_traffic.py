"""Bytes that ranks send, foreseen from shapes and routing, and counted as they are sent."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.expert_parallel import ExpertParallel
from cluster.trainer import Trainer
from tests.layouts import MODELS, Layout, loss, rows, train, trainer
from tests.ranks import on_ranks

LAYOUTS = [Layout(2, ep=1), Layout(4), Layout(4, ep=2), Layout(4, nodes=2), Layout(4, copies=True)]
FLOAT, SLOT = 4, 4
"""Bytes of a float32, and of a slot's number."""


def routing(one: Trainer, name: str, layout: Layout) -> dict[str, Tensor]:
    """The experts of this rank's tokens of step 1, by layer."""
    read = loss(name).reads(rows(1, layout, one.rank))
    with torch.no_grad():
        predicted = one.model.predictions(replace(read, routing=True))
    return {r.layer: r.routing for r in predicted.reports if r.routing is not None}


def pairs(experts_TK: Tensor, home_of: list[int]) -> Tensor:
    """bool [T, members]: whom each token has an expert with."""
    home_TK = torch.tensor(home_of)[experts_TK]
    return (home_TK[..., None] == torch.arange(max(home_of) + 1)).any(1)


def foreseen(one: Trainer, name: str, layout: Layout) -> dict[str, int]:
    """What this rank sends in a step, from shapes and from where its tokens go; of exchanges the
    rows of its own tokens both ways, and their gradients', whoever sends them."""
    config = MODELS[name][0]
    found = dict.fromkeys(("gradients", "weights", "dispatch", "combine", "across", "rows"), 0)
    for parameter, tensor in one.named.items():
        axis = one.mesh.axis(one.owners.axis(parameter))
        if one.owners.mine(parameter):
            found["weights"] += (axis.size - 1) * tensor.numel() * FLOAT
        else:
            found["gradients"] += tensor.numel() * FLOAT
    if not isinstance(one.dispatcher, ExpertParallel):
        return found
    width, choices = config.hidden_size, config.num_experts_per_tok
    me, places = one.dispatcher.index, one.dispatcher.placement
    for layer, experts_TK in routing(one, name, layout).items():
        rank_of = [0] * config.n_routed_experts
        for rank in range(places.ranks):
            for expert in places.at(layer, rank):
                rank_of[expert] = rank
        met_TW = pairs(experts_TK, rank_of)
        if layout.copies:
            sent = int((torch.tensor(rank_of)[experts_TK] != me).sum())
            found["rows"] += experts_TK.numel()
            hops, fields, across = [sent], 1, 0
        elif layout.nodes == 1:
            found["rows"] += int(met_TW.sum())
            hops, fields, across = [int(met_TW.sum() - met_TW[:, me].sum())], choices, 0
        else:
            devices = places.devices
            node, device = divmod(me, devices)
            met_TN = met_TW.unflatten(1, (places.nodes, devices)).any(2)
            found["rows"] += int(met_TN.sum())
            across = int(met_TN.sum() - met_TN[:, node].sum())
            met_TND = met_TW.unflatten(1, (places.nodes, devices))
            # Handed on by the rank in this one's place on each node, this node's too.
            within = int(met_TND.sum() - met_TND[:, :, device].sum())
            hops, fields = [across, within], choices
        row = width * FLOAT + fields * FLOAT + fields * SLOT
        back = (width + fields) * FLOAT
        found["dispatch"] += sum(hops) * (row + back)
        found["combine"] += sum(hops) * 2 * width * FLOAT
        found["across"] += across * (row + back + 2 * width * FLOAT)
    return found


def count(name: str) -> list[dict[str, Any]]:
    """What each layout's rank foresees, and what is counted."""
    seen = []
    for layout in LAYOUTS:
        if layout.world != dist.get_world_size():
            continue
        one = trainer(name, layout)
        wanted = foreseen(one, name, layout)
        # What was only asked for that is not counted.
        train(one, name, layout, [1])
        weights = one.reduction.bytes["weights"]
        seen.append(
            {"layout": str(layout), "wanted": wanted} | _counted(one) | {"weights": weights}
        )
    return seen


def _counted(one: Trainer) -> dict[str, Any]:
    return {"told": {k: v for k, v in one.telemetry.items() if not k.endswith("seconds")}}


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.slow), 4])
@pytest.mark.parametrize("name", ["v3", pytest.param("v4", marks=pytest.mark.slow)])
def test_bytes_of_a_step_are_those_that_shapes_foretell(
    name: str, world: int, tmp_path: Path
) -> None:
    ranks = on_ranks(world, tmp_path, count, name)
    for layout, *others in zip(*ranks, strict=True):
        every = [layout, *others]
        wanted = {key: sum(one["wanted"][key] for one in every) for key in layout["wanted"]}
        told = layout["told"]
        assert all(one["told"] == told for one in others)
        assert told["reduction/gradient_bytes"] == wanted["gradients"], layout["layout"]
        assert sum(one["weights"] for one in every) == wanted["weights"]
        assert told["reduction/weight_bytes"] == wanted["weights"]
        assert told["exchange/rows"] == wanted["rows"]
        across = told["exchange/dispatch_bytes_across"] + told["exchange/combine_bytes_across"]
        assert across == wanted["across"], layout["layout"]
        for kind in ("dispatch", "combine"):
            sent = sum(told[f"exchange/{kind}_bytes_{where}"] for where in ("within", "across"))
            assert sent == wanted[kind], (layout["layout"], kind)
    by_layout = {one["layout"]: one["told"] for one in ranks[0]}
    if world == 4:
        # A row for each rank in place of each expert.
        assert by_layout["4-ep4"]["exchange/rows"] < by_layout["4-ep4-copies"]["exchange/rows"]

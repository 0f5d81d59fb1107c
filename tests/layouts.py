"""Layouts of ranks that tests of training share, and what a trainer does in each."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import Tensor

from cluster.expert_parallel import ExpertParallel
from cluster.groups import Groups
from cluster.mesh import Mesh
from cluster.models import contiguous
from cluster.placement import Placement
from cluster.trainer import Trainer, build_trainer
from configs.model import ModelConfig
from configs.parallel import Recompute
from configs.train import BalanceConfig, Precision
from model.passes import IndexerPhase
from stages.pretrain.objective import PretrainLoss
from tests.cluster.jobs import OPTIM
from tests.references import TINY, random_tokens, tiny_v4, tiny_v32

ROWS, LENGTH = 8, 24
MODELS: dict[str, tuple[ModelConfig, IndexerPhase]] = {
    "v3": (TINY, "off"),
    "v3.2": (tiny_v32(), "sparse"),
    "v4": (tiny_v4(), "sparse"),
}
BALANCE = BalanceConfig(bias_update_speed=0.01)


@dataclass(frozen=True)
class Layout:
    """How so many ranks hold a model, and how tokens reach their experts."""

    world: int = 1
    ep: int | None = None
    nodes: int = 1
    permuted: int | None = None
    """The seed of experts' places; none is their order."""
    copies: bool = False
    idle: bool = False
    """Whether the last rank's rows are of no tokens at all."""

    def __str__(self) -> str:
        said = f"{self.world}-ep{self.ep or self.world}"
        said += "-two-hop" if self.nodes > 1 else ""
        said += "" if self.permuted is None else f"-permuted{self.permuted}"
        return said + ("-copies" if self.copies else "") + ("-idle" if self.idle else "")


def loss(name: str) -> PretrainLoss:
    """That of a family's pretraining."""
    return PretrainLoss(0.3, 0.05, attend_across_documents=False, indexer=MODELS[name][1])


def trainer(
    name: str,
    layout: Layout,
    *,
    seed: int = 0,
    precision: Precision = "high",
    recompute: Recompute = "none",
    exact: bool = False,
) -> Trainer:
    """One of a family in a layout; `exact`, in float64 with torch's own AdamW."""
    config, _ = MODELS[name]
    groups = None
    if layout.world > 1:
        mesh = Mesh.of(layout.world, dist.get_rank(), layout.ep)
        groups = Groups(mesh, 60, nodes=layout.nodes)
    placement = None
    if groups is not None and layout.permuted is not None:
        placement = permuted(contiguous(config, groups), layout.permuted)
    one = build_trainer(
        config,
        optim=OPTIM,
        balance=BALANCE,
        precision=precision,
        seed=seed,
        groups=groups,
        placement=placement,
        recompute=recompute,
    )
    if isinstance(one.dispatcher, ExpertParallel):
        one.dispatcher.copies = layout.copies
    if exact:
        one.model.double()
        one.optimizer = torch.optim.AdamW(one.optimizer.param_groups)  # type: ignore[assignment]
    return one


def permuted(places: Placement, seed: int) -> Placement:
    """The same layers over the same ranks, each layer's experts in an order of its own."""
    random = np.random.default_rng(seed)
    layers, slots = places.physical_to_logical.shape
    order_LR = np.stack([random.permutation(slots) for _ in range(layers)])
    return Placement(places.layers, order_LR, places.nodes, places.devices)


def rows(step: int, layout: Layout, rank: int) -> dict[str, Tensor]:
    """This rank's rows of a step: documents that end at different places."""
    tokens = random_tokens(ROWS, LENGTH, seed=step)
    for row in range(ROWS):
        tokens[row, row :: 7 + row] = 0
    if not layout.idle:
        return {"tokens": tokens.chunk(layout.world)[rank].clone()}
    busy = tokens.chunk(layout.world - 1)
    return {"tokens": busy[rank].clone() if rank < len(busy) else tokens[:0].clone()}


def train(one: Trainer, name: str, layout: Layout, steps: Sequence[int]) -> list[dict[str, Any]]:
    """Reports of some steps."""
    return [one.train_step(rows(step, layout, one.rank), loss(name), 1e-2) for step in steps]


def gradients(one: Trainer, name: str, layout: Layout) -> dict[str, Any]:
    """Of the first step, what this rank owns: experts by number."""
    one._backward([rows(1, layout, one.rank)], loss(name), counting=False)
    owned = {n: g for n, g in one._grads().items() if one.owners.mine(n)}
    found = logical(one, owned)
    one.optimizer.zero_grad()
    one.reduction.learnt = set()
    one.load_LE.zero_()
    return found


def logical(one: Trainer, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Stacks of experts as one tensor each, by the expert's number; all else as it is."""
    found: dict[str, Tensor] = {}
    local = one.experts_here()
    for name, tensor in tensors.items():
        experts = local.get(name.rpartition(".")[0])
        if experts is None:
            found[name] = tensor.clone()
        else:
            found |= {f"{name}#{e}": row.clone() for e, row in zip(experts, tensor, strict=True)}
    return found


def joined(ranks: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What ranks own together; each tensor once."""
    names = [name for rank in ranks for name in rank]
    assert len(names) == len(set(names))
    return {name: tensor for rank in ranks for name, tensor in rank.items()}


def saved(folder: Path) -> dict[str, Tensor]:
    """All that a save holds, by global name; each once."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("rank-*.safetensors")):
        shard = load_file(path)
        assert not found.keys() & shard.keys()
        found |= shard
    return found

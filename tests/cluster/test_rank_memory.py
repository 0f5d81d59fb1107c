"""What a rank holds at the most, beside what its layout says that it must hold."""

import json
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

from cluster.groups import Groups
from cluster.memory import held_by
from cluster.mesh import Mesh
from cluster.trainer import Trainer, build_trainer
from configs.model import V3Config
from configs.train import BalanceConfig
from tests.cluster.jobs import OPTIM, NextToken
from tests.ranks import on_ranks
from tests.references import TINY

pytestmark = pytest.mark.slow
LAYERS, FLOAT = 12, 4
OPTIM_32 = OPTIM.model_copy(update={"moments": "float32"})
MODEL = V3Config.model_validate(
    TINY.model_dump()
    | {
        "hidden_size": 512,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 2048,
        "moe_intermediate_size": 512,
        "q_lora_rank": 256,
        "kv_lora_rank": 128,
        "num_attention_heads": 8,
        "qk_nope_head_dim": 64,
        "qk_rope_head_dim": 32,
        "v_head_dim": 64,
        "num_nextn_predict_layers": 1,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 8,
    }
)
"""400 MB of weights, next to no activations, and tokens that visit every expert."""


def most_allocated(action: Callable[[], object], folder: Path) -> int:
    """Bytes that CPU tensors had at the most within `action`, beyond those of its beginning."""
    trace = folder / f"trace-{dist.get_rank()}.json"
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        action()
    seen.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    changes = [
        (float(one["ts"]), int(one["args"]["Bytes"]))
        for one in events
        if one.get("name") == "[memory]"
    ]
    return max(accumulate(bytes_ for _, bytes_ in sorted(changes)))


def foreseen(one: Trainer) -> int:
    """Bytes: all weights here, moments of what is owned, and its gradients with those of the layers
    that are on their way: one that the backward pass is in, and two that travel or arrive."""
    sizes = {name: tensor.numel() for name, tensor in one.named.items()}
    owned = sum(size for name, size in sizes.items() if one.owners.mine(name))
    layers = [sum(sizes[n] for n in names) for names in one.reduction.layers.values()]
    return FLOAT * (sum(sizes.values()) + 2 * owned + owned + 3 * max(layers, default=0))


def measure(ep: int, folder: str) -> dict[str, Any]:
    """The peak of a second step, when moments are there, and what it should be."""
    world, rank = dist.get_world_size(), dist.get_rank()
    groups = Groups(Mesh.of(world, rank, ep), 60)
    batch = {"tokens": torch.randint(64, (1, 12))}
    one = build_trainer(
        MODEL,
        optim=OPTIM.model_copy(update={"moments": "float32"}),
        balance=BalanceConfig(),
        precision="high",
        seed=0,
        groups=groups,
    )
    one.train_step(batch, NextToken(), 1e-3)
    held = held_by(one.model, one.optimizer, 0)
    step = partial(one.train_step, batch, NextToken(), 1e-3)
    peak = held.weights + held.gradients + held.moments + most_allocated(step, Path(folder))
    return {"peak": peak, "wanted": foreseen(one)}


@pytest.mark.parametrize(("world", "ep"), [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)])
def test_a_rank_holds_what_its_layout_says(world: int, ep: int, tmp_path: Path) -> None:
    for seen in on_ranks(world, tmp_path, measure, ep, str(tmp_path)):
        print(f"{world} ranks, ep {ep}: {seen['peak']:,} of {seen['wanted']:,} bytes")
        assert seen["peak"] == pytest.approx(seen["wanted"], rel=0.1)

"""Experts over ranks: the layer is the local one, and no collective waits for ever."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.expert_parallel import ExchangeError, ExpertParallel
from cluster.groups import Groups
from cluster.models import contiguous
from cluster.placement import Placement
from configs.errors import ConfigError
from model.dispatch import Dispatcher
from model.moe import MoE
from model.passes import Whole
from model.transformer import Transformer
from tests.ranks import on_ranks
from tests.references import tiny

CONFIG = tiny(n_group=2, topk_group=1)
SPLITS = {1: [12], 2: [11, 1], 4: [5, 4, 0, 3]}
"""Tokens on each rank, of the same twelve."""


def layer(precision: str, dispatcher: Dispatcher | None) -> MoE:
    """The MoE block of a small model, whatever machines it is divided over."""
    model = Transformer(CONFIG, precision=precision, dispatcher=dispatcher)  # type: ignore[arg-type]
    block = model.initialize(0).train().moe_layers()["model.layers.1.mlp"]
    block.gate.e_score_correction_bias += torch.linspace(0, 0.3, 8)
    return block


def over_ranks(**more: bool) -> ExpertParallel:
    """Over the process group."""
    groups = Groups.of_world()
    return ExpertParallel(groups, contiguous(CONFIG, groups), **more)


def run(block: MoE, start: int, count: int) -> dict[str, Any]:
    """Some of the twelve tokens, there and back."""
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 12, 32, generator=generator)
    mine = x[start : start + count].clone().requires_grad_()
    out, report = block(mine.unsqueeze(0), Whole(torch.zeros(1, count, dtype=torch.int64)))
    out.backward(dy[start : start + count].unsqueeze(0))
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"out": out.detach()[0], "dx": mine.grad, "load": report.load_E, "grads": grads}


def run_on_rank(world: int) -> dict[str, Any]:
    """Both precisions on this rank's tokens; FP8 once more with rows that travel wide."""
    rank, split = dist.get_rank(), SPLITS[world]
    found: dict[str, Any] = {}
    for name in ("high", "fp8", "fp8-wide"):
        dispatcher = over_ranks(narrow=name != "fp8-wide")
        block = layer(name.partition("-")[0], dispatcher)
        found[name] = run(block, sum(split[:rank]), split[rank])
        traffic = dispatcher.traffic["model.layers.1"]
        found[name]["sent"] = traffic.bytes(across=False)
    return found


@pytest.fixture(scope="module", params=[1, 2, 4])
def ranks(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each rank of a group saw."""
    return on_ranks(request.param, tmp_path_factory.mktemp("ranks"), run_on_rank, request.param)


def total(ranks: list[dict[str, Any]], name: str, precision: str) -> Tensor:
    """A gradient of the whole: slices of experts side by side, everything else summed."""
    parts = [rank[precision]["grads"][name] for rank in ranks if name in rank[precision]["grads"]]
    return torch.cat(parts) if name.startswith("experts.") else torch.stack(parts).sum(0)


@pytest.mark.parametrize("precision", ["high", "fp8"])
def test_a_layer_over_ranks_is_the_layer_on_one(
    ranks: list[dict[str, Any]], precision: str
) -> None:
    whole = run(layer(precision, None), 0, 12)
    for what in ("out", "dx"):
        found = torch.cat([rank[precision][what] for rank in ranks])
        torch.testing.assert_close(found, whole[what], rtol=1e-4, atol=1e-5)
    assert torch.equal(sum(rank[precision]["load"] for rank in ranks), whole["load"])
    assert len(whole["grads"]) == 6
    for name, expected in whole["grads"].items():
        # A shared expert's FP8 weight gradient rounds along the tokens of its rank alone.
        if precision == "high" or name.startswith("experts.") or len(ranks) == 1:
            found = total(ranks, name, precision)
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_rows_in_fp8_are_those_that_the_receiver_would_quantise(
    ranks: list[dict[str, Any]],
) -> None:
    for rank in ranks:
        narrow, wide = rank["fp8"], rank["fp8-wide"]
        for what in ("out", "dx"):
            assert torch.equal(narrow[what], wide[what])
        for name, grad in wide["grads"].items():
            assert torch.equal(narrow["grads"][name], grad), name
        if any(one["fp8"]["out"].shape[0] for one in ranks) and len(ranks) > 1:
            assert narrow["sent"] <= wide["sent"]
    if len(ranks) > 1:
        saved = [sum(rank[name]["sent"] for rank in ranks) for name in ("fp8", "fp8-wide")]
        assert saved[0] < saved[1]


def refusal() -> str:
    """What a rank is told whose experts do not divide."""
    groups = Groups.of_world()
    try:
        ExpertParallel(groups, Placement.contiguous(["model.layers.1"], 7, devices=2))
    except ConfigError as error:
        return str(error)
    return ""


def test_experts_that_do_not_divide_over_the_ranks_are_refused(tmp_path: Path) -> None:
    assert set(on_ranks(2, tmp_path, refusal)) == {
        "7 experts do not divide over 2 ranks; change the model, cluster.trainers or cluster.ep"
    }


def leave_in_the_middle() -> list[Any]:
    """Rank 1 tells its counts, and then sends nothing; what rank 0 is told, and after how long."""
    dispatcher = over_ranks()
    block = layer("high", dispatcher)
    tokens = torch.zeros(1, 6, dtype=torch.int64)
    routed, _ = block.route(torch.randn(1, 6, 32), Whole(tokens))
    if dist.get_rank() == 1:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(dist, "all_to_all_single", lambda *given, **more: None)
            dispatcher.send(routed)
        time.sleep(5)
        return [0.0, ""]
    begun = time.monotonic()
    with pytest.raises(ExchangeError) as told:
        dispatcher.send(routed).rows()
    return [time.monotonic() - begun, str(told.value)]


def test_a_peer_that_stops_within_an_exchange_is_named_in_time(tmp_path: Path) -> None:
    waited, told = on_ranks(2, tmp_path, leave_in_the_middle, collective_seconds=2)[0]
    assert waited < 5
    assert told.startswith(
        "rank 0 waited for rank 1 of the ep axis of 2, and they did not exchange rows of "
        "model.layers.1 (dispatch): "
    )


def wait_for_a_rank_that_never_comes() -> float:
    """Seconds until rank 0's collective gives up; rank 1 stays away."""
    begin = time.monotonic()
    if dist.get_rank() == 0:
        with pytest.raises(RuntimeError, match=r"(?i)time"):
            dist.all_reduce(torch.ones(1))
    else:
        time.sleep(4)
    return time.monotonic() - begin


def test_a_collective_without_its_peer_fails_in_time(tmp_path: Path) -> None:
    group_timeout = 2.0
    waited, _ = on_ranks(
        2, tmp_path, wait_for_a_rank_that_never_comes, seconds=60, collective_seconds=group_timeout
    )
    assert group_timeout * 0.9 < waited < 4

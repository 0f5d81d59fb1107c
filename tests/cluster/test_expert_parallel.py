"""Experts over ranks: the layer is the local one, and no collective waits for ever."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.expert_parallel import AllToAllDispatcher, gather_copies, weigh
from configs.errors import ConfigError
from model.dispatch import LocalDispatcher, TokenDispatcher
from model.moe import MoE
from model.transformer import Transformer
from tests.ranks import on_ranks
from tests.references import relative_gap, tiny

CONFIG = tiny(n_group=2, topk_group=1)
SPLITS = {1: [12], 2: [11, 1], 4: [5, 4, 0, 3]}
"""Tokens on each rank, of the same twelve."""


def layer(precision: str, dispatcher: TokenDispatcher) -> MoE:
    """The MoE block of a small model, whatever machines it is divided over."""
    model = Transformer(CONFIG, precision=precision, dispatcher=dispatcher)  # type: ignore[arg-type]
    block = model.initialize(0).train().moe_layers()["model.layers.1.mlp"]
    block.gate.e_score_correction_bias += torch.linspace(0, 0.3, 8)
    return block


def run(block: MoE, start: int, count: int) -> dict[str, Any]:
    """Some of the twelve tokens, there and back."""
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, 12, 32, generator=generator)
    mine = x[start : start + count].clone().requires_grad_()
    out = block(mine.unsqueeze(0))
    out.backward(dy[start : start + count].unsqueeze(0))
    grads = {name: p.grad for name, p in block.named_parameters() if p.grad is not None}
    return {"out": out.detach()[0], "dx": mine.grad, "load": block.load_E, "grads": grads}


def run_on_rank(world: int) -> dict[str, Any]:
    """Both precisions on this rank's tokens."""
    rank, split = dist.get_rank(), SPLITS[world]
    return {
        precision: run(layer(precision, AllToAllDispatcher()), sum(split[:rank]), split[rank])
        for precision in ("high", "fp8")
    }


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


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a group of one rank saw."""
    seen: dict[str, Any] = on_ranks(1, tmp_path_factory.mktemp("rank"), run_on_rank, 1)[0]
    return seen


def test_where_gates_weigh_changes_fp8_by_no_more_than_its_rounding(
    one_rank: dict[str, Any],
) -> None:
    """Locally they weigh what experts' second product reads, over ranks what comes home.

    Other numbers are rounded, each to 4 bits: an error of about 2^-5.3 (a 40th) of its size, and
    half the square of what two of those make is 7e-4.
    """
    local = run(layer("fp8", LocalDispatcher()), 0, 12)
    assert relative_gap(one_rank["fp8"]["out"], local["out"]) < 7e-4
    assert relative_gap(one_rank["fp8"]["dx"], local["dx"]) < 2 * 7e-4


@pytest.mark.parametrize("precision", ["high", "fp8"])
def test_a_layer_over_ranks_is_the_layer_on_one(
    ranks: list[dict[str, Any]], one_rank: dict[str, Any], precision: str
) -> None:
    whole = one_rank["fp8"]
    if precision == "high":
        whole = run(layer(precision, LocalDispatcher()), 0, 12)
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


def refusal() -> str:
    """What a rank is told whose experts do not divide."""
    try:
        AllToAllDispatcher().local_experts(7)
    except ConfigError as error:
        return str(error)
    return ""


def test_experts_that_do_not_divide_over_the_ranks_are_refused(tmp_path: Path) -> None:
    assert set(on_ranks(2, tmp_path, refusal)) == {
        "7 experts do not divide over 2 ranks; change the model, cluster.trainers or cluster.ep"
    }


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


def grads_of(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((y * weights).sum(), leaves)


def test_gathered_copies_and_their_gradient_are_those_of_indexing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, requires_grad=True)
    order_N = torch.randperm(10, generator=generator)
    found, expected = gather_copies(x, order_N, 2), x[order_N // 2]
    assert torch.equal(found, expected)
    torch.testing.assert_close(grads_of(found, x), grads_of(expected, x))


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    gates = torch.rand(3, 2, requires_grad=True)
    order_N = torch.arange(6)
    for y in (gather_copies(x, order_N, 2), weigh(x.repeat(2, 1), gates, order_N)):
        leaf = x if y.shape[0] == 6 else gates
        (slope,) = torch.autograd.grad(y.square().sum(), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            slope.sum().backward()


def test_results_are_summed_with_their_gates_wherever_they_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(6, 4, generator=generator, requires_grad=True)
    gates = torch.rand(3, 2, generator=generator, requires_grad=True)
    order_N = torch.randperm(6, generator=generator)
    expected = torch.stack(
        [flat[2 * t] * gates[t, 0] + flat[2 * t + 1] * gates[t, 1] for t in range(3)]
    )
    found = weigh(flat[order_N], gates, order_N)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads_of(found, flat, gates), grads_of(expected, flat, gates))

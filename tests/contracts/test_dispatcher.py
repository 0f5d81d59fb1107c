"""What every TokenDispatcher promises, asked of each of them on one, two and four ranks."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cluster.expert_parallel import AllToAllDispatcher
from model.dispatch import LocalDispatcher, TokenDispatcher
from tests.ranks import on_ranks

EXPERTS, CHOICES, WIDTH = 8, 3, 5
CASES = {
    "even": [6, 6, 6, 6],
    "ragged": [9, 0, 4, 1],
    "greedy": [7, 3, 5, 2],
    "none": [0, 0, 0, 0],
}
"""Tokens on each rank. In `greedy` every token wants the same experts, so that most get nothing."""
DISPATCHERS = [("local", 1), ("all-to-all", 1), ("all-to-all", 2), ("all-to-all", 4)]


@dataclass(frozen=True)
class Part:
    """One rank's tokens. The first column of x is the token's number, whole and unique."""

    x_TD: Tensor
    experts_TK: Tensor
    gates_TK: Tensor
    dy_TD: Tensor


def parts(case: str, world: int) -> list[Part]:
    """Every rank's tokens, the same in every process."""
    generator = torch.Generator().manual_seed(0)
    found, start = [], 0
    for count in CASES[case][:world]:
        x_TD = torch.randn(count, WIDTH, generator=generator)
        x_TD[:, 0] = torch.arange(start, start + count)
        scores_TE = torch.rand(count, EXPERTS, generator=generator)
        if case == "greedy":
            scores_TE[:, :CHOICES] += 1
        experts_TK = scores_TE.topk(CHOICES).indices
        gates_TK = torch.rand(count, CHOICES, generator=generator)
        dy_TD = torch.randn(count, WIDTH, generator=generator)
        found.append(Part(x_TD, experts_TK, gates_TK, dy_TD))
        start += count
    return found


def weights() -> Tensor:
    """One matrix for each expert; tokens' numbers do not saturate what follows."""
    generator = torch.Generator().manual_seed(1)
    return 0.05 * torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator)


def visit(weight_DD: Tensor, x_ND: Tensor) -> Tensor:
    """What an expert does in this suite: something that is not linear."""
    return torch.tanh(x_ND @ weight_DD)


def carry(dispatcher: TokenDispatcher, part: Part) -> dict[str, Any]:
    """Dispatch, visit the local experts, combine, go back; all that there is to see."""
    local = dispatcher.local_experts(EXPERTS)
    x_TD, gates_TK = part.x_TD.clone().requires_grad_(), part.gates_TK.clone().requires_grad_()
    w_EDD = weights()[local.start : local.stop].requires_grad_()
    counts_E = torch.bincount(part.experts_TK.flatten(), minlength=EXPERTS)
    sent = dispatcher.dispatch(x_TD, part.experts_TK, gates_TK, counts_E)
    pieces = sent.x_RD[sent.rows_N].split(sent.counts_E.tolist())
    y_ND = torch.cat([visit(w, piece) for w, piece in zip(w_EDD, pieces, strict=True)])
    out_TD = dispatcher.combine(sent.collect(y_ND), gates_TK, sent)
    out_TD.backward(part.dy_TD)
    return {
        "out": out_TD.detach(),
        "received": sent.x_RD[sent.rows_N].detach(),
        "counts": sent.counts_E,
        "local": [local.start, local.stop],
        "dx": x_TD.grad,
        "dgates": gates_TK.grad,
        "dweights": w_EDD.grad,
    }


def carry_on_rank(world: int) -> list[dict[str, Any]]:
    """Every case on this rank of an all-to-all."""
    dispatcher = AllToAllDispatcher()
    assert isinstance(dispatcher, TokenDispatcher)
    return [carry(dispatcher, parts(case, world)[dispatcher.rank]) for case in CASES]


@pytest.fixture(scope="module", params=DISPATCHERS, ids=lambda param: f"{param[0]}-{param[1]}")
def seen(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank saw."""
    kind, world = request.param
    folder: Path = tmp_path_factory.mktemp("ranks")
    if kind == "local":
        dispatcher = LocalDispatcher()
        assert isinstance(dispatcher, TokenDispatcher)
        ranks = [[carry(dispatcher, parts(case, 1)[0]) for case in CASES]]
    else:
        ranks = on_ranks(world, folder, carry_on_rank, world)
    return {case: [rank[i] for rank in ranks] for i, case in enumerate(CASES)}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> str:
    """One of the cases."""
    name: str = request.param
    return name


Seen = dict[str, list[dict[str, Any]]]


def expected(case: str, world: int) -> dict[str, Any]:
    """Outputs and gradients of the whole, by a loop over tokens and choices."""
    own = parts(case, world)
    x, gates = (
        torch.cat([getattr(part, name) for part in own]).requires_grad_()
        for name in ("x_TD", "gates_TK")
    )
    experts = torch.cat([part.experts_TK for part in own])
    w_EDD = weights().requires_grad_()
    rows = [torch.zeros(0, WIDTH)]
    for t in range(len(x)):
        row = torch.zeros(1, WIDTH)
        for k in range(CHOICES):
            row = row + gates[t, k] * visit(w_EDD[experts[t, k]], x[t : t + 1])
        rows.append(row)
    out = torch.cat(rows)
    if len(x):
        out.backward(torch.cat([part.dy_TD for part in own]))
    grads = [
        torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in (x, gates, w_EDD)
    ]
    return {"out": out.detach(), "dx": grads[0], "dgates": grads[1], "dweights": grads[2]}


@pytest.mark.parametrize("what", ["out", "dx", "dgates", "dweights"])
def test_results_and_gradients_are_those_of_a_loop(seen: Seen, case: str, what: str) -> None:
    found = torch.cat([rank[what] for rank in seen[case]])
    reference = expected(case, len(seen[case]))[what]
    torch.testing.assert_close(found, reference, rtol=1e-5, atol=1e-5)


def test_every_copy_arrives_once_at_its_expert(seen: Seen, case: str) -> None:
    own = parts(case, len(seen[case]))
    wanted: list[list[int]] = [[] for _ in range(EXPERTS)]
    for part in own:
        for x_D, experts_K in zip(part.x_TD, part.experts_TK.tolist(), strict=True):
            for expert in experts_K:
                wanted[expert].append(int(x_D[0]))
    # In the order of ranks, and of tokens on each: sums over an expert's rows repeat exactly.
    found = [
        piece[:, 0].int().tolist()
        for rank in seen[case]
        for piece in rank["received"].split(rank["counts"].tolist())
    ]
    assert found == wanted


def test_no_token_is_dropped_or_made(seen: Seen, case: str) -> None:
    ranks = seen[case]
    total = sum(CASES[case][: len(ranks)]) * CHOICES
    assert sum(int(rank["counts"].sum()) for rank in ranks) == total
    assert sum(len(rank["received"]) for rank in ranks) == total
    for rank in ranks:
        assert rank["counts"].dtype == torch.int64
        assert len(rank["counts"]) == rank["local"][1] - rank["local"][0]


def test_each_expert_lives_in_one_place(seen: Seen) -> None:
    for ranks in seen.values():
        homes = [expert for rank in ranks for expert in range(*rank["local"])]
        assert homes == list(range(EXPERTS))

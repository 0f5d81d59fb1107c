"""What every Dispatcher promises, asked of each of them on one, two and four ranks."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from cluster.expert_parallel import ExpertParallel
from cluster.groups import Groups
from cluster.mesh import Mesh
from cluster.placement import Placement
from model.dispatch import Dispatcher, LocalDispatcher, Routed
from tests.ranks import on_ranks

LAYER = "model.layers.1"
EXPERTS, CHOICES, WIDTH = 8, 3, 5
CASES = {
    "even": [6, 6, 6, 6],
    "ragged": [9, 0, 4, 1],
    "greedy": [7, 3, 5, 2],
    "none": [0, 0, 0, 0],
}
"""Tokens on each rank. In `greedy` every token wants the same experts, so that most get nothing."""
DISPATCHERS = [
    ("local", 1),
    ("flat", 1),
    ("flat", 2),
    ("flat", 4),
    ("copies", 2),
    ("copies", 4),
    ("permuted", 4),
    ("two-hop", 4),
    ("two-hop-copies", 4),
]


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
        x_TD = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        x_TD[:, 0] = torch.arange(start, start + count)
        scores_TE = torch.rand(count, EXPERTS, generator=generator)
        if case == "greedy":
            scores_TE[:, :CHOICES] += 1
        experts_TK = scores_TE.topk(CHOICES).indices
        gates_TK = torch.rand(count, CHOICES, generator=generator, dtype=torch.float64)
        dy_TD = torch.randn(count, WIDTH, generator=generator, dtype=torch.float64)
        found.append(Part(x_TD, experts_TK, gates_TK, dy_TD))
        start += count
    return found


def weights() -> Tensor:
    """One matrix for each expert; tokens' numbers do not saturate what follows."""
    generator = torch.Generator().manual_seed(1)
    return 0.05 * torch.randn(EXPERTS, WIDTH, WIDTH, generator=generator, dtype=torch.float64)


def visit(weight_DD: Tensor, x_ND: Tensor) -> Tensor:
    """What an expert does in this suite: something that is not linear."""
    return torch.tanh(x_ND @ weight_DD)


def carry(dispatcher: Dispatcher, part: Part) -> dict[str, Any]:
    """Send, visit the local experts, bring back, go back; all that there is to see."""
    local = dispatcher.experts(LAYER)
    x_TD, gates_TK = part.x_TD.clone().requires_grad_(), part.gates_TK.clone().requires_grad_()
    w_EDD = weights()[list(local)].requires_grad_()
    counts_E = torch.bincount(part.experts_TK.flatten(), minlength=EXPERTS)
    flight = dispatcher.send(Routed(LAYER, x_TD, part.experts_TK, gates_TK, counts_E))
    sent = flight.rows()
    pieces = sent.x_RD[sent.rows_N].split(sent.counts_E.tolist())
    y_ND = torch.cat([visit(w, piece) for w, piece in zip(w_EDD, pieces, strict=True)])
    returning = flight.back(sent.collect(y_ND))
    out_TD = returning.home()
    assert flight.layer == returning.layer == LAYER
    told = [
        [journey.bytes_within, journey.bytes_across, int(journey.exposed_seconds >= 0)]
        for journey in (flight, returning)
    ]
    out_TD.backward(part.dy_TD)
    return {
        "out": out_TD.detach(),
        "received": sent.x_RD[sent.rows_N].detach(),
        "rows": len(sent.x_RD),
        "counts": sent.counts_E,
        "local": list(local),
        "dx": x_TD.grad,
        "dgates": gates_TK.grad,
        "dweights": w_EDD.grad,
        "told": told,
    }


def over(kind: str) -> ExpertParallel:
    """The dispatcher of a kind on this rank."""
    world = dist.get_world_size()
    nodes = 2 if kind.startswith("two-hop") else 1
    groups = Groups(Mesh.of(world, dist.get_rank()), 60, nodes=nodes)
    placement = Placement.contiguous([LAYER], EXPERTS, nodes=nodes, devices=world // nodes)
    if kind == "permuted":
        order_E = np.random.default_rng(3).permutation(EXPERTS)
        placement = Placement((LAYER,), order_E[None], 1, world)
    return ExpertParallel(groups, placement, copies=kind.endswith("copies"))


def carry_on_rank(kinds: list[str]) -> dict[str, list[dict[str, Any]]]:
    """Every case of some kinds on this rank."""
    own = [parts(case, dist.get_world_size())[dist.get_rank()] for case in CASES]
    found = {}
    for kind in kinds:
        dispatcher = over(kind)
        assert isinstance(dispatcher, Dispatcher)
        found[kind] = [carry(dispatcher, part) for part in own]
    return found


@pytest.fixture(scope="module")
def of_world(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[[int], list[dict[str, list[dict[str, Any]]]]]:
    """What each of so many ranks saw, by kind; started once for all kinds."""

    @cache
    def found(world: int) -> list[dict[str, list[dict[str, Any]]]]:
        kinds = [kind for kind, size in DISPATCHERS if size == world and kind != "local"]
        return on_ranks(world, tmp_path_factory.mktemp("ranks"), carry_on_rank, kinds)

    return found


@pytest.fixture(scope="module", params=DISPATCHERS, ids=lambda param: f"{param[0]}-{param[1]}")
def seen(
    request: pytest.FixtureRequest,
    of_world: Callable[[int], list[dict[str, list[dict[str, Any]]]]],
) -> dict[str, list[dict[str, Any]]]:
    """Case -> what each rank saw."""
    kind, world = request.param
    if kind == "local":
        dispatcher = LocalDispatcher(EXPERTS)
        assert isinstance(dispatcher, Dispatcher)
        ranks = [[carry(dispatcher, parts(case, 1)[0]) for case in CASES]]
    else:
        ranks = [rank[kind] for rank in of_world(world)]
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
    rows = [x.new_zeros(0, WIDTH)]
    for t in range(len(x)):
        row = x.new_zeros(1, WIDTH)
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
    ranks = seen[case]
    reference = expected(case, len(ranks))[what]
    if what == "dweights":
        reference = reference[[expert for rank in ranks for expert in rank["local"]]]
    found = torch.cat([rank[what] for rank in ranks])
    torch.testing.assert_close(found, reference, rtol=1e-12, atol=1e-12)


def test_every_visit_is_made_once(seen: Seen, case: str) -> None:
    own = parts(case, len(seen[case]))
    wanted: dict[int, list[int]] = {expert: [] for expert in range(EXPERTS)}
    for part in own:
        for x_D, experts_K in zip(part.x_TD, part.experts_TK.tolist(), strict=True):
            for expert in experts_K:
                wanted[expert].append(int(x_D[0]))
    found: dict[int, list[int]] = {}
    for rank in seen[case]:
        pieces = rank["received"].split(rank["counts"].tolist())
        for expert, piece in zip(rank["local"], pieces, strict=True):
            # The order of visits is the dispatcher's own.
            found[expert] = sorted(piece[:, 0].int().tolist())
    assert found == {expert: sorted(tokens) for expert, tokens in wanted.items()}


def test_no_token_is_dropped_or_made(seen: Seen, case: str) -> None:
    ranks = seen[case]
    total = sum(CASES[case][: len(ranks)]) * CHOICES
    assert sum(int(rank["counts"].sum()) for rank in ranks) == total
    assert sum(len(rank["received"]) for rank in ranks) == total
    for rank in ranks:
        assert rank["counts"].dtype == torch.int64
        assert len(rank["counts"]) == len(rank["local"])


def test_each_expert_lives_in_one_place(seen: Seen) -> None:
    for ranks in seen.values():
        homes = [expert for rank in ranks for expert in rank["local"]]
        assert sorted(homes) == list(range(EXPERTS))


def test_a_journey_tells_what_it_sent(seen: Seen, case: str) -> None:
    """All together: what leaves no rank is no traffic."""
    ranks = seen[case]
    sent = sum(count for rank in ranks for journey in rank["told"] for count in journey[:2])
    assert all(journey[2] for rank in ranks for journey in rank["told"])
    assert bool(sent) == (len(ranks) > 1 and case != "none")

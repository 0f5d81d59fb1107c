"""The dispatcher over the expert axis: one all-to-all carries tokens out, one brings them back.

Each rank holds an equal, contiguous slice of every layer's experts. Counts travel first, then all
token copies in one exchange, sorted by expert; the receiver sorts what came from several ranks so
that each of its experts has its rows together.

Axes: T tokens on this rank, K choices, N copies (sent or received), W ranks, E experts, D width.
"""

from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from cluster.backend import CPU, Backend
from configs.errors import ConfigError, MachineError
from model.dispatch import Dispatched, sort_by_expert
from model.rows import ByRow, inverse

_NAME_BYTES = 64
"""Of a device's name, as ranks tell each other."""


@dataclass(frozen=True, slots=True)
class _Ticket:
    """What `combine` needs to undo a dispatch."""

    order_N: Tensor
    """Send order of this rank's own copies."""
    sent: list[int]
    received: list[int]


class AllToAllDispatcher:
    """A TokenDispatcher over a process group."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group)
        self.world = dist.get_world_size(group)

    def local_experts(self, num_experts: int) -> range:
        """This rank's slice; ConfigError if the experts do not divide over the ranks."""
        if num_experts % self.world:
            raise ConfigError(
                f"{num_experts} experts do not divide over {self.world} ranks; change the model, "
                "cluster.trainers or cluster.ep"
            )
        each = num_experts // self.world
        return range(self.rank * each, (self.rank + 1) * each)

    def dispatch(
        self,
        x_TD: Float[Tensor, "T D"],
        experts_TK: Int[Tensor, "T K"],
        gates_TK: Float[Tensor, "T K"],
        counts_E: Int[Tensor, " E"],
    ) -> Dispatched:
        """Send each token's copies to the ranks of its experts; gates stay at home."""
        order_N = sort_by_expert(experts_TK)
        counts_WL = counts_E.unflatten(0, (self.world, -1))
        arriving_WL = torch.empty_like(counts_WL)
        dist.all_to_all_single(arriving_WL, counts_WL.contiguous(), group=self.group)
        # The host needs both counts to size what comes, and waits for the device and its peers.
        sent = counts_WL.sum(1).tolist()
        received = arriving_WL.sum(1).tolist()
        outgoing_ND = gather_copies(x_TD, order_N, experts_TK.shape[1])
        incoming_RD = _exchange(outgoing_ND, sent, received, self.group)
        # Rows arrive by rank, then by expert; number each row's expert and sort stably.
        experts = torch.arange(arriving_WL.shape[1], device=arriving_WL.device)
        local = experts.repeat(self.world)
        expert_N = local.repeat_interleave(arriving_WL.flatten())
        rows_N = expert_N.argsort(stable=True)
        ticket = _Ticket(order_N, sent, received)
        every_R = torch.arange(len(rows_N), device=rows_N.device)
        home = ByRow(rows_N, inverse(rows_N), every_R)
        return Dispatched(incoming_RD, rows_N, arriving_WL.sum(0), None, ticket, home)

    def combine(
        self, y_RD: Float[Tensor, "R D"], gates_TK: Float[Tensor, "T K"], sent: Dispatched
    ) -> Float[Tensor, "T D"]:
        """Send results back to the tokens' ranks and sum them with their gates."""
        ticket = sent.ticket
        assert isinstance(ticket, _Ticket)
        home_ND = _exchange(y_RD, ticket.received, ticket.sent, self.group)
        return weigh(home_ND, gates_TK, ticket.order_N)


def _exchange(
    x_ND: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    exchanged: Tensor = _AllToAll.apply(x_ND, sent, received, group)
    return exchanged


class _AllToAll(torch.autograd.Function):
    """Rows out by `sent`, in by `received`; gradients travel the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
        ctx.splits = (sent, received, group)
        return _all_to_all(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        sent, received, group = ctx.splits
        return _all_to_all(grads[0], received, sent, group), None, None, None


def _all_to_all(x: Tensor, sent: list[int], received: list[int], group: Any) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


def gather_copies(x_TD: Tensor, order_N: Tensor, choices: int) -> Tensor:
    """Row order[n] // choices of x for each n, with a gradient that adds a token's K copies."""
    gathered: Tensor = _GatherCopies.apply(x_TD, order_N, choices)
    return gathered


def weigh(y_ND: Tensor, gates_TK: Tensor, order_N: Tensor) -> Tensor:
    """Sum of each token's K rows with its K gates; row n of `y` is copy order[n] = t * K + k."""
    summed: Tensor = _Weigh.apply(y_ND, gates_TK.to(y_ND.dtype), order_N)
    return summed


def _sum_of_rows(y_ND: Tensor, rows_TK: Tensor, gates_TK: Tensor | None = None) -> Tensor:
    """Sum over k of y[rows[t, k]] (* gates[t, k]), in the order of k, without gathering them."""
    return F.embedding_bag(rows_TK, y_ND, mode="sum", per_sample_weights=gates_TK)


class _GatherCopies(torch.autograd.Function):
    """Backward is a fixed-order sum: quicker than index_add, and deterministic."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_N: Tensor, choices: int) -> Tensor:
        ctx.save_for_backward(order_N)
        ctx.choices = choices
        return x_TD.index_select(0, order_N // choices)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (order_N,) = ctx.saved_tensors
        return _sum_of_rows(grads[0], inverse(order_N).view(-1, ctx.choices)), None, None


class _Weigh(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_ND: Tensor, gates_TK: Tensor, order_N: Tensor) -> Tensor:
        ctx.save_for_backward(y_ND, gates_TK, order_N)
        return _sum_of_rows(y_ND, inverse(order_N).view_as(gates_TK), gates_TK)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        y_ND, gates_TK, order_N = ctx.saved_tensors
        d_y_ND = grads[0].index_select(0, order_N // gates_TK.shape[1])
        d_gates_TK = torch.empty_like(gates_TK)
        d_gates_TK.view(-1)[order_N] = (d_y_ND * y_ND).sum(1)
        return d_y_ND.mul_(gates_TK.view(-1)[order_N].unsqueeze(1)), d_gates_TK, None


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

"""The dispatcher over the expert axis: token rows travel out to experts, and their sums come home.

A token's row travels once to each rank that holds any of its experts, with the numbers and gates of
those; what comes home is the rank's sum. Where the axis spans several nodes of several ranks each,
it travels once to each node, to the rank of its own place there, which hands it on inside
(DeepSeek-V3, section 3.2.2). Ranks tell each other all counts in one gathering, which the host
waits for; the exchanges themselves begin with `send` and `back`, and `rows` and `home` wait for
them.

FP8 experts' rows travel as they read them, values and scales; sums come home in the type of the
states, and so do all gradients.

Axes: T tokens, K choices, N rows sent, R rows received, W members of a group, E experts, D width,
B bytes of a row.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.autograd.function import once_differentiable

from cluster.device_errors import first_line
from cluster.groups import Groups
from cluster.placement import Placement
from configs.errors import ConfigError
from model.dispatch import Dispatched, Routed, sort_by_expert
from model.fp8.quantized import ACTIVATION, Quantized
from model.rows import ByRow

Kind = Literal["dispatch", "combine"]
"""Of an exchange: rows on the way out, or their sums on the way home; gradients go the other way
and count as what they are gradients of."""
KINDS: tuple[Kind, ...] = "dispatch", "combine"


class ExchangeError(RuntimeError):
    """A peer did not do its part of an exchange, and the others gave up."""


@dataclass(slots=True)
class Traffic:
    """What a rank sent in one layer, and how long it waited."""

    sent: dict[tuple[Kind, bool], int] = field(default_factory=dict)
    """Bytes to other ranks, by kind and by whether they left the node."""
    rows: int = 0
    """Rows of tokens sent, those that stayed included; in two hops the first's."""
    exposed_seconds: float = 0.0
    hidden_seconds: float = 0.0

    def bytes(self, *, across: bool) -> int:
        """All bytes that left the node, or those that did not."""
        return sum(count for (_, left), count in self.sent.items() if left == across)


@dataclass(frozen=True, slots=True)
class _Group:
    """Members of one hop."""

    group: dist.ProcessGroup | None
    ranks: tuple[int, ...]
    me: int
    """This rank's place among them."""
    nodes: tuple[int, ...]
    """The node of each."""


@dataclass(slots=True)
class _Leg:
    """One exchange over a group, begun and then waited for; gradients travel back on it."""

    where: _Group
    layer: str
    kind: Kind
    sent: list[int]
    received: list[int]
    traffic: Traffic
    started: float = 0.0
    work: Any = None
    arrived: Tensor | None = None
    own: Traffic = field(default_factory=Traffic)
    """Of the way there alone."""

    def begin(self, rows: Tensor, *, back: bool = False) -> None:
        """Send `rows`, those for each member in turn."""
        sent, received = (self.received, self.sent) if back else (self.sent, self.received)
        rows = rows.contiguous()
        row_bytes = rows.shape[1] * rows.element_size()
        for member, count in enumerate(sent):
            if member != self.where.me:
                across = self.where.nodes[member] != self.where.nodes[self.where.me]
                for traffic in (self.traffic,) if back else (self.traffic, self.own):
                    key = self.kind, across
                    traffic.sent[key] = traffic.sent.get(key, 0) + count * row_bytes
        self.arrived = rows.new_empty(sum(received), rows.shape[1])
        self.started = time.perf_counter()
        with _told(self.where, f"rows of {self.layer} ({self.kind})"):
            self.work = dist.all_to_all_single(
                self.arrived, rows, received, sent, group=self.where.group, async_op=True
            )

    def end(self, *, back: bool = False) -> Tensor:
        """What arrived."""
        assert self.arrived is not None, "nothing was sent"
        waiting = time.perf_counter()
        with _told(self.where, f"rows of {self.layer} ({self.kind})"):
            self.work.wait()
        for traffic in (self.traffic,) if back else (self.traffic, self.own):
            traffic.hidden_seconds += waiting - self.started
            traffic.exposed_seconds += time.perf_counter() - waiting
        arrived, self.arrived, self.work = self.arrived, None, None
        return arrived


@contextmanager
def _told(where: _Group, what: str) -> Iterator[None]:
    """Say of a collective that fails whom this rank waited for."""
    try:
        yield
    except (torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # This rank's own.
    except RuntimeError as error:
        rank = where.ranks[where.me]
        others = ", ".join(str(one) for one in where.ranks if one != rank)
        raise ExchangeError(
            f"rank {rank} waited for rank {others} of the ep axis of "
            f"{len(where.ranks)}, and they did not exchange {what}: {first_line(error)}"
        ) from error


@dataclass(frozen=True, slots=True)
class _Rows:
    """Tokens, or rows that stand for them, and what each is to visit."""

    x_RD: Tensor
    """What gradients go through; in FP8 the values are in `bytes_RB` alone."""
    gates_RK: Tensor
    slots_RK: Tensor
    """int32: slots in the layer; -1 for none."""
    bytes_RB: Tensor
    """uint8: a row's values, or in FP8 its values and scales."""
    is_fp8: bool


class _Out:
    """One hop of a dispatch."""

    def __init__(self, leg: _Leg, tokens: int, member_TK: Tensor, *, copies: bool) -> None:
        """`member` is who each choice goes to, -1 for nobody. Rows are sorted by member; with
        `copies` each choice is a row of its own, else each member's choices of a token are one."""
        self.leg, self.copies = leg, copies
        rows, choices = sum(leg.sent), member_TK.shape[1]
        members = len(leg.sent)
        if copies:
            # What goes to nobody is sorted behind the rest.
            key_TK = torch.where(member_TK < 0, members, member_TK)
            self.order_N = sort_by_expert(key_TK)[:rows]
            self.token_N = self.order_N // choices
            self.mine_NK = None
            # A token's copies are added up in the order of its choices, wherever they were sent.
            visit_N = self.order_N.argsort()
            every_T = torch.arange(tokens, device=visit_N.device)
            begin_T = torch.searchsorted(self.token_N[visit_N], every_T)
            self.by_token = ByRow(self.token_N, visit_N, begin_T)
        else:
            every_W = torch.arange(members, device=member_TK.device)
            hit_WTK = member_TK == every_W[:, None, None]
            hit_X = hit_WTK.any(2).flatten()
            self.order_N = hit_X.logical_not().to(torch.uint8).argsort(stable=True)[:rows]
            self.token_N = self.order_N % tokens if tokens else self.order_N
            self.mine_NK = hit_WTK.flatten(0, 1).index_select(0, self.order_N)
            self.by_token = ByRow.of(self.token_N, tokens)

    def begin(self, given: _Rows) -> Tensor:
        """Start on the way; what `end` wants."""
        mark: Tensor = _BeginOut.apply(given.x_RD, given.gates_RK, self, given)
        return mark

    def end(self, mark: Tensor, given: _Rows) -> _Rows:
        """What arrived."""
        x_RD, gates_RK, slots_RK, bytes_RB = _EndOut.apply(mark, self, given)
        return _Rows(x_RD, gates_RK, slots_RK, bytes_RB, given.is_fp8)

    def chosen(self, of_TK: Tensor, none: int) -> Tensor:
        """The choices of each row; `none` for those that are not its member's."""
        if self.mine_NK is None:
            return of_TK.flatten().index_select(0, self.order_N).unsqueeze(1)
        return of_TK.index_select(0, self.token_N).masked_fill(~self.mine_NK, none)

    def spread(self, of_NK: Tensor, shape: torch.Size) -> Tensor:
        """The gradient of what `chosen` gave: each choice was in one row."""
        if self.mine_NK is None:
            flat = of_NK.new_zeros(shape.numel())
            return flat.index_copy_(0, self.order_N, of_NK.squeeze(1)).view(shape)
        # What is not a row's has no visit, and so a gradient of 0.
        return self.by_token.sum(of_NK)


class _BeginOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, gates_TK: Tensor, out: _Out, given: _Rows) -> Tensor:
        ctx.out, ctx.shapes = out, (x_TD.shape, gates_TK.shape)
        parts = [
            given.bytes_RB.index_select(0, out.token_N),
            _as_bytes(out.chosen(gates_TK, 0)),
            _as_bytes(out.chosen(given.slots_RK, -1)),
        ]
        out.leg.begin(torch.cat(parts, dim=1))
        return x_TD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out: _Out = ctx.out
        (_, width), shape = ctx.shapes
        d_x_ND, d_gates_NK = out.leg.end(back=True).tensor_split((width,), dim=1)
        return out.by_token.sum(d_x_ND.contiguous()), out.spread(d_gates_NK, shape), None, None


class _EndOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mark: Tensor, out: _Out, given: _Rows) -> tuple[Tensor, ...]:
        ctx.out = out
        arrived = out.leg.end()
        choices = 1 if out.copies else given.slots_RK.shape[1]
        ends = arrived.shape[1] - 4 * choices, arrived.shape[1]
        begin = ends[0] - choices * given.gates_RK.element_size()
        bytes_RB = _cut(arrived, 0, begin, torch.uint8)
        gates_RK = _cut(arrived, begin, ends[0], given.gates_RK.dtype)
        slots_RK = _cut(arrived, *ends, torch.int32)
        if given.is_fp8:
            x_RD = mark.new_zeros(()).expand(len(arrived), given.x_RD.shape[1])
        else:
            x_RD = bytes_RB.view(given.x_RD.dtype)
        ctx.mark_non_differentiable(slots_RK, bytes_RB)
        return x_RD, gates_RK, slots_RK, bytes_RB

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        out: _Out = ctx.out
        out.leg.begin(torch.cat([grads[0], grads[1].to(grads[0].dtype)], dim=1), back=True)
        return grads[0].new_zeros(()), None, None


class _Home:
    """One hop of a combine: rows back to where they were sent from, and added up there."""

    def __init__(self, leg: _Leg, by_token: ByRow) -> None:
        self.leg, self.by_token = leg, by_token

    def begin(self, y_RD: Tensor) -> Tensor:
        """Start on the way; what `end` wants."""
        mark: Tensor = _BeginHome.apply(y_RD, self)
        return mark

    def end(self, mark: Tensor) -> Tensor:
        """The sum of each token's rows."""
        summed: Tensor = _EndHome.apply(mark, self)
        return summed


class _BeginHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_RD: Tensor, home: _Home) -> Tensor:
        ctx.home = home
        home.leg.begin(y_RD)
        return y_RD.new_zeros(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.home.leg.end(back=True), None


class _EndHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, mark: Tensor, home: _Home) -> Tensor:
        ctx.home = home
        return home.by_token.sum(home.leg.end())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        home: _Home = ctx.home
        home.leg.begin(grads[0].index_select(0, home.by_token.rows_N), back=True)
        return grads[0].new_zeros(()), None


class ExpertParallel:
    """A Dispatcher over the `ep` axis of a mesh."""

    def __init__(
        self, groups: Groups, placement: Placement, *, copies: bool = False, narrow: bool = True
    ) -> None:
        """`copies` sends a row for each expert that a token visits, in place of one for each rank;
        without `narrow`, rows of FP8 experts travel in the type of the states. Both are for
        comparison.

        ConfigError unless the placement is for as many ranks as the axis has.
        """
        axis = groups.mesh.axis("ep")
        if (placement.ranks, placement.nodes) != (axis.size, groups.nodes):
            raise ConfigError(
                f"a placement over {placement.ranks} ranks on {placement.nodes} nodes for an ep "
                f"axis of {axis.size} on {groups.nodes}; make it for the axis"
            )
        self.placement, self.copies, self.narrow = placement, copies, narrow
        self.index = axis.index
        self.traffic: dict[str, Traffic] = {}
        """By layer, since it was last emptied."""
        devices = placement.devices
        node, device = divmod(axis.index, devices)
        nodes = tuple(place // devices for place in range(axis.size))
        self.all = _Group(groups["ep"], axis.ranks, axis.index, nodes)
        self.hops = [self.all]
        if placement.nodes > 1 and devices > 1:
            across, within = groups.hops
            inside = slice(node * devices, (node + 1) * devices)
            self.hops = [
                _Group(across, axis.ranks[device::devices], node, nodes[device::devices]),
                _Group(within, axis.ranks[inside], device, nodes[inside]),
            ]
        self._slots: dict[tuple[str, torch.device], tuple[Tensor, Tensor]] = {}

    def experts(self, layer: str) -> tuple[int, ...]:
        """Those that the placement gives to this rank."""
        return self.placement.at(layer, self.index)

    def send(self, routed: Routed) -> "_Flight":
        """Tell all ranks how many rows come, wait for their numbers, and begin to send."""
        return _Flight(self, routed)

    def slots(self, layer: str, device: torch.device) -> tuple[Tensor, Tensor]:
        """int64 [E], [E]: the slot of each expert, and the expert of each slot."""
        if (layer, device) not in self._slots:
            place = self.placement.layers.index(layer)
            both = (
                self.placement.logical_to_physical[place, :, 0],
                self.placement.physical_to_logical[place],
            )
            slot_E, expert_E = (torch.from_numpy(one.copy()).to(device) for one in both)
            self._slots[layer, device] = slot_E, expert_E
        return self._slots[layer, device]


class _Journey:
    """What flights and returns tell of their exchanges."""

    def __init__(self, layer: str, legs: Sequence[_Leg]) -> None:
        self.layer, self.legs = layer, legs

    @property
    def bytes_within(self) -> int:
        return sum(leg.own.bytes(across=False) for leg in self.legs)

    @property
    def bytes_across(self) -> int:
        return sum(leg.own.bytes(across=True) for leg in self.legs)

    @property
    def exposed_seconds(self) -> float:
        return sum(leg.own.exposed_seconds for leg in self.legs)

    @property
    def hidden_seconds(self) -> float:
        return sum(leg.own.hidden_seconds for leg in self.legs)


class _Flight(_Journey):
    """Rows on their way to their experts: in one hop, or across nodes and then inside one."""

    def __init__(self, over: ExpertParallel, routed: Routed) -> None:
        self.over, self.tokens = over, len(routed.x_TD)
        # What is only asked, as of held-out text, is no part of a step.
        traffic = Traffic()
        if torch.is_grad_enabled():
            traffic = over.traffic.setdefault(routed.layer, traffic)
        slot_E, expert_E = over.slots(routed.layer, routed.x_TD.device)
        slots_TK = slot_E[routed.experts_TK].to(torch.int32)
        self._tell(slots_TK, routed.counts_E.index_select(0, expert_E), routed.layer)
        super().__init__(
            routed.layer,
            [_Leg(hop, routed.layer, "dispatch", *split, traffic) for hop, split in self._splits()],
        )
        traffic.rows += sum(self.legs[0].sent)
        x8_TD = routed.x8_TD if over.narrow else None
        x_bytes = _as_bytes(routed.x_TD.detach())
        if x8_TD is not None:
            x_bytes = torch.cat([_as_bytes(x8_TD.values), _as_bytes(x8_TD.scales)], dim=1)
        gates_TK = routed.gates_TK.to(routed.x_TD.dtype)
        self.given = _Rows(routed.x_TD, gates_TK, slots_TK, x_bytes, x8_TD is not None)
        self.outs = [self._out(0, self.given)]
        self.mark = self.outs[0].begin(self.given)

    def rows(self) -> Dispatched:
        """What arrived; of two hops the second is made here."""
        arrived = self.outs[0].end(self.mark, self.given)
        if len(self.legs) > 1:
            self.outs.append(self._out(1, arrived))
            arrived = self.outs[1].end(self.outs[1].begin(arrived), arrived)
        each = self.over.placement.slots_each
        key_RK = arrived.slots_RK - self.over.index * each
        # Behind all experts: choices that live elsewhere.
        order_N = sort_by_expert(key_RK.masked_fill(arrived.slots_RK < 0, each))[: self.visits]
        gates_N = arrived.gates_RK.flatten().index_select(0, order_N)
        x8_RD = None
        if arrived.is_fp8:
            width = arrived.x_RD.shape[1]
            values = _cut(arrived.bytes_RB, 0, width, torch.float8_e4m3fn)
            scales = _cut(arrived.bytes_RB, width, arrived.bytes_RB.shape[1], torch.float32)
            x8_RD = Quantized(values, scales, ACTIVATION)
        rows_N = order_N // arrived.slots_RK.shape[1]
        return Dispatched(arrived.x_RD, rows_N, self.counts_E, gates_N, x8_RD)

    def back(self, y_RD: Float[Tensor, "R D"]) -> "_Return":
        """Begin to send the sums home."""
        return _Return(self, y_RD)

    def _tell(self, slots_TK: Tensor, counts_S: Tensor, layer: str) -> None:
        """Gather what every rank sends: visits to each slot, rows to each rank and to each node."""
        placement = self.over.placement
        if self.over.copies:
            rows_W = counts_S.unflatten(0, (placement.ranks, -1)).sum(1)
            rows_N = rows_W.unflatten(0, (placement.nodes, -1)).sum(1)
        else:
            rank_TK = slots_TK // placement.slots_each
            rows_W = _reached(rank_TK, placement.ranks)
            rows_N = _reached(rank_TK // placement.devices, placement.nodes)
        own = torch.cat([counts_S, rows_W, rows_N])
        table = own.new_empty(placement.ranks, len(own))
        with _told(self.over.all, f"counts of {layer}"):
            dist.all_gather(list(table), own, group=self.over.all.group)
        # The host sizes by them what comes, and waits for the device and its peers here alone.
        counts, rows, nodes = table.cpu().split([len(counts_S), len(rows_W), len(rows_N)], 1)
        first = self.over.index * placement.slots_each
        mine = slice(first, first + placement.slots_each)
        self.counts_E = table[:, mine].sum(0)
        self.visits = int(counts[:, mine].sum())
        self._rows_WW, self._rows_WN = rows.numpy(), nodes.numpy()

    def _splits(self) -> list[tuple[_Group, tuple[list[int], list[int]]]]:
        """Each hop, and how many rows go to each of its members and come from it."""
        me, hops = self.over.index, self.over.hops
        if len(hops) == 1:
            split = self._rows_WW[me].tolist(), self._rows_WW[:, me].tolist()
            return [(hops[0], split)]
        devices = self.over.placement.devices
        node, device = divmod(me, devices)
        across = self._rows_WN[me].tolist(), self._rows_WN[device::devices, node].tolist()
        # Rows for a rank of this node, by the place of the rank that hands them on.
        passed_DW = self._rows_WW.reshape(-1, devices, len(self._rows_WW)).sum(0)
        first = node * devices
        within = passed_DW[device, first : first + devices].tolist(), passed_DW[:, me].tolist()
        return [(hops[0], across), (hops[1], within)]

    def _out(self, number: int, given: _Rows) -> _Out:
        placement, last = self.over.placement, number == len(self.legs) - 1
        member_TK = given.slots_RK // placement.slots_each
        if not last:
            member_TK = member_TK // placement.devices
        elif number:
            member_TK = (member_TK % placement.devices).masked_fill(given.slots_RK < 0, -1)
        tokens = len(given.slots_RK)
        return _Out(self.legs[number], tokens, member_TK, copies=self.over.copies)


class _Return(_Journey):
    """Sums on their way home: inside a node, and then across nodes where there were two hops."""

    def __init__(self, flight: _Flight, y_RD: Tensor) -> None:
        self.homes = []
        for out in reversed(flight.outs):
            there = out.leg
            leg = _Leg(
                there.where, there.layer, "combine", there.received, there.sent, there.traffic
            )
            self.homes.append(_Home(leg, out.by_token))
        super().__init__(flight.layer, [home.leg for home in self.homes])
        self.mark = self.homes[0].begin(y_RD)

    def home(self) -> Float[Tensor, "T D"]:
        """The tokens' sums."""
        y_TD = self.homes[0].end(self.mark)
        for home in self.homes[1:]:
            y_TD = home.end(home.begin(y_TD))
        return y_TD


def _reached(member_TK: Int[Tensor, "T K"], members: int) -> Int[Tensor, " W"]:
    """How many tokens have a choice with each member."""
    every_W = torch.arange(members, device=member_TK.device)
    return (member_TK == every_W[:, None, None]).any(2).sum(1)


def _cut(bytes_RB: Tensor, begin: int, end: int, dtype: torch.dtype) -> Tensor:
    """Some columns as values of a type, in memory of their own, where they are aligned to it."""
    return bytes_RB[:, begin:end].clone(memory_format=torch.contiguous_format).view(dtype)


def _as_bytes(x: Tensor) -> UInt8[Tensor, "N B"]:
    return x.contiguous().view(torch.uint8)

"""The seam between routing and machines: carry tokens to their experts and results back.

Each way has two phases: `send` and `back` begin an exchange, `rows` and `home` wait for its end.
What is computed between them is computed while rows travel.

Axes: T tokens on this device, K choices a token, R rows received, N visits of a row to an expert
of this device, D width, E experts.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.fp8.quantized import Quantized
from model.rows import ByRow, inverse


@dataclass(frozen=True, slots=True)
class Routed:
    """Where the tokens of one layer go."""

    layer: str
    """The layer's module name, as `model.layers.3`."""
    x_TD: Tensor
    experts_TK: Tensor
    """int64: the experts of each token, all different."""
    gates_TK: Tensor
    """The weight of each in the token's sum."""
    counts_E: Tensor
    """int64: how often each expert was chosen here."""
    x8_TD: Quantized | None = None
    """`x_TD` as FP8 experts read it. Quantised row by row, it is the same before it travels as
    after, and a quarter as long."""


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows for the experts of this device, and which expert each is to visit.

    A row may have visits to several experts or to none, and is not copied for them.
    """

    x_RD: Tensor
    """Its values are to be read only where there is no `x8_RD`; gradients go through it always."""
    rows_N: Tensor
    """int64: the row of each visit; visits are sorted by expert."""
    counts_E: Tensor
    """int64: visits to each expert that lives here."""
    gates_N: Tensor | None
    """The weight of each visit in its row's sum; none where every weight is 1."""
    x8_RD: Quantized | None = None
    """The rows as FP8 experts read them, if they came so."""
    home: ByRow | None = None
    """What `by_row` gives, where the dispatcher has it without sorting again."""

    def by_row(self) -> ByRow:
        """The visits of each row."""
        return self.home or ByRow.of(self.rows_N, len(self.x_RD))

    def collect(self, y_ND: Float[Tensor, "N D"]) -> Float[Tensor, "R D"]:
        """Each row's sum of its visits' results, by gate; 0 for a row without visits."""
        if self.gates_N is not None:
            y_ND = y_ND * self.gates_N.unsqueeze(1)
        return self.by_row().sum(y_ND)


@runtime_checkable
class Journey(Protocol):
    """What rows on their way tell of it."""

    @property
    def layer(self) -> str:
        """The layer that they belong to."""

    @property
    def bytes_within(self) -> int:
        """Bytes that left this device for others of its node."""

    @property
    def bytes_across(self) -> int:
        """Bytes that left it for other nodes."""

    @property
    def exposed_seconds(self) -> float:
        """How long the host has done nothing but wait for the exchange."""

    @property
    def hidden_seconds(self) -> float:
        """How long it did other work between beginning the exchange and waiting for it."""


@runtime_checkable
class Return(Journey, Protocol):
    """Results on their way home."""

    def home(self) -> Float[Tensor, "T D"]:
        """Each token's sum of its experts' results by gate. Waits; to be called once."""


@runtime_checkable
class Flight(Journey, Protocol):
    """Tokens on their way to their experts."""

    def rows(self) -> Dispatched:
        """What arrived here. Waits; to be called once."""

    def back(self, y_RD: Float[Tensor, "R D"]) -> Return:
        """Send the rows' sums home; after `rows`, and once."""


@runtime_checkable
class Dispatcher(Protocol):
    """Carries tokens to experts and weighted results back; drops none."""

    def experts(self, layer: str) -> tuple[int, ...]:
        """The routed experts of a layer that live on this device, by their global numbers."""

    def send(self, routed: Routed) -> Flight:
        """Begin to send each token to its experts."""


class LocalDispatcher:
    """All experts on this device: rows are the tokens, and their sums are the whole."""

    def __init__(self, num_experts: int) -> None:
        self._experts = tuple(range(num_experts))

    def experts(self, layer: str) -> tuple[int, ...]:
        """All of them."""
        return self._experts

    def send(self, routed: Routed) -> "_Here":
        """Visits sorted by expert; equal experts keep the order of tokens."""
        x_TD, experts_TK = routed.x_TD, routed.experts_TK
        order_N = sort_by_expert(experts_TK)
        gates_N = routed.gates_TK.flatten().index_select(0, order_N).to(x_TD.dtype)
        choices = experts_TK.shape[1]
        rows_N = order_N // choices
        begin_R = torch.arange(0, len(order_N), choices, device=order_N.device)
        home = ByRow(rows_N, inverse(order_N), begin_R)
        return _Here(
            routed.layer,
            Dispatched(x_TD, rows_N, routed.counts_E, gates_N, routed.x8_TD, home),
        )


@dataclass(slots=True)
class _Here:
    """A flight and its return that go nowhere."""

    layer: str
    sent: Dispatched
    y_RD: Tensor | None = None
    bytes_within: int = 0
    bytes_across: int = 0
    exposed_seconds: float = 0.0
    hidden_seconds: float = 0.0

    def rows(self) -> Dispatched:
        """The tokens."""
        return self.sent

    def back(self, y_RD: Float[Tensor, "R D"]) -> "_Here":
        """They are there."""
        self.y_RD = y_RD
        return self

    def home(self) -> Float[Tensor, "T D"]:
        """The rows' sums as they are."""
        assert self.y_RD is not None, "nothing was sent back"
        return self.y_RD


def sort_by_expert(experts_TK: Int[Tensor, "T K"]) -> Int[Tensor, " N"]:
    """The flat choices t * K + k by expert, those of one expert in their own order."""
    return experts_TK.reshape(-1).argsort(stable=True)


def counts_of(experts_TK: Int[Tensor, "T K"], experts: int) -> Int[Tensor, " E"]:
    """How often each expert was chosen. Unlike `bincount` it does not make the host wait."""
    chosen_N = experts_TK.flatten()
    return chosen_N.new_zeros(experts).scatter_add_(0, chosen_N, torch.ones_like(chosen_N))

"""The seam between routing and machines: carry tokens to their experts and results back.

Axes: T tokens on this device, K choices a token, R rows received, N visits of a row to an expert
of this device, D width, E experts.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from model.rows import ByRow, inverse


@dataclass(frozen=True, slots=True)
class Dispatched:
    """Rows for the experts of this device, and which expert each is to visit.

    A row may have visits to several experts or to none, and is not copied for them.
    """

    x_RD: Tensor
    rows_N: Tensor
    """int64: the row of each visit; visits are sorted by expert."""
    counts_E: Tensor
    """int64: visits to each expert that lives here."""
    gates_N: Tensor | None
    """The weight of each visit in its row's sum; none where every weight is 1."""
    ticket: object
    """Read only by the dispatcher that made it, which knows its type."""
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
class TokenDispatcher(Protocol):
    """Carries tokens to experts and weighted results back; drops none."""

    def local_experts(self, num_experts: int) -> range:
        """The routed experts that live on this device, by their global number."""

    def dispatch(
        self,
        x_TD: Float[Tensor, "T D"],
        experts_TK: Int[Tensor, "T K"],
        gates_TK: Float[Tensor, "T K"],
        counts_E: Int[Tensor, " E"],
    ) -> Dispatched:
        """Send each token to each of its experts; `counts` says how often each was chosen here."""

    def combine(
        self, y_RD: Float[Tensor, "R D"], gates_TK: Float[Tensor, "T K"], sent: Dispatched
    ) -> Float[Tensor, "T D"]:
        """Bring home the rows' sums, and make each token's sum of its experts' results by gate."""


class LocalDispatcher:
    """All experts on this device: rows are the tokens, and their sums are the whole."""

    def local_experts(self, num_experts: int) -> range:
        """All of them."""
        return range(num_experts)

    def dispatch(
        self,
        x_TD: Float[Tensor, "T D"],
        experts_TK: Int[Tensor, "T K"],
        gates_TK: Float[Tensor, "T K"],
        counts_E: Int[Tensor, " E"],
    ) -> Dispatched:
        """Visits sorted by expert; equal experts keep the order of tokens."""
        order_N = sort_by_expert(experts_TK)
        gates_N = gates_TK.flatten().index_select(0, order_N).to(x_TD.dtype)
        choices = experts_TK.shape[1]
        rows_N = order_N // choices
        begin_R = torch.arange(0, len(order_N), choices, device=order_N.device)
        home = ByRow(rows_N, inverse(order_N), begin_R)
        return Dispatched(x_TD, rows_N, counts_E, gates_N, None, home)

    def combine(
        self, y_RD: Float[Tensor, "R D"], gates_TK: Float[Tensor, "T K"], sent: Dispatched
    ) -> Float[Tensor, "T D"]:
        """The rows' sums as they are."""
        return y_RD


def sort_by_expert(experts_TK: Int[Tensor, "T K"]) -> Int[Tensor, " N"]:
    """The flat choices t * K + k by expert, those of one expert in their own order."""
    return experts_TK.reshape(-1).argsort(stable=True)


def counts_of(experts_TK: Int[Tensor, "T K"], experts: int) -> Int[Tensor, " E"]:
    """How often each expert was chosen. Unlike `bincount` it does not make the host wait."""
    chosen_N = experts_TK.flatten()
    return chosen_N.new_zeros(experts).scatter_add_(0, chosen_N, torch.ones_like(chosen_N))

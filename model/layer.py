"""What decoder layers of every family have in common: the calls that a layer is made of.

    attention   what looks back over the tokens, and memory in front of it
    route       norm, and each token's experts
    aside       what every token visits: shared experts, or a dense feed-forward
    experts     the routed experts of this device, on rows that arrived
    join        the next state

Tokens travel between `route` and `experts`, and between `experts` and `join`; `aside` is computed
meanwhile. Whoever overlaps several batches makes these calls itself; `forward` makes them in a row.

Axes: B sequences, S positions, D width, T tokens (B * S), R rows received.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.dispatch import Dispatched, Routed
from model.fp8.recorder import Recorder
from model.moe import MoE
from model.passes import Attended, LayerReport, Pass, Whole
from model.streams import Writing

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Held:
    """What a layer keeps between routing and joining."""

    state: Tensor
    """As attention left it: [B, S, D], or [B, S, N, D] of streams."""
    normed_BSD: Tensor
    """What the feed-forward reads."""
    report: LayerReport
    routed: Routed | None = None
    """None where the feed-forward is dense."""
    writing: Writing | None = None
    """How streams take the output up."""


class Layer(nn.Module, ABC):
    """A decoder layer in the calls of this file's docstring, of which families write their own."""

    mlp: nn.Module
    """A `MoE`, or a dense feed-forward."""
    post_attention_layernorm: nn.Module

    def __init__(self, name: str, recorder: Recorder) -> None:
        """`name` is the module's name in the model."""
        super().__init__()
        self.layer, self.recorder = name, recorder

    @abstractmethod
    def attention(self, state: Tensor, batch: Pass) -> Attended:
        """The state after attention, and the indexer's loss if the pass teaches it."""

    @abstractmethod
    def route(self, state: Tensor, batch: Pass) -> Held:
        """Where the tokens go."""

    @abstractmethod
    def join(self, held: Held, out_BSD: Float[Tensor, "B S D"]) -> Tensor:
        """The next state, from all that the feed-forward gave."""

    def held(self, state: Tensor, x_BSD: Float[Tensor, "B S D"], batch: Pass) -> Held:
        """What `route` gives, of the feed-forward's input before its norm."""
        normed_BSD: Tensor = self.post_attention_layernorm(x_BSD)
        if not isinstance(self.mlp, MoE):
            return Held(state, normed_BSD, LayerReport(self.layer))
        routed, report = self.mlp.route(normed_BSD, batch)
        return Held(state, normed_BSD, report, routed)

    def aside(self, held: Held) -> Float[Tensor, "B S D"]:
        """What the shared experts give, or the dense feed-forward."""
        apart = self.mlp.shared_experts if isinstance(self.mlp, MoE) else self.mlp
        out: Tensor = apart(held.normed_BSD)
        return out

    def experts(self, sent: Dispatched) -> Float[Tensor, "R D"]:
        """Each row's sum of what its visits give."""
        assert isinstance(self.mlp, MoE)
        out: Tensor = self.mlp.experts(sent)
        return out

    def forward(self, state: Tensor, batch: Pass) -> tuple[Tensor, LayerReport]:
        """All calls in a row; (the next state, the report)."""
        asked = batch.recompute if isinstance(batch, Whole) else "none"
        whole = asked == "all"
        state, missed = self._again(asked != "none", self.attention, state, batch)
        held = self.route(state, batch)
        if held.routed is None:
            out_BSD = self._again(whole, self.aside, held)
        else:
            assert isinstance(self.mlp, MoE)
            out_BSD = self.mlp.carry(
                held.routed,
                partial(self._again, whole, self.aside, held),
                partial(self._again, whole, self.experts),
            )
        return self.join(held, out_BSD), replace(held.report, indexer=missed)

    def _again(self, recompute: bool, call: Callable[..., T], *arguments: Any) -> T:
        """What `call` gives; with `recompute` it is called again for the backward pass, and only
        its arguments are kept."""
        if not recompute:
            return call(*arguments)
        made: T = checkpoint(
            call,
            *arguments,
            use_reentrant=False,
            preserve_rng_state=False,
            context_fn=lambda: (nullcontext(), self.recorder.resting()),
        )
        return made

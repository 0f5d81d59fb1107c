"""What a layer that looks back over the tokens is handed: a whole text, or one more token.

Attention and memory read the past. In training and prefill the past is in the same tensor
(`Whole`); in decoding it is in caches that an earlier pass filled (`Step`). Every such module takes
either, so that layers are written once.

Axes: B rows, S positions, L positions that the longest row has reached.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask

from configs.parallel import Recompute

Cache = dict[str, Tensor]
"""What one module remembers of each row: tensors whose first axis is the row."""
Caches = dict[nn.Module, Cache]
"""The cache of each module that has one."""


@runtime_checkable
class Remembering(Protocol):
    """What keeps something of each row between steps."""

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """An empty cache for `rows` rows of at most `tokens` tokens."""


IndexerPhase = Literal["off", "dense", "sparse"]
"""How sparse attention is trained (DeepSeek-V3.2-Exp, section 2.1).

`off`: attend to the chosen entries, no loss for the chooser. `dense`: attend to everything, and
teach the indexer the whole distribution. `sparse`: attend to the chosen entries, and teach it the
distribution over those.
"""


@dataclass
class Whole:
    """Rows read from their first token on."""

    tokens_BS: Int[Tensor, "B S"]
    segments_BS: Int[Tensor, "B S"] | None = None
    """Tokens see only tokens of an equal segment; segments are contiguous."""
    caches: Caches | None = None
    """To be filled with what later steps need, if any follow; without segments only."""
    lengths_B: Int[Tensor, " B"] | None = None
    """Given with `caches`: the tokens of each row, the rest of which is padding."""
    indexer: IndexerPhase = "off"
    balance: bool = False
    """Whether layers report the sequence-wise balance loss of their routing."""
    routing: bool = False
    """Whether layers report which experts each token went to."""
    recompute: Recompute = "none"
    """What is computed again for the backward pass, in place of being kept."""
    blocks: BlockMask | None = None
    """What `model.documents` makes of the segments for CUDA, once a pass."""
    ends: list[int] | None = None
    """And for NPUs."""

    @property
    def reach(self) -> int:
        """Positions, padding included."""
        return self.tokens_BS.shape[1]

    @cached_property
    def mask_B1SS(self) -> Bool[Tensor, "B 1 S S"] | None:
        """True where the key is not later than the query and of the same segment.

        None without segments: the causal mask says all, and kernels have that one built in.
        """
        if self.segments_BS is None:
            return None
        length = self.segments_BS.shape[1]
        causal_SS = torch.ones(length, length, dtype=torch.bool, device=self.segments_BS.device)
        same_BSS = self.segments_BS[:, :, None] == self.segments_BS[:, None, :]
        return (same_BSS & causal_SS.tril()).unsqueeze(1)


@dataclass
class Step:
    """One more token for each row."""

    tokens_B1: Int[Tensor, "B 1"]
    positions_B: Int[Tensor, " B"]
    """How many tokens each row had before."""
    caches: Caches
    routing: bool = False
    """As in `Whole`."""
    longest: int | None = None
    """At least the tokens of the longest row, this one included, and no more than caches have room
    for; the device is asked if none is given. Rounded up, steps of growing rows have one shape."""

    @property
    def tokens_BS(self) -> Int[Tensor, "B 1"]:
        """The tokens, under the name they have in `Whole`."""
        return self.tokens_B1

    @cached_property
    def reach(self) -> int:
        """Tokens of the longest row, this one included, or somewhat more."""
        return int(self.positions_B.max()) + 1 if self.longest is None else self.longest

    @cached_property
    def past_BL(self) -> Bool[Tensor, "B L"]:
        """Of the first `reach` positions, those that each row has reached."""
        return torch.arange(self.reach, device=self.positions_B.device) <= self.positions_B[:, None]


Pass = Whole | Step
Attended = tuple[Tensor, Tensor | None]
"""What an attention returns: its output [B, S, D] and its indexer's loss, if the pass teaches it:
the mean over queries of its KL, in nats."""


@dataclass(frozen=True, slots=True)
class LayerReport:
    """What one layer has to tell of a pass, beside the state that it hands on."""

    layer: str
    """Its module's name in the model, as `model.layers.3`."""
    load_E: Int[Tensor, " E"] | None = None
    """How often each routed expert was chosen for tokens of this device; none without experts."""
    routing: Int[Tensor, "T K"] | None = None
    """Each token's experts, if the pass asks."""
    balance: Float[Tensor, ""] | None = None
    """The balance losses of the sequences, summed, if the pass asks and scores route."""
    indexer: Float[Tensor, ""] | None = None
    """The mean over queries of its indexer's KL, in nats, if the pass teaches it."""

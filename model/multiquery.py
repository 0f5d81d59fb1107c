"""Attention of many heads to one shared vector per token, which is key and value of them all.

A query sees the last tokens of its text (its window), blocks that stand for earlier tokens, and a
sink: a learnt score for each head that takes part in the softmax and has no value
(DeepSeek-V4, section 2.3). Queries are worked on in chunks, of whose scores nothing is kept for
the backward pass but their logarithmic sum, so that time grows with S (window + blocks seen) and
memory with S alone. Where a query sees few of many blocks, those are gathered instead of masking
the rest.

Axes: B rows, S positions, Q queries of a chunk, H heads, W head width, U tokens of the window that
a chunk sees, L blocks, K blocks kept for a query, E entries of either kind.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.rows import add_rows, take_rows
from model.widening import widened

CHUNK_QUERIES = 128
"""Queries worked on at a time, unless the window is longer: chunks below it would mostly read."""
GATHER_FACTOR = 6
"""Blocks are gathered where there are more than this many times those that a query keeps."""


@dataclass(frozen=True, slots=True)
class Sight:
    """Which tokens and blocks the queries of a text see."""

    window: int
    """Tokens a query sees, itself included."""
    ratio: int = 1
    """Tokens a block stands for; it is seen once its last token has come."""
    segments_BS: Int[Tensor, "B S"] | None = None
    """Nothing is seen across segments; a block is of its last token's."""
    chosen_BSK: Int[Tensor, "B S K"] | None = None
    """The blocks that each query sees, entries below 0 being none; if not given, all it may.

    Narrower integers than torch indexes with will do, for this may be a large tensor.
    """
    chunk: int = CHUNK_QUERIES
    gather_factor: int = GATHER_FACTOR

    def chunks(self, length: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of each chunk of `length` queries."""
        step = max(self.chunk, self.window)
        return ((start, min(start + step, length)) for start in range(0, length, step))

    def choices(self, start: int, stop: int) -> Int[Tensor, "B Q K"]:
        """What was chosen for these queries, fit to index with."""
        assert self.chosen_BSK is not None
        return self.chosen_BSK[:, start:stop].long()

    def tokens(
        self, start: int, stop: int, device: torch.device
    ) -> tuple[int, Bool[Tensor, "#B Q U"]]:
        """The first token that these queries see, and which of it and later ones each sees."""
        first = max(0, start - self.window + 1)
        queries_Q1 = torch.arange(start, stop, device=device)[:, None]
        tokens_U = torch.arange(first, stop, device=device)
        seen = ((tokens_U <= queries_Q1) & (tokens_U > queries_Q1 - self.window))[None]
        if self.segments_BS is not None:
            own_BQ1 = self.segments_BS[:, start:stop, None]
            seen = seen & (own_BQ1 == self.segments_BS[:, None, first:stop])
        return first, seen

    def blocks(self, start: int, stop: int, device: torch.device) -> Bool[Tensor, "#B Q L"]:
        """Which of the blocks complete by `stop` each query may see, whatever was chosen."""
        done_Q1 = torch.arange(start + 1, stop + 1, device=device)[:, None] // self.ratio
        blocks_L = torch.arange(stop // self.ratio, device=device)
        seen = (blocks_L < done_Q1)[None]
        if self.segments_BS is not None:
            last_BL = self.segments_BS[:, self.ratio - 1 : stop : self.ratio]
            seen = seen & (self.segments_BS[:, start:stop, None] == last_BL[:, None])
        return seen


@dataclass(frozen=True, slots=True)
class Part:
    """Entries that queries look at, and which of them each query sees.

    What it is asked is answered in float32 at least, whatever type the entries are stored in.
    """

    entries: Tensor
    """[B, E, W], or [B, Q, E, W] where each query has entries of its own."""
    seen_BQE: Tensor
    """Its first axis may be 1."""

    def dot(self, q_BQHW: Tensor) -> Tensor:
        """q . e, [B, Q, H, E]. All heads share the entries: one matrix product a row."""
        keys, q_BQHW = widened(self.entries).transpose(-1, -2), widened(q_BQHW)
        if keys.dim() == 4:
            return torch.matmul(q_BQHW, keys)
        return torch.bmm(q_BQHW.flatten(1, 2), keys).view(*q_BQHW.shape[:3], keys.shape[-1])

    def sum(self, weights_BQHE: Tensor) -> Tensor:
        """Sum of the entries by weight, [B, Q, H, W]."""
        entries = widened(self.entries)
        if entries.dim() == 4:
            return torch.matmul(weights_BQHE, entries)
        flat = torch.bmm(weights_BQHE.flatten(1, 2), entries)
        return flat.view(*weights_BQHE.shape[:3], entries.shape[-1])

    def outer(self, weights_BQHE: Tensor, y_BQHW: Tensor) -> Tensor:
        """What gradients `y` of weighted sums say of the entries; shaped as those are."""
        if self.entries.dim() == 4:
            return torch.matmul(weights_BQHE.transpose(-1, -2), y_BQHW)
        return torch.bmm(weights_BQHE.flatten(1, 2).transpose(-1, -2), y_BQHW.flatten(1, 2))

    def scores(self, q_BQHW: Tensor) -> Tensor:
        """`dot`, with -inf where a query does not see."""
        return self.dot(q_BQHW).masked_fill_(~self.seen_BQE.unsqueeze(2), float("-inf"))


def weigh(
    q_BQHW: Float[Tensor, "B Q H W"], parts: list[Part], sinks_H: Float[Tensor, " H"]
) -> tuple[Float[Tensor, "B Q H W"], list[Tensor], Tensor]:
    """Weighted sums of all parts' entries under one softmax; `q` holds the softmax's scale.

    Also the weights in each part, [B, Q, H, E], and the logarithm of what they were divided by. All
    are float32 at least.
    """
    scores = [part.scores(q_BQHW) for part in parts]
    sinks_H = widened(sinks_H)
    top_BQH = torch.stack([s.amax(-1) for s in scores if s.shape[-1]]).amax(0).maximum(sinks_H)
    weights = [s.sub_(top_BQH.unsqueeze(-1)).exp_() for s in scores]
    total_BQH = (sinks_H - top_BQH).exp()
    for w in weights:
        total_BQH = total_BQH + w.sum(-1)
    out_BQHW = sum(part.sum(w) for part, w in zip(parts, weights, strict=True))
    assert isinstance(out_BQHW, Tensor)
    out_BQHW = out_BQHW / total_BQH.unsqueeze(-1)
    weights = [w.div_(total_BQH.unsqueeze(-1)) for w in weights]
    return out_BQHW, weights, top_BQH + total_BQH.log()


def attend(
    q_BSHW: Float[Tensor, "B S H W"],
    kv_BSW: Float[Tensor, "B S W"],
    blocks_BLW: Float[Tensor, "B L W"],
    sinks_H: Float[Tensor, " H"],
    sight: Sight,
    *,
    mass: bool = False,
) -> tuple[Float[Tensor, "B S H W"], Float[Tensor, "B S K"] | None]:
    """Each query's weighted sum of what `sight` lets it see; scores are scaled by W^-0.5.

    With `mass`, also how much weight each query gives to each block, summed over heads, without
    gradient: to all L blocks, or to the K chosen ones in their order.
    """
    out_BSHW, mass_BSK = _Attend.apply(q_BSHW, kv_BSW, blocks_BLW, sinks_H, sight, mass)
    return out_BSHW, mass_BSK if mass else None


class _Attend(torch.autograd.Function):
    """Chunk after chunk, either way."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, kv: Tensor, blocks: Tensor, sinks: Tensor, sight: Sight, mass: bool
    ) -> tuple[Tensor, Tensor]:
        out_BSHW, log_total_BSH = torch.empty_like(q), widened(q.new_empty(q.shape[:3]))
        chosen = sight.chosen_BSK
        kept = blocks.shape[1] if chosen is None else chosen.shape[2]
        mass_BSK = widened(q.new_zeros(*q.shape[:2], kept)) if mass else q.new_empty(0)
        for start, stop in sight.chunks(q.shape[1]):
            rows = slice(start, stop)
            parts = _parts(kv, blocks, sight, start, stop)
            found = weigh(widened(q[:, rows]) * q.shape[-1] ** -0.5, parts, sinks)
            out_BSHW[:, rows], weights, log_total_BSH[:, rows] = found
            if mass and blocks.shape[1]:
                _note_mass(mass_BSK[:, rows], weights[1].sum(2), parts[1], sight, start, stop)
        ctx.save_for_backward(q, kv, blocks, sinks, log_total_BSH)
        ctx.sight = sight
        ctx.mark_non_differentiable(mass_BSK)
        return out_BSHW, mass_BSK

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, kv, blocks, sinks, log_total_BSH = ctx.saved_tensors
        sight, scale = ctx.sight, q.shape[-1] ** -0.5
        # Windows of neighbouring chunks overlap, and many chunks see a block: sums are float32.
        dkv, dblocks = torch.zeros_like(widened(kv)), widened(blocks.new_zeros(blocks.shape))
        dq, dsinks = torch.empty_like(q), torch.zeros_like(widened(sinks))
        for start, stop in sight.chunks(q.shape[1]):
            rows = slice(start, stop)
            q_BQHW, dy_BQHW = widened(q[:, rows]) * scale, widened(grads[0][:, rows])
            log_total_BQH = log_total_BSH[:, rows]
            parts, gradients = _parts(kv, blocks, sight, start, stop), []
            each = [part.scores(q_BQHW).sub_(log_total_BQH.unsqueeze(-1)).exp_() for part in parts]
            dots = [part.dot(dy_BQHW) for part in parts]
            # The part of every weight's gradient that comes through the common divisor: <dy, y>,
            # of a y that was not rounded.
            common_BQH = sum((w * d).sum(-1) for w, d in zip(each, dots, strict=True))
            assert isinstance(common_BQH, Tensor)
            dsinks -= ((widened(sinks) - log_total_BQH).exp() * common_BQH).sum((0, 1))
            dq_BQHW = torch.zeros_like(q_BQHW)
            for part, weights, dots_BQHE in zip(parts, each, dots, strict=True):
                dscores = dots_BQHE.sub_(common_BQH.unsqueeze(-1)).mul_(weights)
                dq_BQHW += part.sum(dscores)
                gradients.append(part.outer(weights, dy_BQHW) + part.outer(dscores, q_BQHW))
            dq[:, rows] = dq_BQHW * scale
            dkv[:, stop - gradients[0].shape[1] : stop] += gradients[0]
            if blocks.shape[1]:
                _add_blocks(dblocks, gradients[1], sight, start, stop)
        dkv, dblocks = dkv.to(kv.dtype), dblocks.to(blocks.dtype)
        return dq, dkv, dblocks, dsinks.to(sinks.dtype), None, None


def _parts(kv: Tensor, blocks: Tensor, sight: Sight, start: int, stop: int) -> list[Part]:
    """What the queries of one chunk look at: window tokens, and blocks if there are any."""
    first, seen_BQU = sight.tokens(start, stop, kv.device)
    parts = [Part(kv[:, first:stop], seen_BQU)]
    if not blocks.shape[1]:
        return parts
    done = stop // sight.ratio
    if sight.chosen_BSK is None:
        parts.append(Part(blocks[:, :done], sight.blocks(start, stop, kv.device)))
        return parts
    chosen_BQK = sight.choices(start, stop)
    if done > sight.gather_factor * chosen_BQK.shape[2]:
        parts.append(gathered(blocks, chosen_BQK))
    else:
        seen_BQL = torch.zeros(*chosen_BQK.shape[:2], done + 1, dtype=torch.bool, device=kv.device)
        # What is none goes to one column more than there are blocks, which is then cut off.
        seen_BQL.scatter_(2, chosen_BQK.where(chosen_BQK >= 0, done), True)
        parts.append(Part(blocks[:, :done], seen_BQL[..., :done]))
    return parts


def gathered(blocks_BLW: Tensor, chosen_BQK: Tensor) -> Part:
    """The chosen blocks of each query, side by side."""
    flat = _flat_index(chosen_BQK, blocks_BLW.shape[1])
    entries = take_rows(blocks_BLW.flatten(0, 1), flat)
    return Part(entries.view(*chosen_BQK.shape, blocks_BLW.shape[-1]), chosen_BQK >= 0)


def _flat_index(chosen_BQK: Tensor, blocks: int) -> Tensor:
    rows_B = torch.arange(chosen_BQK.shape[0], device=chosen_BQK.device)
    return (chosen_BQK.clamp_min(0) + rows_B[:, None, None] * blocks).flatten()


def _add_blocks(dblocks: Tensor, found: Tensor, sight: Sight, start: int, stop: int) -> None:
    """Add what one chunk found of the blocks' gradient."""
    if found.dim() == 3:
        dblocks[:, : found.shape[1]] += found
        return
    flat = _flat_index(sight.choices(start, stop), dblocks.shape[1])
    add_rows(dblocks.flatten(0, 1), flat, found.flatten(0, 2))


def _note_mass(
    mass_BQK: Tensor, weights_BQE: Tensor, part: Part, sight: Sight, start: int, stop: int
) -> None:
    """Put one chunk's weights of blocks in the order of what was chosen."""
    if part.entries.dim() == 4:
        mass_BQK.copy_(weights_BQE)
    elif sight.chosen_BSK is None:
        mass_BQK[..., : weights_BQE.shape[-1]] = weights_BQE
    elif weights_BQE.shape[-1]:
        chosen_BQK = sight.choices(start, stop)
        found = weights_BQE.gather(2, chosen_BQK.clamp_min(0))
        mass_BQK.copy_(found.masked_fill(chosen_BQK < 0, 0.0))

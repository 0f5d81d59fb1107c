"""DeepSeek Sparse Attention: latent attention over what a lightning indexer picks.

The indexer (DeepSeek-V3.2-Exp, eq. 1) scores every earlier token for every query by a few light
heads with one key a token; attention (eq. 2) then reads the K best alone. Choosing passes no
gradient, so the indexer learns from a loss of its own, and its inputs are detached: the language
loss does not reach it, and its loss reaches nothing else.

Whole passes take one of three ways to the same numbers:

- everything is chosen while S <= K, and whenever the indexer learns the dense distribution;
- short texts expand keys and values, and attend under one mask [S, S] that all heads share;
- long ones gather the chosen latents and absorb the expansion: S * K, with no tensor of S * S.

Axes: B sequences, S positions, Q queries of a chunk, L keys, K kept, H heads, J indexer heads,
I indexer head width, R rotary width, P positions with angles, A query latent width, D model width.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configs.model import V32Config
from model.attention import (
    Expanded,
    LatentAttention,
    Projected,
    absorbed,
    remember,
)
from model.fp8.linear import Linear
from model.fp8.scheme import Numerics
from model.gathering import over_chosen
from model.indexer import NONE, choose, divergence, index_scores
from model.passes import Attended, Cache, Pass, Step, Whole
from model.rope import rotate_halves
from model.weight_cache import cast
from model.widening import widened

CHUNK_SCORES = 2**21
"""Scores [B, heads, Q, L] that are built at a time: 8 MiB in float32, which caches still hold."""
GATHER_FROM = 8
"""Texts of this many times K are gathered. A query of the expanded form meets S / 2 keys, a
gathered one K at a higher price for each, since latents are wider than heads and have to be
fetched. On a CPU the two cost the same at 6 to 12 K in training, forwards alone at 6 to 8."""


class KeyNorm(nn.LayerNorm):
    """The indexer's norm of its keys: with mean and bias, unlike the model's other norms."""

    initial_values: ClassVar[dict[str, float]] = {"bias": 0.0}

    def forward(self, input: Float[Tensor, "*B I"]) -> Float[Tensor, "*B I"]:
        """Normalise each last-dim vector; sums are float32 at least."""
        weight, bias = cast(self.weight, input.dtype), cast(self.bias, input.dtype)
        return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class LightningIndexer(nn.Module):
    """Scores tokens for queries. Rotary pairs are half-split, and lie in each head's first dims.

    Of the released model's inference code it leaves out the Hadamard rotation, which changes no
    dot product, and the rounding of queries and keys to FP8.
    """

    def __init__(self, config: V32Config, numerics: Numerics) -> None:
        super().__init__()
        self.config = config
        heads, width = config.index_n_heads, config.index_head_dim
        scheme = numerics.of("indexer")
        self.wq_b = Linear(config.q_lora_rank, heads * width, scheme)
        self.wk = Linear(config.hidden_size, width, scheme)
        self.k_norm = KeyNorm(width, eps=1e-6)
        self.weights_proj = Linear(config.hidden_size, heads)

    def queries(
        self,
        x_BSD: Float[Tensor, "B S D"],
        q_latent_BSA: Float[Tensor, "B S A"],
        table_PR: Tensor,
        positions: Int[Tensor, "*P"],
    ) -> tuple[Float[Tensor, "B S J I"], Float[Tensor, "B S J"]]:
        """Rotated queries and the heads' weights, of either sign."""
        q_BSJI = self.wq_b(q_latent_BSA.detach()).unflatten(-1, (self.config.index_n_heads, -1))
        rotated = self._rotate(q_BSJI, table_PR, positions.unsqueeze(-1))
        return rotated, self.weights_proj(x_BSD.detach())

    def keys(
        self, x_BSD: Float[Tensor, "B S D"], table_PR: Tensor, positions: Int[Tensor, "*P"]
    ) -> Float[Tensor, "B S I"]:
        """One rotated key a token, for all heads."""
        return self._rotate(self.k_norm(self.wk(x_BSD.detach())), table_PR, positions)

    def _rotate(self, x: Tensor, table_PR: Tensor, positions: Tensor) -> Tensor:
        rotary = self.config.qk_rope_head_dim
        turned = rotate_halves(x[..., :rotary], table_PR, positions)
        return torch.cat([turned, x[..., rotary:]], dim=-1)


@dataclass(frozen=True, slots=True)
class Index:
    """What the indexer makes of the tokens of a pass."""

    q_BSJI: Tensor
    weights_BSJ: Tensor
    key_BSI: Tensor


class SparseLatentAttention(LatentAttention):
    """MLA over the tokens that the indexer picks."""

    def __init__(self, config: V32Config, numerics: Numerics) -> None:
        super().__init__(config, numerics)
        self.indexer = LightningIndexer(config, numerics)
        self.keep = config.index_topk

    def forward(self, x_BSD: Float[Tensor, "B S D"], batch: Pass) -> Attended:
        """Attend to what is chosen of each row's own past; `batch.indexer` says what is learnt."""
        if isinstance(batch, Step):
            return self._step(x_BSD, batch), None
        length = x_BSD.shape[1]
        positions_S = torch.arange(length, device=x_BSD.device)
        table_PR = self.rotary(length, x_BSD.device)
        seen = self.project(x_BSD, table_PR, positions_S)
        dense = length <= self.keep or batch.indexer == "dense"
        if batch.caches is None and batch.indexer == "off" and dense:
            return self.attend_in_documents(self.expand(seen), batch), None
        key_BSI = self.indexer.keys(x_BSD, table_PR, positions_S)
        if batch.caches is not None:
            batch.caches[self]["latent_BLW"][:, :length] = seen.entries()
            batch.caches[self]["index_BLI"][:, :length] = key_BSI
        assert seen.q_latent_BSA is not None
        index = Index(
            *self.indexer.queries(x_BSD, seen.q_latent_BSA, table_PR, positions_S), key_BSI
        )
        if not dense and length >= GATHER_FROM * self.keep:
            return self._attend_gathered(seen, index, batch)
        mask_B1SS = batch.mask_B1SS if dense else self._chosen_mask(index, batch)
        heads = self.expand(seen)
        missed = None
        if batch.indexer != "off":
            missed = self._loss(heads, index, batch, mask_B1SS)
        return self.attend(heads, mask_B1SS), missed

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """Latents and shared keys, and the indexer's rotated keys."""
        cache = super().new_cache(rows, tokens)
        width = self.indexer.k_norm.weight.shape[0]
        return cache | {"index_BLI": cache["latent_BLW"].new_zeros(rows, tokens, width)}

    @torch.no_grad()
    def _choices(self, index: Index, batch: Whole) -> Iterator[tuple[slice, Tensor]]:
        """(queries, chosen_BQK) of each chunk; K grows with the chunk's position up to `keep`."""
        for part in _chunks(batch, index.q_BSJI.shape[2]):
            scores_BQL = index_scores(
                index.q_BSJI[:, part], index.key_BSI[:, : part.stop], index.weights_BSJ[:, part]
            )
            yield part, choose(scores_BQL, _visible(batch, part), self.keep)

    def _chosen_mask(self, index: Index, batch: Whole) -> Bool[Tensor, "B 1 S S"]:
        rows, length = batch.tokens_BS.shape
        # One more column takes what stands for no entry.
        mask_BSL = torch.zeros(
            rows, length, length + 1, dtype=torch.bool, device=batch.tokens_BS.device
        )
        for part, chosen_BQK in self._choices(index, batch):
            mask_BSL[:, part].scatter_(2, chosen_BQK.masked_fill(chosen_BQK < 0, length), True)
        return mask_BSL[:, None, :, :length]

    def _loss(
        self, heads: Expanded, index: Index, batch: Whole, mask_B1SS: Tensor | None
    ) -> Float[Tensor, ""]:
        """The indexer's mean divergence from expanded attention under `mask`, or causal."""
        rows, length = batch.tokens_BS.shape
        total = widened(index.weights_BSJ.new_zeros(()))
        num_heads = max(heads.q_BHSQ.shape[1], index.q_BSJI.shape[2])
        for part in _chunks(batch, num_heads):
            mask_BQL = (
                _visible(batch, part) if mask_B1SS is None else mask_B1SS[:, 0, part, : part.stop]
            )
            total = total + checkpoint(
                _missed,
                self.scale,
                heads.q_BHSQ[:, :, part].detach(),
                heads.k_BHSQ[:, :, : part.stop].detach(),
                index.q_BSJI[:, part],
                index.key_BSI[:, : part.stop],
                index.weights_BSJ[:, part],
                mask_BQL,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total / max(1, rows * length)

    def _attend_gathered(self, seen: Projected, index: Index, batch: Whole) -> Attended:
        """Absorbed attention over gathered latents; time and memory grow with S * K.

        The expansion that is absorbed runs in the attention operator's precision, not in
        `kv_b_proj`'s own.
        """
        rows, length = batch.tokens_BS.shape
        chosen_BSK = torch.full(
            (rows, length, self.keep), NONE, dtype=torch.int32, device=batch.tokens_BS.device
        )
        for part, chosen_BQK in self._choices(index, batch):
            row_B11 = torch.arange(rows, device=chosen_BQK.device)[:, None, None]
            in_all_BQK = torch.where(chosen_BQK < 0, NONE, chosen_BQK + row_B11 * length)
            chosen_BSK[:, part, : in_all_BQK.shape[2]] = in_all_BQK
        entries, queries = [seen.entries()], [seen.q_nope_BSHN, seen.q_rope_BSHR]
        if batch.indexer != "off":
            entries.append(index.key_BSI)
            queries += [index.q_BSJI, index.weights_BSJ]
        out_THV, *missed = over_chosen(
            partial(_gathered_core, self.scale),
            chosen_BSK.flatten(0, 1),
            entries=[entry.flatten(0, 1) for entry in entries],
            queries=[query.flatten(0, 1) for query in queries],
            shared=self.absorption(),
        )
        out: Tensor = self.o_proj(out_THV.flatten(1).unflatten(0, (rows, length)))
        return out, missed[0].sum() / max(1, rows * length) if missed else None

    def _step(self, x_B1D: Float[Tensor, "B 1 D"], batch: Step) -> Float[Tensor, "B 1 D"]:
        positions_B1 = batch.positions_B[:, None]
        table_PR = self.rotary(batch.reach, x_B1D.device)
        seen = self.project(x_B1D, table_PR, positions_B1)
        cache = batch.caches[self]
        entries_BLW = remember(cache["latent_BLW"], seen.entries(), batch)
        new_B1I = self.indexer.keys(x_B1D, table_PR, positions_B1)
        key_BLI = remember(cache["index_BLI"], new_B1I, batch)
        visible_BL = batch.past_BL
        if entries_BLW.shape[1] > self.keep:
            assert seen.q_latent_BSA is not None
            q_B1JI, weights_B1J = self.indexer.queries(
                x_B1D, seen.q_latent_BSA, table_PR, positions_B1
            )
            scores_BL = index_scores(q_B1JI, key_BLI, weights_B1J)[:, 0]
            chosen_BK = choose(scores_BL, visible_BL, self.keep)
            rows_B1 = torch.arange(len(chosen_BK), device=chosen_BK.device)[:, None]
            entries_BLW, visible_BL = entries_BLW[rows_B1, chosen_BK.clamp_min(0)], chosen_BK >= 0
        return self._attend_past(seen, entries_BLW, visible_BL)


def _chunks(batch: Whole, heads: int) -> Iterator[slice]:
    """Queries whose scores by so many heads fit into a chunk."""
    rows, length = batch.tokens_BS.shape
    step = max(1, CHUNK_SCORES // max(1, rows * heads * length))
    for begin in range(0, length, step):
        yield slice(begin, min(begin + step, length))


def _visible(batch: Whole, part: slice) -> Bool[Tensor, "B Q L"]:
    """What queries may attend to of the keys up to the last of them."""
    tokens_BL = batch.tokens_BS[:, : part.stop]
    positions_L = torch.arange(part.stop, device=tokens_BL.device)
    causal_QL = positions_L <= positions_L[part, None]
    if batch.segments_BS is None:
        return causal_QL.expand(len(tokens_BL), -1, -1)
    segments_BL = batch.segments_BS[:, : part.stop]
    return causal_QL & (segments_BL[:, part, None] == segments_BL[:, None])


def _missed(
    scale: float,
    q_BHQX: Tensor,
    k_BHLX: Tensor,
    q_BQJI: Tensor,
    key_BLI: Tensor,
    weights_BQJ: Tensor,
    mask_BQL: Tensor,
) -> Tensor:
    """Sum over a chunk's queries of the indexer's divergence from attention under `mask`."""
    with torch.no_grad():
        score_BHQL = (widened(q_BHQX) * scale) @ widened(k_BHLX).transpose(2, 3)
        score_BHQL.masked_fill_(~mask_BQL.unsqueeze(1), float("-inf"))
        attention_BQL = score_BHQL.softmax(-1).sum(1)
    return divergence(index_scores(q_BQJI, key_BLI, weights_BQJ), attention_BQL, mask_BQL).sum()


def _gathered_core(
    scale: float,
    queries: Sequence[Tensor],
    gathered: Sequence[Tensor],
    valid_QK: Tensor,
    shared: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Heads' outputs [Q, H, V] and, with queries of an indexer, its divergence [Q]."""
    entries_QKW, *key_QKI = gathered
    q_nope_QHN, q_rope_QHR, *index = queries
    out_QHV, weight_QHK = absorbed(
        q_nope_QHN, q_rope_QHR, entries_QKW, valid_QK, *shared, scale=scale
    )
    if not index:
        return (out_QHV,)
    q_QJI, weights_QJ = index
    scores_QK = index_scores(q_QJI[:, None], key_QKI[0], weights_QJ[:, None])[:, 0]
    return out_QHV, divergence(scores_QK, weight_QHK.sum(1), valid_QK)

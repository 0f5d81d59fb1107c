"""Blocks of tokens pooled into one entry each, and the lightning indexer that picks among them.

A block's entry is a mean of its tokens' projections, weighted for each channel by a softmax over
the tokens. With two series (DeepSeek-V4, section 2.3.1) blocks overlap: the first series enters
the next token block's entry, the second its own. With one (section 2.3.2) they do not.

Of a text made of several documents, a block belongs to that of its last token, and pools that
document's tokens alone.

Axes: B rows, S positions, D width, L blocks, M tokens of a block, N blocks being finished,
E projected width (all series side by side), W entry width, R slots of a ring,
J indexer heads, A query latent width, Q queries of a chunk, K blocks kept.
"""

from collections.abc import Iterator
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from configs.model import V4Config
from model.fp8.linear import Linear, together
from model.fp8.scheme import HIGH, Numerics
from model.indexer import NONE, choose, divergence, index_scores
from model.layers import RMSNorm
from model.multiquery import Sight, gathered
from model.passes import Cache, Step, Whole
from model.rope import rotate_tail, shared_rotary_table
from model.widening import widened

CHUNK_SCORES = 2**24
"""Scores [B, Q, J, L] of an indexer that are built at a time: 64 MiB in float32."""


class Compressor(nn.Module):
    """Pools every `ratio` tokens into one entry."""

    initial_values: ClassVar[dict[str, float]] = {"position_bias": 0.0}

    def __init__(
        self,
        config: V4Config,
        width: int,
        ratio: int,
        *,
        series: int,
        numerics: Numerics = HIGH,
    ) -> None:
        super().__init__()
        self.config, self.compute = config, numerics.compute
        self.ratio = ratio
        self.series = series
        scheme = numerics.of("compressor")
        self.kv_proj = Linear(config.hidden_size, series * width, scheme)
        self.gate_proj = Linear(config.hidden_size, series * width, scheme)
        self.position_bias = nn.Parameter(torch.empty(ratio, series * width))
        self.kv_norm = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x_BSD: Float[Tensor, "B S D"], batch: Whole) -> Float[Tensor, "B L W"]:
        """The entries of all complete blocks, L = S // ratio."""
        blocks = x_BSD.shape[1] // self.ratio
        kv_BSE, gate_BSE = together(x_BSD, self.kv_proj, self.gate_proj)
        kv_BLME, gate_BLME = (
            y[:, : blocks * self.ratio].unflatten(1, (blocks, self.ratio))
            for y in (kv_BSE, gate_BSE)
        )
        gate_BLME = widened(gate_BLME) + self.position_bias
        if self.series == 2:
            kv_BLME, gate_BLME = _overlapped(kv_BLME, 0.0), _overlapped(gate_BLME, float("-inf"))
        if batch.segments_BS is not None:
            foreign_BLM = self._foreign(batch.segments_BS[:, : blocks * self.ratio])
            gate_BLME = gate_BLME.masked_fill(foreign_BLM.unsqueeze(-1), float("-inf"))
        table = compressed_rotary(self.config, max(blocks * self.ratio, 1), x_BSD.device)
        blocks_L = torch.arange(blocks, device=x_BSD.device)
        entries_BLW = self._pool(kv_BLME, gate_BLME, table, blocks_L)
        if batch.caches is not None:
            cache = batch.caches[self]
            cache["entries_BLW"][:, :blocks] = entries_BLW
            assert batch.lengths_B is not None
            fill_ring(cache["raw_BRE"], torch.cat([kv_BSE, gate_BSE], -1), batch.lengths_B)
        return entries_BLW

    def step(self, x_B1D: Float[Tensor, "B 1 D"], batch: Step) -> Float[Tensor, "B L W"]:
        """Take one more token a row; the cache's entries, of which rows have different numbers.

        On CPUs only blocks that this token completes are computed. Elsewhere every row's are, and
        kept of those alone: the host would have to wait to know which.
        """
        cache, positions_B = batch.caches[self], batch.positions_B
        raw_BRE, entries_BLW = cache["raw_BRE"], cache["entries_BLW"]
        rows_B = torch.arange(len(positions_B), device=positions_B.device)
        new_B1E = torch.cat(together(x_B1D, self.kv_proj, self.gate_proj), dim=-1)
        raw_BRE[rows_B, positions_B % raw_BRE.shape[1]] = new_B1E[:, 0]
        done_B = (positions_B + 1) % self.ratio == 0
        if done_B.device.type != "cpu":
            self._finish_all(raw_BRE, entries_BLW, done_B, batch)
            return entries_BLW
        done_N = done_B.nonzero().squeeze(1)
        if len(done_N):
            block_N = positions_B[done_N] // self.ratio
            entries_BLW[done_N, block_N] = self._finish(raw_BRE[done_N], block_N, batch.reach)
        return entries_BLW

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """Entries, and the projections of tokens that a block still to come needs."""
        zeros, width = self.kv_norm.weight.new_zeros, self.kv_norm.weight.shape[0]
        slots = self.series * self.ratio
        return {
            "entries_BLW": zeros(rows, tokens // self.ratio, width, dtype=self.compute),
            "raw_BRE": zeros(rows, slots, 2 * self.series * width, dtype=self.compute),
        }

    def _pool(self, kv: Tensor, gate: Tensor, table: Tensor, block: Tensor) -> Tensor:
        """Entries [*B, W] of candidates [*B, M, W], turned to the first position of each block."""
        pooled = self.kv_norm((kv * gate.softmax(-2)).sum(-2).to(kv.dtype))
        return rotate_tail(pooled, table, block * self.ratio)

    def _finish(self, raw_NRE: Tensor, block_N: Tensor, reach: int) -> Float[Tensor, "N W"]:
        """The entries of blocks whose last token has just come, from rings of projections."""
        kv_NRE, gate_NRE = raw_NRE.chunk(2, dim=-1)
        gate_NRE = widened(gate_NRE) + self.position_bias.repeat(self.series, 1)
        table = compressed_rotary(self.config, reach, raw_NRE.device)
        if self.series == 1:
            return self._pool(kv_NRE, gate_NRE, table, block_N)
        kv_N2ME, gate_N2ME = (y.unflatten(1, (2, self.ratio)) for y in (kv_NRE, gate_NRE))
        rows_N = torch.arange(len(block_N), device=block_N.device)
        halves = []
        for y_N2ME in (kv_N2ME, gate_N2ME):
            earlier_NMW = y_N2ME[rows_N, 1 - block_N % 2].chunk(2, dim=-1)[0]
            own_NMW = y_N2ME[rows_N, block_N % 2].chunk(2, dim=-1)[1]
            halves.append(torch.cat([earlier_NMW, own_NMW], dim=1))
        # The first block has none before it.
        first_N11 = (block_N == 0)[:, None, None]
        halves[1][:, : self.ratio].masked_fill_(first_N11, float("-inf"))
        return self._pool(halves[0], halves[1], table, block_N)

    def _finish_all(
        self, raw_BRE: Tensor, entries_BLW: Tensor, done_B: Tensor, batch: Step
    ) -> None:
        """Write the entry of each row whose block is `done`."""
        if not entries_BLW.shape[1]:
            return
        block_B = batch.positions_B // self.ratio
        found_BW = self._finish(raw_BRE, block_B, batch.reach)
        # A row past its last complete block writes back what is there.
        slot_B11 = block_B.clamp_max(entries_BLW.shape[1] - 1)[:, None, None]
        slot_B1W = slot_B11.expand(-1, 1, entries_BLW.shape[2])
        kept_B1W = entries_BLW.gather(1, slot_B1W)
        new_B1W = torch.where(done_B[:, None, None], found_BW[:, None], kept_B1W)
        entries_BLW.scatter_(1, slot_B1W, new_B1W)

    def _foreign(self, segments_BS: Tensor) -> Tensor:
        """Which candidates of each block are of another document than its last token."""
        segments_BLM = segments_BS.unflatten(1, (-1, self.ratio))
        last_BL1 = segments_BLM[..., -1:]
        if self.series == 2:
            # What is before the first block has no weight already.
            earlier_BLM = torch.cat([segments_BLM[:, :1], segments_BLM[:, :-1]], dim=1)
            segments_BLM = torch.cat([earlier_BLM, segments_BLM], dim=2)
        foreign_BLM: Tensor = segments_BLM != last_BL1
        return foreign_BLM


class BlockIndexer(Compressor):
    """Scores blocks for queries: keys are pooled as entries are, at a width of their own.

    Of the released model's inference code it leaves out the Hadamard rotation, which changes no
    dot product, and the rounding of queries and keys to FP4.
    """

    def __init__(self, config: V4Config, numerics: Numerics) -> None:
        super().__init__(
            config, config.index_head_dim, config.csa_ratio, series=2, numerics=numerics
        )
        queries = config.index_n_heads * config.index_head_dim
        self.q_b_proj = Linear(config.q_lora_rank, queries, numerics.of("indexer"))
        self.scorer = nn.ModuleDict(
            {"weights_proj": Linear(config.hidden_size, config.index_n_heads)}
        )

    def queries(
        self,
        x_BSD: Float[Tensor, "B S D"],
        q_latent_BSA: Float[Tensor, "B S A"],
        table: Float[Tensor, "P R"],
        positions: Int[Tensor, "*Q"],
    ) -> tuple[Float[Tensor, "B S J W"], Float[Tensor, "B S J"]]:
        """Rotated queries, and the heads' weights, of either sign."""
        q_BSJW = self.q_b_proj(q_latent_BSA).unflatten(-1, (self.config.index_n_heads, -1))
        weights_BSJ: Tensor = self.scorer["weights_proj"](x_BSD)
        return rotate_tail(q_BSJW, table, positions.unsqueeze(-1)), weights_BSJ

    @torch.no_grad()
    def pick(
        self, q_BSJW: Tensor, key_BLW: Tensor, weights_BSJ: Tensor, sight: Sight
    ) -> Int[Tensor, "B S K"]:
        """The blocks that each query keeps of those it may see, K = min(index_topk, L)."""
        rows, length = weights_BSJ.shape[:2]
        keep = min(self.config.index_topk, key_BLW.shape[1])
        chosen_BSK = torch.full((rows, length, keep), NONE, dtype=torch.int32, device=q_BSJW.device)
        for start, stop in self._chunks(rows, length, key_BLW.shape[1]):
            part = slice(start, stop)
            done = stop // self.ratio
            seen_BQL = sight.blocks(start, stop, q_BSJW.device).expand(rows, -1, -1)
            scores_BQL = index_scores(q_BSJW[:, part], key_BLW[:, :done], weights_BSJ[:, part])
            found_BQK = choose(scores_BQL, seen_BQL, keep)
            chosen_BSK[:, part, : found_BQK.shape[2]] = found_BQK
        return chosen_BSK

    def loss(
        self,
        q_BSJW: Tensor,
        key_BLW: Tensor,
        weights_BSJ: Tensor,
        mass_BSK: Float[Tensor, "B S K"],
        sight: Sight,
    ) -> Float[Tensor, ""]:
        """Mean over all queries of KL(attention || indexer), in nats; 0 for those without a block.

        `mass` is what `attend` gave for this `sight`. How many queries see a block differs from row
        to row where rows hold several documents. They do not set the divisor, so that a batch's
        loss is the mean of its rows', however ranks share them.
        """
        rows, length = weights_BSJ.shape[:2]
        total = widened(weights_BSJ.new_zeros(()))
        for start, stop in self._chunks(rows, length, mass_BSK.shape[2]):
            part = slice(start, stop)
            if sight.chosen_BSK is None:
                key, chosen_BQK = key_BLW[:, : stop // self.ratio], None
                seen_BQK = sight.blocks(start, stop, key.device).expand(rows, -1, -1)
            else:
                key, chosen_BQK = key_BLW, sight.choices(start, stop)
                seen_BQK = chosen_BQK >= 0
            if not seen_BQK.shape[2]:
                continue
            total = total + checkpoint(
                _missed,
                q_BSJW[:, part],
                key,
                weights_BSJ[:, part],
                chosen_BQK,
                mass_BSK[:, part, : seen_BQK.shape[2]],
                seen_BQK,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total / max(1, rows * length)

    def _chunks(self, rows: int, length: int, blocks: int) -> Iterator[tuple[int, int]]:
        """(start, stop) of queries whose scores fit into a chunk."""
        heads = self.config.index_n_heads
        step = max(1, CHUNK_SCORES // max(1, rows * heads * blocks))
        return ((start, min(start + step, length)) for start in range(0, length, step))


def _missed(
    q_BQJW: Tensor,
    key_BLW: Tensor,
    weights_BQJ: Tensor,
    chosen_BQK: Tensor | None,
    mass_BQK: Tensor,
    seen_BQK: Tensor,
) -> Tensor:
    """Sum over a chunk's queries of the indexer's divergence from attention."""
    if chosen_BQK is None:
        scores = index_scores(q_BQJW, key_BLW, weights_BQJ)
    else:
        # Each query has keys of its own, so each is a row of one query.
        key_XKW = gathered(key_BLW, chosen_BQK).entries.flatten(0, 1)
        q_X1JW, weights_X1J = (y.flatten(0, 1).unsqueeze(1) for y in (q_BQJW, weights_BQJ))
        scores = index_scores(q_X1JW, key_XKW, weights_X1J).view_as(mass_BQK)
    return divergence(scores, mass_BQK, seen_BQK).sum()


def compressed_rotary(config: V4Config, positions: int, device: torch.device) -> Tensor:
    """Angles of compressing layers, of queries, tokens and blocks alike."""
    yarn = config.rope_scaling
    if yarn is not None:
        # This family stretches frequencies and scales no magnitudes.
        yarn = yarn.model_copy(update={"mscale": 1.0, "mscale_all_dim": 1.0})
    return shared_rotary_table(
        config.qk_rope_head_dim, config.compress_rope_theta, positions, yarn, device
    )


def fill_ring(
    ring_BRE: Float[Tensor, "B R E"], x_BSE: Float[Tensor, "B S E"], lengths_B: Int[Tensor, " B"]
) -> None:
    """Put each row's last R tokens in their slots, position modulo R.

    Slots of rows with fewer tokens hold what nobody reads.
    """
    slots_R = torch.arange(ring_BRE.shape[1], device=x_BSE.device)
    last_B1 = lengths_B[:, None] - 1
    positions_BR = (last_B1 - (last_B1 - slots_R) % ring_BRE.shape[1]).clamp_min(0)
    index_BRE = positions_BR.unsqueeze(-1).expand(-1, -1, x_BSE.shape[2])
    ring_BRE.copy_(x_BSE.gather(1, index_BRE))


def _overlapped(y_BLME: Tensor, before: float) -> Tensor:
    """[B, L, 2 M, W]: the tokens before each block in their first series, its own in the second."""
    first_BLMW, second_BLMW = y_BLME.chunk(2, dim=-1)
    earlier_BLMW = F.pad(first_BLMW, (0, 0, 0, 0, 1, 0), value=before)[:, :-1]
    return torch.cat([earlier_BLMW, second_BLMW], dim=2)

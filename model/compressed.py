"""Attention of DeepSeek-V4 (section 2.3): one shared key and value, a window, compressed blocks.

Three kinds, by layer: `window` sees the last tokens alone; `csa` sees beside them the blocks that
an indexer picks, and `hca` all of its coarser blocks. Queries and values turn with position in
their last dims, and outputs turn back, so that what an entry contributes depends on its distance.

Axes: B rows, S positions, D width, H heads, W head width, A query latent width, R slots of the
window, G groups of heads, O output latent width of a group, Y = G * O, L blocks, K blocks kept.
"""

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import V4Config
from model.compressor import BlockIndexer, Compressor, compressed_rotary, fill_ring
from model.fp8.grouped import fp8_grouped_linear
from model.fp8.groups import Groups
from model.fp8.linear import Linear, together
from model.fp8.scheme import Fp8, Numerics
from model.indexer import choose, index_scores
from model.layers import RMSNorm
from model.multiquery import Part, Sight, attend, gathered, weigh
from model.passes import Attended, Cache, Pass, Step, Whole
from model.rope import rotate_tail, shared_rotary_table
from model.weight_cache import cast
from model.widening import widened


class GroupedLinear(nn.Module):
    """A matrix for each group of heads, stacked along the outputs."""

    def __init__(self, inputs: int, outputs: int, groups: int, scheme: Fp8 | None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(groups * outputs, inputs))
        self.groups = groups
        self.scheme = scheme

    def forward(self, x_BSHW: Float[Tensor, "B S H W"]) -> Float[Tensor, "B S Y"]:
        """Each group's heads, side by side, through that group's matrix."""
        rows, length, heads, width = x_BSHW.shape
        inputs = heads // self.groups * width
        x_GNI = x_BSHW.reshape(rows * length, self.groups, inputs).transpose(0, 1)
        if self.scheme is None:
            weight_GOI = cast(self.weight, x_BSHW.dtype).unflatten(0, (self.groups, -1))
            y_GNO = x_GNI @ weight_GOI.transpose(1, 2)
        else:
            groups = Groups.even(self.groups, x_GNI.shape[1], x_GNI.device)
            y_NO = fp8_grouped_linear(x_GNI.flatten(0, 1), self.weight, groups, self.scheme)
            y_GNO = y_NO.unflatten(0, (self.groups, -1))
        y_BSY: Tensor = y_GNO.transpose(0, 1).reshape(rows, length, len(self.weight))
        return y_BSY


class PickingCompressor(Compressor):
    """Overlapping blocks with the indexer that picks among them."""

    def __init__(self, config: V4Config, numerics: Numerics) -> None:
        super().__init__(config, config.head_dim, config.csa_ratio, series=2, numerics=numerics)
        self.indexer = BlockIndexer(config, numerics)


class CompressedAttention(nn.Module):
    """Attention of one layer, of the kind that `config.attention_kind(layer)` says."""

    initial_values: ClassVar[dict[str, float]] = {"sinks": 0.0}

    def __init__(self, config: V4Config, layer: int, numerics: Numerics) -> None:
        super().__init__()
        self.config, self.compute = config, numerics.compute
        width, heads, head = config.hidden_size, config.num_attention_heads, config.head_dim
        scheme = numerics.of("attention")
        self.q_a_proj = Linear(width, config.q_lora_rank, scheme)
        self.q_a_norm = RMSNorm(config.q_lora_rank, config.rms_norm_eps)
        self.q_b_proj = Linear(config.q_lora_rank, heads * head, scheme)
        self.kv_proj = Linear(width, head, scheme)
        self.kv_norm = RMSNorm(head, config.rms_norm_eps)
        self.o_a_proj = GroupedLinear(
            heads * head // config.o_groups,
            config.o_lora_rank,
            config.o_groups,
            numerics.of("attention", saves_e5m6=True),
        )
        self.o_b_proj = Linear(config.o_groups * config.o_lora_rank, width, scheme)
        self.sinks = nn.Parameter(torch.empty(heads))
        self.compressor: Compressor | None = None
        match config.attention_kind(layer):
            case "csa":
                self.compressor = PickingCompressor(config, numerics)
            case "hca":
                self.compressor = Compressor(
                    config, head, config.hca_ratio, series=1, numerics=numerics
                )
        self.sight = Sight(
            config.sliding_window, self.compressor.ratio if self.compressor is not None else 1
        )

    def forward(self, x_BSD: Float[Tensor, "B S D"], batch: Pass) -> Attended:
        """Attend to each row's own past; `batch.indexer` says what an indexer learns."""
        if isinstance(batch, Step):
            return self._step(x_BSD, batch), None
        positions_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        table = self._rotary(x_BSD.shape[1], x_BSD.device)
        q_latent_BSA, q_BSHW, kv_BSW = self.project(x_BSD, table, positions_S)
        if batch.caches is not None:
            assert batch.lengths_B is not None
            fill_ring(batch.caches[self]["window_BRW"], kv_BSW, batch.lengths_B)
        sight = replace(self.sight, segments_BS=batch.segments_BS)
        blocks_BLW = kv_BSW[:, :0] if self.compressor is None else self.compressor(x_BSD, batch)
        missed = None
        if isinstance(self.compressor, PickingCompressor):
            out_BSHW, missed = self._attend_picked(
                x_BSD, q_latent_BSA, (q_BSHW, kv_BSW, blocks_BLW), sight, batch
            )
        else:
            out_BSHW, _ = attend(q_BSHW, kv_BSW, blocks_BLW, self.sinks, sight)
        return self._output(out_BSHW, table, positions_S), missed

    def project(
        self, x_BSD: Float[Tensor, "B S D"], table: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Query latent [B,S,A]; queries [B,S,H,W] and shared entries [B,S,W], both rotated."""
        q_latent, kv = together(x_BSD, self.q_a_proj, self.kv_proj)
        q_latent_BSA = self.q_a_norm(q_latent)
        q_BSHW = self.q_b_proj(q_latent_BSA).unflatten(-1, (self.config.num_attention_heads, -1))
        # Each head's query is brought to one length, without weights.
        q_BSHW = F.rms_norm(q_BSHW, q_BSHW.shape[-1:], eps=self.config.rms_norm_eps)
        return (
            q_latent_BSA,
            rotate_tail(q_BSHW, table, positions.unsqueeze(-1)),
            rotate_tail(self.kv_norm(kv), table, positions),
        )

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """The shared entries of the window, each in slot position modulo window."""
        slots = min(self.config.sliding_window, tokens)
        zeros = self.kv_norm.weight.new_zeros
        return {"window_BRW": zeros(rows, slots, self.config.head_dim, dtype=self.compute)}

    def _attend_picked(
        self,
        x_BSD: Tensor,
        q_latent_BSA: Tensor,
        operands: tuple[Tensor, Tensor, Tensor],
        sight: Sight,
        batch: Whole,
    ) -> Attended:
        """Heads [B, S, H, W] beside an indexer, which sees copies of inputs without gradients."""
        assert isinstance(self.compressor, PickingCompressor)
        indexer, blocks = self.compressor.indexer, operands[2].shape[1]
        learning = batch.indexer != "off"
        picking = batch.indexer != "dense" and blocks > self.config.index_topk
        if not (learning or picking):
            if batch.caches is not None:
                indexer(x_BSD.detach(), batch)
            return attend(*operands, self.sinks, sight)[0], None
        x_BSD, q_latent_BSA = x_BSD.detach(), q_latent_BSA.detach()
        key_BLW = indexer(x_BSD, batch)
        positions_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        table = self._rotary(x_BSD.shape[1], x_BSD.device)
        q_BSJW, weights_BSJ = indexer.queries(x_BSD, q_latent_BSA, table, positions_S)
        if picking:
            sight = replace(sight, chosen_BSK=indexer.pick(q_BSJW, key_BLW, weights_BSJ, sight))
        out_BSHW, mass_BSK = attend(*operands, self.sinks, sight, mass=learning)
        if mass_BSK is None:
            return out_BSHW, None
        return out_BSHW, indexer.loss(q_BSJW, key_BLW, weights_BSJ, mass_BSK, sight)

    def _step(self, x_B1D: Float[Tensor, "B 1 D"], batch: Step) -> Float[Tensor, "B 1 D"]:
        """Write each row's new entries into its caches, and attend over what is there."""
        positions_B, ring_BRW = batch.positions_B, batch.caches[self]["window_BRW"]
        table = self._rotary(batch.reach, x_B1D.device)
        q_latent, q_B1HW, kv_B1W = self.project(x_B1D, table, positions_B[:, None])
        rows_B, slots = torch.arange(len(x_B1D), device=x_B1D.device), ring_BRW.shape[1]
        ring_BRW[rows_B, positions_B % slots] = kv_B1W[:, 0]
        slots_R = torch.arange(min(slots, batch.reach), device=x_B1D.device)
        parts = [Part(ring_BRW[:, : len(slots_R)], (slots_R <= positions_B[:, None]).unsqueeze(1))]
        if self.compressor is not None:
            parts.append(self._step_blocks(self.compressor, x_B1D, q_latent, table, batch))
        scaled_B1HW = widened(q_B1HW) * self.config.head_dim**-0.5
        out_B1HW, _, _ = weigh(scaled_B1HW, parts, self.sinks)
        return self._output(out_B1HW.to(q_B1HW.dtype), table, positions_B[:, None])

    def _step_blocks(
        self, compressor: Compressor, x_B1D: Tensor, q_latent: Tensor, table: Tensor, batch: Step
    ) -> Part:
        """The complete blocks of each row, or those picked of them."""
        done_B = (batch.positions_B + 1) // compressor.ratio
        most = batch.reach // compressor.ratio
        blocks_BLW = compressor.step(x_B1D, batch)[:, :most]
        blocks_L = torch.arange(most, device=x_B1D.device)
        seen_B1L = (blocks_L < done_B[:, None]).unsqueeze(1)
        if not isinstance(compressor, PickingCompressor):
            return Part(blocks_BLW, seen_B1L)
        indexer = compressor.indexer
        key_BLW = indexer.step(x_B1D, batch)[:, :most]
        if most <= self.config.index_topk:
            return Part(blocks_BLW, seen_B1L)
        queries = indexer.queries(x_B1D, q_latent, table, batch.positions_B[:, None])
        scores_B1L = index_scores(queries[0], key_BLW, queries[1])
        return gathered(blocks_BLW, choose(scores_B1L, seen_B1L, self.config.index_topk))

    def _output(self, out_BSHW: Tensor, table: Tensor, positions: Tensor) -> Float[Tensor, "B S D"]:
        """Turned back by the query's position, then through both output projections."""
        turned = rotate_tail(out_BSHW, table, positions.unsqueeze(-1), inverse=True)
        out: Tensor = self.o_b_proj(self.o_a_proj(turned))
        return out

    def _rotary(self, positions: int, device: torch.device) -> Tensor:
        config = self.config
        if self.compressor is not None:
            return compressed_rotary(config, positions, device)
        return shared_rotary_table(
            config.qk_rope_head_dim, config.rope_theta, positions, None, device
        )

"""Multi-head latent attention (DeepSeek-V3, section 2.1.1, eq. 1-11).

Training and prefill expand the latents to per-head keys and values; decoding absorbs the expansion
into the query and the output instead, so that the cache holds latents only: C + R values a token.

Axes: B sequences, S positions, H heads, N no-position width, R rotary width, V value width,
C latent width, A query latent width, W = C + R entry width, L entries (cache slots), D model width,
P positions with angles, Q queries of any rows.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.model import V3Config
from model.causal import causal_attention
from model.documents import attend_in_documents
from model.fp8.linear import Linear, together
from model.fp8.scheme import Numerics
from model.layers import RMSNorm
from model.passes import Attended, Cache, Pass, Step, Whole
from model.rope import rotate, rotate_tail, shared_rotary_table, softmax_factor
from model.weight_cache import cast
from model.widening import widened

LATENT_NORM_EPSILON = 1e-6
"""The two latent norms keep this value whatever `rms_norm_eps` says, as in the reference."""


@dataclass(frozen=True, slots=True)
class Projected:
    """What the tokens of a pass are to attention, before any head's keys are expanded."""

    q_BSHQ: Tensor
    """The last R dims rotated."""
    latent_BSC: Tensor
    """Normed."""
    k_rope_BSR: Tensor
    """Rotated; one for all heads."""
    q_latent_BSA: Tensor | None
    """The normed query bottleneck, where there is one."""

    @property
    def q_nope_BSHN(self) -> Float[Tensor, "B S H N"]:
        """The part of the queries that does not know its position."""
        return self.q_BSHQ[..., : -self.k_rope_BSR.shape[-1]]

    @property
    def q_rope_BSHR(self) -> Float[Tensor, "B S H R"]:
        """The rotated part of the queries."""
        return self.q_BSHQ[..., -self.k_rope_BSR.shape[-1] :]

    def entries(self) -> Float[Tensor, "B S W"]:
        """What a cache keeps of each token: latent, then shared key."""
        return torch.cat([self.latent_BSC, self.k_rope_BSR], dim=-1)


@dataclass(frozen=True, slots=True)
class Expanded:
    """Every head's queries, keys and values."""

    q_BHSQ: Tensor
    k_BHSQ: Tensor
    v_BHSV: Tensor


class LatentAttention(nn.Module):
    """MLA with or without the query bottleneck."""

    def __init__(self, config: V3Config, numerics: Numerics) -> None:
        super().__init__()
        self.config = config
        scheme = numerics.of("attention")
        width, heads = config.hidden_size, config.num_attention_heads
        queries = heads * config.qk_head_dim
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, queries, scheme)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank, scheme)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPSILON)
            self.q_b_proj = Linear(config.q_lora_rank, queries, scheme)
        self.kv_a_proj_with_mqa = Linear(width, latent, scheme)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPSILON)
        self.kv_b_proj = Linear(config.kv_lora_rank, expanded, scheme)
        self.o_proj = Linear(
            heads * config.v_head_dim, width, numerics.of("attention", saves_e5m6=True)
        )
        self.scale = config.qk_head_dim**-0.5 * softmax_factor(config.rope_scaling)
        self.compute = numerics.compute

    def forward(self, x_BSD: Float[Tensor, "B S D"], batch: Pass) -> Attended:
        """Attend to each row's own past."""
        if isinstance(batch, Step):
            return self._step(x_BSD, batch), None
        positions_S = torch.arange(batch.reach, device=x_BSD.device)
        seen = self.project(x_BSD, self.rotary(batch.reach, x_BSD.device), positions_S)
        if batch.caches is not None:
            batch.caches[self]["latent_BLW"][:, : x_BSD.shape[1]] = seen.entries()
        return self.attend_in_documents(self.expand(seen), batch), None

    def rotary(self, reach: int, device: torch.device) -> Float[Tensor, "P R"]:
        """Angles of `reach` positions or more."""
        config = self.config
        return shared_rotary_table(
            config.qk_rope_head_dim, config.rope_theta, reach, config.rope_scaling, device
        )

    def project(
        self, x_BSD: Float[Tensor, "B S D"], table_PR: Tensor, positions: Int[Tensor, "*P"]
    ) -> Projected:
        """Queries, latents and shared keys of the tokens at `positions`, [S] or [B, S]."""
        config = self.config
        q_latent = None
        if config.q_lora_rank is None:
            q, kv = together(x_BSD, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            q_latent, kv = together(x_BSD, self.q_a_proj, self.kv_a_proj_with_mqa)
            q_latent = self.q_a_layernorm(q_latent)
            q = self.q_b_proj(q_latent)
        q_BSHQ = q.unflatten(-1, (config.num_attention_heads, -1))
        latent, k_rope = kv.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        return Projected(
            rotate_tail(q_BSHQ, table_PR, positions.unsqueeze(-1)),
            self.kv_a_layernorm(latent),
            rotate(k_rope, table_PR, positions),
            q_latent,
        )

    def expand(self, seen: Projected) -> Expanded:
        """The heads' own keys and values, from the latents."""
        config = self.config
        kv_BSHE = self.kv_b_proj(seen.latent_BSC).unflatten(-1, (config.num_attention_heads, -1))
        k_nope_BHSN, v_BHSV = kv_BSHE.transpose(1, 2).split(
            [config.qk_nope_head_dim, config.v_head_dim], dim=-1
        )
        k_rope_BHSR = seen.k_rope_BSR.unsqueeze(1).expand(-1, config.num_attention_heads, -1, -1)
        return Expanded(
            seen.q_BSHQ.transpose(1, 2), torch.cat([k_nope_BHSN, k_rope_BHSR], dim=-1), v_BHSV
        )

    def attend(
        self, heads: Expanded, mask_B1SS: Bool[Tensor, "B 1 S S"] | None
    ) -> Float[Tensor, "B S D"]:
        """Expanded form: where the mask is true, or causal where there is none."""
        out_BSHV = causal_attention(
            heads.q_BHSQ, heads.k_BHSQ, heads.v_BHSV, mask_B1SS, scale=self.scale
        )
        out: Tensor = self.o_proj(out_BSHV.flatten(2))
        return out

    def attend_in_documents(self, heads: Expanded, batch: Whole) -> Float[Tensor, "B S D"]:
        """Expanded form, over each token's own document up to itself."""
        out_BSHV = attend_in_documents(
            heads.q_BHSQ, heads.k_BHSQ, heads.v_BHSV, batch, scale=self.scale
        )
        out: Tensor = self.o_proj(out_BSHV.flatten(2))
        return out

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """Room for the latents and shared keys of `tokens` tokens a row."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        weight = self.kv_a_layernorm.weight
        return {"latent_BLW": weight.new_zeros(rows, tokens, width, dtype=self.compute)}

    def absorption(self) -> tuple[Tensor, Tensor]:
        """kv_b_proj as W_UK [H, N, C] and W_UV [H, V, C], in the attention operator's precision."""
        config = self.config
        weight: Tensor = self.kv_b_proj.weight
        if self.compute is not None:
            # What keys and values are expanded with in a whole pass.
            weight = cast(weight, self.compute)
        expand_HEC = weight.unflatten(0, (config.num_attention_heads, -1))
        key_HNC, value_HVC = expand_HEC.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        return key_HNC, value_HVC

    def _step(self, x_B1D: Float[Tensor, "B 1 D"], batch: Step) -> Float[Tensor, "B 1 D"]:
        """Write each row's new latent into its cache, and attend over what is there."""
        table_PR = self.rotary(batch.reach, x_B1D.device)
        seen = self.project(x_B1D, table_PR, batch.positions_B[:, None])
        entries_BLW = remember(batch.caches[self]["latent_BLW"], seen.entries(), batch)
        return self._attend_past(seen, entries_BLW, batch.past_BL)

    def _attend_past(
        self, seen: Projected, entries_BLW: Tensor, visible_BL: Tensor
    ) -> Float[Tensor, "B 1 D"]:
        out_BHV, _ = absorbed(
            seen.q_nope_BSHN[:, 0],
            seen.q_rope_BSHR[:, 0],
            entries_BLW,
            visible_BL,
            *self.absorption(),
            scale=self.scale,
        )
        out: Tensor = self.o_proj(out_BHV.flatten(1)[:, None])
        return out


def absorbed(
    q_nope_QHN: Float[Tensor, "Q H N"],
    q_rope_QHR: Float[Tensor, "Q H R"],
    entries_QLW: Float[Tensor, "Q L W"],
    visible_QL: Bool[Tensor, "Q L"],
    key_HNC: Float[Tensor, "H N C"],
    value_HVC: Float[Tensor, "H V C"],
    *,
    scale: float,
) -> tuple[Float[Tensor, "Q H V"], Float[Tensor, "Q H L"]]:
    """Heads' outputs and probabilities of queries with entries of their own, where `visible`.

    W_UK goes into the query and W_UV into the output, so that no entry is ever expanded. The
    probabilities pass no gradient on. All of it is float32 at least inside, probabilities too; the
    outputs are rounded to the queries' type.
    """
    dtype = q_nope_QHN.dtype
    q_nope_QHN, q_rope_QHR, entries_QLW = map(widened, (q_nope_QHN, q_rope_QHR, entries_QLW))
    key_HNC, value_HVC = widened(key_HNC), widened(value_HVC)
    # One product a head: what einsum would do, without what it costs to plan it.
    q_QHC = torch.bmm(q_nope_QHN.transpose(0, 1), key_HNC).transpose(0, 1)
    q_QHW = torch.cat([q_QHC, q_rope_QHR], dim=-1)
    over_entries = _OverEntries.apply if torch.is_grad_enabled() else _over_entries
    out_QHW, weight_QHL = over_entries(q_QHW * scale, entries_QLW, visible_QL)
    latent_HQC = out_QHW[..., : key_HNC.shape[-1]].transpose(0, 1)
    out_QHV = torch.bmm(latent_HQC, value_HVC.transpose(1, 2)).transpose(0, 1)
    return out_QHV.to(dtype), weight_QHL


class _OverEntries(torch.autograd.Function):
    """softmax(q E^T) E and the softmax, for queries with entries of their own.

    Entries are by far the largest operand, so each direction passes over them as a whole and as
    seldom as it can: the shared keys are summed in vain rather than cut off, which would copy the
    rest, and the entries' two gradients, as keys and as values, come from one product.
    """

    @staticmethod
    def forward(
        ctx: Any, q_QHW: Tensor, entries_QLW: Tensor, visible_QL: Tensor
    ) -> tuple[Tensor, Tensor]:
        out_QHW, weight_QHL = _over_entries(q_QHW, entries_QLW, visible_QL)
        ctx.save_for_backward(q_QHW, entries_QLW, weight_QHL)
        ctx.mark_non_differentiable(weight_QHL)
        return out_QHW, weight_QHL

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q_QHW, entries_QLW, weight_QHL = ctx.saved_tensors
        slope_QHL = weight_QHL * (grads[0] @ entries_QLW.transpose(1, 2))
        slope_QHL -= weight_QHL * slope_QHL.sum(-1, keepdim=True)
        both_QGL = torch.cat([slope_QHL, weight_QHL], dim=1)
        d_entries_QLW = both_QGL.transpose(1, 2) @ torch.cat([q_QHW, grads[0]], dim=1)
        return slope_QHL @ entries_QLW, d_entries_QLW, None


def _over_entries(q_QHW: Tensor, entries_QLW: Tensor, visible_QL: Tensor) -> tuple[Tensor, Tensor]:
    # Added to the product, the mask costs a fraction of a pass over all heads' scores.
    mask_QL = q_QHW.new_zeros(visible_QL.shape).masked_fill_(~visible_QL, float("-inf"))
    score_QHL = torch.baddbmm(mask_QL.unsqueeze(1), q_QHW, entries_QLW.transpose(1, 2))
    weight_QHL = score_QHL.softmax(-1)
    return torch.bmm(weight_QHL, entries_QLW), weight_QHL


def remember(
    cache_BLW: Float[Tensor, "B M W"], new_B1W: Float[Tensor, "B 1 W"], batch: Step
) -> Float[Tensor, "B L W"]:
    """Write each row's new entry at its position; the slots up to the longest row's.

    Those beyond a row's own position hold padding or nothing: `batch.past_BL` leaves them out.
    """
    rows_B = torch.arange(len(new_B1W), device=new_B1W.device)
    cache_BLW[rows_B, batch.positions_B] = new_B1W[:, 0]
    return cache_BLW[:, : batch.reach]

"""Multi-head latent attention (DeepSeek-V3, section 2.1.1, eq. 1-11).

Training and prefill expand the latents to per-head keys and values; decoding absorbs the expansion
into the query and the output instead, so that the cache holds latents only: C + R values a token.

Axes: B sequences, S positions, H heads, N no-position width, R rotary width, V value width,
C latent width, L cache slots, D model width.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import V3Config
from configs.train import Precision
from model.fp8.linear import Linear, together
from model.layers import RMSNorm
from model.passes import Cache, Pass, Step, Whole
from model.rope import rotary_table, rotate, softmax_factor

LATENT_NORM_EPSILON = 1e-6
"""The two latent norms keep this value whatever `rms_norm_eps` says, as in the reference."""


class LatentAttention(nn.Module):
    """MLA with or without the query bottleneck."""

    rotary_SR: Tensor

    def __init__(self, config: V3Config, precision: Precision) -> None:
        super().__init__()
        self.config = config
        width, heads = config.hidden_size, config.num_attention_heads
        queries = heads * config.qk_head_dim
        latent = config.kv_lora_rank + config.qk_rope_head_dim
        expanded = heads * (config.qk_nope_head_dim + config.v_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = Linear(width, queries, precision=precision)
        else:
            self.q_a_proj = Linear(width, config.q_lora_rank, precision=precision)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPSILON)
            self.q_b_proj = Linear(config.q_lora_rank, queries, precision=precision)
        self.kv_a_proj_with_mqa = Linear(width, latent, precision=precision)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPSILON)
        self.kv_b_proj = Linear(config.kv_lora_rank, expanded, precision=precision)
        self.o_proj = Linear(heads * config.v_head_dim, width, precision=precision)
        table = rotary_table(
            config.qk_rope_head_dim,
            config.rope_theta,
            config.max_position_embeddings,
            config.rope_scaling,
        )
        self.register_buffer("rotary_SR", table, persistent=False)
        self.scale = config.qk_head_dim**-0.5 * softmax_factor(config.rope_scaling)

    def forward(self, x_BSD: Float[Tensor, "B S D"], batch: Pass) -> Float[Tensor, "B S D"]:
        """Attend to each row's own past."""
        if isinstance(batch, Step):
            return self._step(x_BSD, batch)
        positions_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        q_nope_BSHN, q_rope_BSHR, latent_BSC, k_rope_BSR = self.project(x_BSD, positions_S)
        if batch.caches is not None:
            entries_BSW = torch.cat([latent_BSC, k_rope_BSR], dim=-1)
            batch.caches[self]["latent_BLW"][:, : x_BSD.shape[1]] = entries_BSW
        return self.attend(q_nope_BSHN, q_rope_BSHR, latent_BSC, k_rope_BSR, batch)

    def attend(
        self,
        q_nope_BSHN: Tensor,
        q_rope_BSHR: Tensor,
        latent_BSC: Tensor,
        k_rope_BSR: Tensor,
        batch: Whole,
    ) -> Float[Tensor, "B S D"]:
        """Expanded form: causal, and within segments where there are any."""
        config = self.config
        kv_BSHE = self.kv_b_proj(latent_BSC).unflatten(-1, (config.num_attention_heads, -1))
        k_nope_BSHN, v_BSHV = kv_BSHE.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        k_rope_BSHR = k_rope_BSR.unsqueeze(2).expand_as(q_rope_BSHR)
        q = torch.cat([q_nope_BSHN, q_rope_BSHR], dim=-1).transpose(1, 2)
        k = torch.cat([k_nope_BSHN, k_rope_BSHR], dim=-1).transpose(1, 2)
        out_BHSV = F.scaled_dot_product_attention(
            q,
            k,
            v_BSHV.transpose(1, 2),
            attn_mask=batch.mask_B1SS,
            is_causal=batch.mask_B1SS is None,
            scale=self.scale,
        )
        out: Tensor = self.o_proj(out_BHSV.transpose(1, 2).flatten(2))
        return out

    def project(
        self, x_BSD: Float[Tensor, "B S D"], positions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [B,S,H,N] and [B,S,H,R], normed latent [B,S,C], rotated shared key [B,S,R].

        `positions` is [S] or [B, S].
        """
        config = self.config
        if config.q_lora_rank is None:
            q, kv = together(x_BSD, self.q_proj, self.kv_a_proj_with_mqa)
        else:
            q_latent, kv = together(x_BSD, self.q_a_proj, self.kv_a_proj_with_mqa)
            q = self.q_b_proj(self.q_a_layernorm(q_latent))
        q_BSHQ = q.unflatten(-1, (config.num_attention_heads, -1))
        q_nope, q_rope = q_BSHQ.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        latent, k_rope = kv.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        return (
            q_nope,
            rotate(q_rope, self.rotary_SR, positions.unsqueeze(-1)),
            self.kv_a_layernorm(latent),
            rotate(k_rope, self.rotary_SR, positions),
        )

    def new_cache(self, rows: int, tokens: int) -> Cache:
        """Room for the latents and shared keys of `tokens` tokens a row."""
        width = self.config.kv_lora_rank + self.config.qk_rope_head_dim
        weight = self.kv_a_layernorm.weight
        return {"latent_BLW": weight.new_zeros(rows, tokens, width)}

    def _step(self, x_B1D: Float[Tensor, "B 1 D"], batch: Step) -> Float[Tensor, "B 1 D"]:
        """Write each row's new latent into its cache, and attend over what is there."""
        q_nope, q_rope, latent, k_rope = self.project(x_B1D, batch.positions_B[:, None])
        cache_BLW = batch.caches[self]["latent_BLW"]
        rows_B = torch.arange(x_B1D.shape[0], device=x_B1D.device)
        cache_BLW[rows_B, batch.positions_B] = torch.cat([latent, k_rope], dim=-1)[:, 0]
        # Slots beyond a row's own position hold padding or nothing, and are never read.
        seen_BLW = cache_BLW[:, : int(batch.positions_B.max()) + 1]
        slots_L = torch.arange(seen_BLW.shape[1], device=x_B1D.device)
        visible_BL = slots_L <= batch.positions_B[:, None]
        return self.absorbed(q_nope[:, 0], q_rope[:, 0], seen_BLW, visible_BL)[:, None]

    def absorbed(
        self,
        q_nope_BHN: Float[Tensor, "B H N"],
        q_rope_BHR: Float[Tensor, "B H R"],
        entries_BLW: Float[Tensor, "B L W"],
        visible_BL: Tensor,
    ) -> Float[Tensor, "B D"]:
        """One query a row over latents and shared keys, W = C + R, where `visible`."""
        config = self.config
        expand_HEC = self.kv_b_proj.weight.unflatten(0, (config.num_attention_heads, -1))
        key_HNC, value_HVC = expand_HEC.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        q_BHW = torch.cat([torch.einsum("bhn,hnc->bhc", q_nope_BHN, key_HNC), q_rope_BHR], -1)
        score_BHL = torch.einsum("bhw,blw->bhl", q_BHW, entries_BLW) * self.scale
        weight_BHL = score_BHL.masked_fill(~visible_BL.unsqueeze(1), float("-inf")).softmax(-1)
        latent_BHC = torch.einsum(
            "bhl,blc->bhc", weight_BHL, entries_BLW[..., : config.kv_lora_rank]
        )
        out_BHV = torch.einsum("bhc,hvc->bhv", latent_BHC, value_HVC)
        out: Tensor = self.o_proj(out_BHV.flatten(1))
        return out

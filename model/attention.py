"""Multi-head latent attention (DeepSeek-V3, section 2.1.1, eq. 1-11).

Training and prefill expand the latents to per-head keys and values; decoding (`model/decode.py`)
absorbs the expansion into the query and output instead and caches latents only.

Axes: B sequences, S positions, H heads, N no-position width, R rotary width, V value width,
C latent width, D model width.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from configs.model import ModelConfig
from configs.train import Precision
from model.fp8.linear import Linear, together
from model.layers import RMSNorm
from model.rope import rotary_table, rotate

LATENT_NORM_EPSILON = 1e-6
"""The two latent norms keep this value whatever `rms_norm_eps` says, as in the reference."""


class LatentAttention(nn.Module):
    """MLA with or without the query bottleneck."""

    rotary_SR: Tensor

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
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
            config.qk_rope_head_dim, config.rope_theta, config.max_position_embeddings
        )
        self.register_buffer("rotary_SR", table, persistent=False)
        self.scale = config.qk_head_dim**-0.5

    def forward(
        self, x_BSD: Float[Tensor, "B S D"], mask_B1SS: Bool[Tensor, "B 1 S S"] | None
    ) -> Float[Tensor, "B S D"]:
        """Attend causally, or where `mask` is true if there is one (it must be causal too)."""
        config = self.config
        positions_S = torch.arange(x_BSD.shape[1], device=x_BSD.device)
        q_nope_BSHN, q_rope_BSHR, latent_BSC, k_rope_BSR = self.project(x_BSD, positions_S)
        kv_BSHE = self.kv_b_proj(latent_BSC).unflatten(-1, (config.num_attention_heads, -1))
        k_nope_BSHN, v_BSHV = kv_BSHE.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        k_rope_BSHR = k_rope_BSR.unsqueeze(2).expand_as(q_rope_BSHR)
        q = torch.cat([q_nope_BSHN, q_rope_BSHR], dim=-1).transpose(1, 2)
        k = torch.cat([k_nope_BSHN, k_rope_BSHR], dim=-1).transpose(1, 2)
        out_BHSV = F.scaled_dot_product_attention(
            q,
            k,
            v_BSHV.transpose(1, 2),
            attn_mask=mask_B1SS,
            is_causal=mask_B1SS is None,
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

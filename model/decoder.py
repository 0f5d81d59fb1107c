"""Decoder layers with one residual stream: DeepSeek-V3 and V3.2.

Axes: B sequences, S positions, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from configs.model import V3Config, V32Config
from model.attention import LatentAttention
from model.dispatch import TokenDispatcher
from model.engram import Engram, engram_before
from model.fp8.linear import Linear
from model.fp8.scheme import Numerics
from model.layers import RMSNorm, SwiGLU
from model.moe import MoE
from model.passes import Pass
from model.sparse import SparseLatentAttention


class DecoderLayer(nn.Module):
    """Pre-norm attention and feed-forward, dense or of experts."""

    def __init__(
        self, config: V3Config, index: int, numerics: Numerics, dispatcher: TokenDispatcher
    ) -> None:
        super().__init__()
        self.engram: Engram | None = engram_before(config, index, numerics)
        self.self_attn: LatentAttention = (
            SparseLatentAttention(config, numerics)
            if isinstance(config, V32Config)
            else LatentAttention(config, numerics)
        )
        self.mlp: nn.Module
        if config.has_experts(index):
            self.mlp = MoE(config, index, numerics, dispatcher)
        else:
            self.mlp = SwiGLU(
                config.hidden_size, config.intermediate_size, numerics.of("dense_ffn")
            )
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x_BSD: Float[Tensor, "B S D"], batch: Pass) -> Float[Tensor, "B S D"]:
        """h = x + attention(norm(x)); h + feed-forward(norm(h))."""
        if self.engram is not None:
            x_BSD = self.engram(x_BSD.unsqueeze(2), batch).squeeze(2)
        h_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), batch)
        normed_BSD = self.post_attention_layernorm(h_BSD)
        tokens = (batch.tokens_BS,) if isinstance(self.mlp, MoE) else ()
        out: Tensor = h_BSD + self.mlp(normed_BSD, *tokens)
        return out


class MtpLayer(DecoderLayer):
    """A decoder layer over h_i and the embedding of token i + 1 (section 2.2, eq. 21-23).

    The paper writes [hidden; embedding]; the released code and weights put the embedding first,
    and so does this. Embedding and output head are the main model's.
    """

    def __init__(self, config: V3Config, numerics: Numerics, dispatcher: TokenDispatcher) -> None:
        super().__init__(config, config.num_hidden_layers, numerics, dispatcher)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        width, scheme = config.hidden_size, numerics.of("mtp_projection")
        self.eh_proj = Linear(2 * width, width, scheme)
        self.shared_head = nn.ModuleDict({"norm": RMSNorm(config.hidden_size, config.rms_norm_eps)})

    def predict(
        self,
        hidden_BSD: Float[Tensor, "B S D"],
        following_BSD: Float[Tensor, "B S D"],
        batch: Pass,
    ) -> Float[Tensor, "B S D"]:
        """The state that the output head reads, from h_i and the embedding of token i + 1.

        `hidden` is normed already: the layer continues from what the servers that read it feed.
        """
        joined = torch.cat([self.enorm(following_BSD), self.hnorm(hidden_BSD)], dim=-1)
        out: Tensor = self.shared_head["norm"](self(self.eh_proj(joined), batch))
        return out

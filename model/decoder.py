"""Decoder layers with one residual stream: DeepSeek-V3 and V3.2.

Axes: B sequences, S positions, D width.
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from configs.model import V3Config, V32Config
from model.attention import LatentAttention
from model.dispatch import Dispatcher
from model.engram import Engram, engram_before
from model.fp8.linear import Linear
from model.fp8.scheme import Numerics
from model.layer import Held, Layer
from model.layers import RMSNorm, SwiGLU
from model.moe import MoE, layer_name
from model.passes import Attended, LayerReport, Pass
from model.sparse import SparseLatentAttention


class DecoderLayer(Layer):
    """Pre-norm attention and feed-forward, dense or of experts."""

    def __init__(
        self, config: V3Config, index: int, numerics: Numerics, dispatcher: Dispatcher
    ) -> None:
        super().__init__(layer_name(index), numerics.recorder)
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

    def attention(self, state: Float[Tensor, "B S D"], batch: Pass) -> Attended:
        """h = x + attention(norm(x)), behind memory if there is one in front."""
        if self.engram is not None:
            state = self.engram(state.unsqueeze(2), batch).squeeze(2)
        out_BSD, missed = self.self_attn(self.input_layernorm(state), batch)
        return state + out_BSD, missed

    def route(self, state: Float[Tensor, "B S D"], batch: Pass) -> Held:
        """Where the tokens go."""
        return self.held(state, state, batch)

    def join(self, held: Held, out_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S D"]:
        """h + feed-forward(norm(h))."""
        return held.state + out_BSD


class MtpLayer(DecoderLayer):
    """A decoder layer over h_i and the embedding of token i + 1 (section 2.2, eq. 21-23).

    The paper writes [hidden; embedding]; the released code and weights put the embedding first,
    and so does this. Embedding and output head are the main model's.
    """

    def __init__(self, config: V3Config, numerics: Numerics, dispatcher: Dispatcher) -> None:
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
    ) -> tuple[Float[Tensor, "B S D"], LayerReport]:
        """The state that the output head reads, from h_i and the embedding of token i + 1.

        `hidden` is normed already: the layer continues from what the servers that read it feed.
        """
        joined = torch.cat([self.enorm(following_BSD), self.hnorm(hidden_BSD)], dim=-1)
        state_BSD, report = self(self.eh_proj(joined), batch)
        return self.shared_head["norm"](state_BSD), report

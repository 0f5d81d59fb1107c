"""Manifold-constrained hyper-connections, and the decoder layers of DeepSeek-V4 around them.

Several residual streams run beside each other (mHC, arXiv 2512.24880, in the form of V4's release).
In front of a sublayer they are summed into one, behind it they are mixed and each takes its share
of the output. All weights of these sums come from the streams themselves, token by token; the
mixing matrix is made doubly stochastic, so that no depth of layers amplifies what passes through.

Axes: B rows, S positions, N streams, D width, T tokens (B * S).
"""

from dataclasses import replace
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from configs.model import V4Config
from model.compressed import CompressedAttention
from model.dispatch import Dispatcher
from model.engram import Engram, engram_before
from model.fp8.linear import Linear
from model.fp8.scheme import Numerics
from model.layer import Held, Layer
from model.layers import RMSNorm
from model.moe import MoE, layer_name
from model.passes import Attended, LayerReport, Pass, Whole
from model.streams import Writing, connection_weights, read, reading_weights


class HyperConnection(nn.Module):
    """The streams around one sublayer.

    `fn` gives N weights to read the streams with, N to write them, N * N to mix them, in this
    order, for which `scale` has one factor each and `base` the offsets. They start at factor 1, as
    in transformers; the paper starts at 0.01.
    """

    initial_values: ClassVar[dict[str, float]] = {"base": 0.0, "scale": 1.0}

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self.config = config
        streams = config.hc_mult
        weights = (2 + streams) * streams
        self.fn = nn.Parameter(torch.empty(weights, streams * config.hidden_size))
        self.base = nn.Parameter(torch.empty(weights))
        self.scale = nn.Parameter(torch.empty(3))

    def forward(self, x_BSND: Float[Tensor, "B S N D"]) -> tuple[Float[Tensor, "B S D"], Writing]:
        """The sublayer's input, sum_i pre_i x_i, and how its output is written."""
        x_TND = x_BSND.flatten(0, 1)
        pre_TN, post_TN, mix_TNN = self.weights(x_TND)
        x_BSD: Tensor = read(x_TND, pre_TN).unflatten(0, x_BSND.shape[:2])
        return x_BSD, Writing(x_BSND, post_TN, mix_TNN)

    def weights(
        self, x_TND: Float[Tensor, "T N D"]
    ) -> tuple[Float[Tensor, "T N"], Float[Tensor, "T N"], Float[Tensor, "T N N"]]:
        """(pre, post, mix): float32 at least. Rows and columns of each token's mix sum to 1."""
        config = self.config
        return connection_weights(
            x_TND,
            self.fn,
            self.base,
            self.scale,
            norm_epsilon=config.rms_norm_eps,
            epsilon=config.hc_eps,
            iterations=config.hc_sinkhorn_iters,
        )


class HyperHead(nn.Module):
    """Sums the streams into one in front of the final norm."""

    initial_values: ClassVar[dict[str, float]] = {"hc_base": 0.0, "hc_scale": 1.0}

    def __init__(self, config: V4Config) -> None:
        super().__init__()
        self.config = config
        streams = config.hc_mult
        self.hc_fn = nn.Parameter(torch.empty(streams, streams * config.hidden_size))
        self.hc_base = nn.Parameter(torch.empty(streams))
        self.hc_scale = nn.Parameter(torch.empty(1))

    def forward(self, x_BSND: Float[Tensor, "B S N D"]) -> Float[Tensor, "B S D"]:
        """The streams' sum, each weighted by a sigmoid of what all of them say."""
        x_TND = x_BSND.flatten(0, 1)
        pre_TN = reading_weights(
            x_TND,
            self.hc_fn,
            self.hc_base,
            self.hc_scale,
            norm_epsilon=self.config.rms_norm_eps,
            epsilon=self.config.hc_eps,
        )
        out_BSD: Tensor = read(x_TND, pre_TN).unflatten(0, x_BSND.shape[:2])
        return out_BSD


class HyperLayer(Layer):
    """Attention and experts over streams, each behind a norm and inside a hyper-connection."""

    def __init__(
        self, config: V4Config, index: int, numerics: Numerics, dispatcher: Dispatcher
    ) -> None:
        super().__init__(layer_name(index), numerics.recorder)
        self.engram: Engram | None = engram_before(config, index, numerics)
        self.self_attn = CompressedAttention(config, index, numerics)
        self.mlp = MoE(config, index, numerics, dispatcher)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)

    def attention(self, state: Float[Tensor, "B S N D"], batch: Pass) -> Attended:
        """The streams after memory, if there is one in front, and attention."""
        if self.engram is not None:
            state = self.engram(state, batch)
        x_BSD, writing = self.attn_hc(state)
        out_BSD, missed = self.self_attn(self.input_layernorm(x_BSD), batch)
        return writing.write(out_BSD), missed

    def route(self, state: Float[Tensor, "B S N D"], batch: Pass) -> Held:
        """Where the tokens go, by what the streams say together."""
        x_BSD, writing = self.ffn_hc(state)
        return replace(self.held(state, x_BSD, batch), writing=writing)

    def join(self, held: Held, out_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S N D"]:
        """The streams after the experts."""
        assert held.writing is not None
        return held.writing.write(out_BSD)


class HyperMtpLayer(HyperLayer):
    """The multi-token-prediction layer of V4: window attention and experts chosen by score.

    Unlike V3's it has two projections, one of the next token's embedding, which every stream is
    given, and one of each stream. Embedding and output head are the main model's.
    """

    def __init__(self, config: V4Config, numerics: Numerics, dispatcher: Dispatcher) -> None:
        super().__init__(config, config.num_hidden_layers, numerics, dispatcher)
        width = config.hidden_size
        self.enorm = RMSNorm(width, config.rms_norm_eps)
        self.hnorm = RMSNorm(width, config.rms_norm_eps)
        self.e_proj = Linear(width, width, numerics.of("mtp_projection"))
        self.h_proj = Linear(width, width, numerics.of("mtp_projection"))
        self.norm = RMSNorm(width, config.rms_norm_eps)
        self.hc_head = HyperHead(config)

    def predict(
        self,
        hidden_BSND: Float[Tensor, "B S N D"],
        following_BSD: Float[Tensor, "B S D"],
        batch: Whole,
    ) -> tuple[Float[Tensor, "B S D"], LayerReport]:
        """The state that the output head reads, from the streams and the embedding of token i + 1.

        `hidden` are the streams as the main model's last layer leaves them.
        """
        next_BSD = self.e_proj(self.enorm(following_BSD))
        joined_BSND = next_BSD.unsqueeze(2) + self.h_proj(self.hnorm(hidden_BSND))
        state_BSND, report = self(joined_BSND, batch)
        return self.norm(self.hc_head(state_BSND)), report

"""Manifold-constrained hyper-connections, and the decoder layers of DeepSeek-V4 around them.

Several residual streams run beside each other (mHC, arXiv 2512.24880, in the form of V4's release).
In front of a sublayer they are summed into one, behind it they are mixed and each takes its share
of the output. All weights of these sums come from the streams themselves, token by token; the
mixing matrix is made doubly stochastic, so that no depth of layers amplifies what passes through.

Axes: B rows, S positions, N streams, D width, T tokens (B * S), X = N * D, M mixing weights.
"""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from configs.model import V4Config
from model.compressed import CompressedAttention
from model.dispatch import TokenDispatcher
from model.engram import Engram, engram_before
from model.fp8.linear import Linear
from model.fp8.scheme import Numerics
from model.layers import RMSNorm
from model.moe import MoE
from model.passes import Pass, Whole
from model.widening import widened


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

    def forward(
        self, x_BSND: Float[Tensor, "B S N D"], sublayer: Callable[[Tensor], Tensor]
    ) -> Float[Tensor, "B S N D"]:
        """Stream k becomes post_k F(sum_i pre_i x_i) + sum_j mix_jk x_j; F maps [B, S, D]."""
        x_TND = x_BSND.flatten(0, 1)
        pre_TN, post_TN, mix_TNN = self.weights(x_TND)
        out_BSD = sublayer(_read(x_TND, pre_TN).view(*x_BSND.shape[:2], -1))
        written: Tensor = _Write.apply(x_TND, out_BSD.flatten(0, 1), post_TN, mix_TNN)
        return written.view_as(x_BSND)

    def weights(
        self, x_TND: Float[Tensor, "T N D"]
    ) -> tuple[Float[Tensor, "T N"], Float[Tensor, "T N"], Float[Tensor, "T N N"]]:
        """(pre, post, mix): float32 at least. Rows and columns of each token's mix sum to 1."""
        config, streams = self.config, x_TND.shape[1]
        base, scale = widened(self.base), widened(self.scale)
        sizes = [streams, streams, streams * streams]
        projected_MT = _projected(x_TND, self.fn, config.rms_norm_eps)
        scale_M = torch.cat([s.expand(n) for s, n in zip(scale.split(1), sizes, strict=True)])
        parts = (projected_MT * scale_M.unsqueeze(1) + base.unsqueeze(1)).split(sizes)
        start_NNT = parts[2].unflatten(0, (streams, streams)).softmax(1) + config.hc_eps
        mix_NNT: Tensor = _Sinkhorn.apply(start_NNT, config.hc_sinkhorn_iters, config.hc_eps)
        return (
            parts[0].sigmoid().T.contiguous() + config.hc_eps,
            2 * parts[1].sigmoid().T.contiguous(),
            mix_NNT.permute(2, 0, 1).contiguous(),
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
        projected_NT = _projected(x_TND, self.hc_fn, self.config.rms_norm_eps)
        scaled_NT = projected_NT * widened(self.hc_scale) + widened(self.hc_base).unsqueeze(1)
        pre_TN = scaled_NT.sigmoid().T.contiguous() + self.config.hc_eps
        return _read(x_TND, pre_TN).view(*x_BSND.shape[:2], -1)


class HyperLayer(nn.Module):
    """Attention and experts over streams, each behind a norm and inside a hyper-connection."""

    def __init__(
        self, config: V4Config, index: int, numerics: Numerics, dispatcher: TokenDispatcher
    ) -> None:
        super().__init__()
        self.engram: Engram | None = engram_before(config, index, numerics)
        self.self_attn = CompressedAttention(config, index, numerics)
        self.mlp = MoE(config, index, numerics, dispatcher)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attn_hc = HyperConnection(config)
        self.ffn_hc = HyperConnection(config)

    def forward(self, x_BSND: Float[Tensor, "B S N D"], batch: Pass) -> Float[Tensor, "B S N D"]:
        """The streams after memory, if there is one in front, attention and experts."""
        if self.engram is not None:
            x_BSND = self.engram(x_BSND, batch)

        def attention(x_BSD: Tensor) -> Tensor:
            out: Tensor = self.self_attn(self.input_layernorm(x_BSD), batch)
            return out

        def experts(x_BSD: Tensor) -> Tensor:
            out: Tensor = self.mlp(self.post_attention_layernorm(x_BSD), batch.tokens_BS)
            return out

        out_BSND: Tensor = self.ffn_hc(self.attn_hc(x_BSND, attention), experts)
        return out_BSND


class HyperMtpLayer(HyperLayer):
    """The multi-token-prediction layer of V4: window attention and experts chosen by score.

    Unlike V3's it has two projections, one of the next token's embedding, which every stream is
    given, and one of each stream. Embedding and output head are the main model's.
    """

    def __init__(self, config: V4Config, numerics: Numerics, dispatcher: TokenDispatcher) -> None:
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
    ) -> Float[Tensor, "B S D"]:
        """The state that the output head reads, from the streams and the embedding of token i + 1.

        `hidden` are the streams as the main model's last layer leaves them.
        """
        next_BSD = self.e_proj(self.enorm(following_BSD))
        joined_BSND = next_BSD.unsqueeze(2) + self.h_proj(self.hnorm(hidden_BSND))
        out: Tensor = self.norm(self.hc_head(self(joined_BSND, batch)))
        return out


def _read(x_TND: Tensor, pre_TN: Tensor) -> Float[Tensor, "T D"]:
    """One stream for the sublayer, summed in the weights' precision."""
    return (pre_TN.unsqueeze(1) @ x_TND.to(pre_TN.dtype)).squeeze(1).to(x_TND.dtype)


def _projected(x_TND: Tensor, fn_MX: Tensor, epsilon: float) -> Float[Tensor, "M T"]:
    """`fn` times x / rms(x), with a token's streams side by side; float32 at least."""
    projected: Tensor = _Projected.apply(widened(x_TND.flatten(1)), widened(fn_MX), epsilon)
    return projected


class _Projected(torch.autograd.Function):
    """The norm is one factor a token, so it divides the small product, not the streams."""

    @staticmethod
    def forward(ctx: Any, x_TX: Tensor, fn_MX: Tensor, epsilon: float) -> Tensor:
        square_T = torch.linalg.vector_norm(x_TX, dim=-1).square_()
        factor_T = (square_T / x_TX.shape[1] + epsilon).rsqrt_()
        projected_MT = (fn_MX @ x_TX.T).mul_(factor_T)
        ctx.save_for_backward(x_TX, fn_MX, factor_T, projected_MT)
        return projected_MT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TX, fn_MX, factor_T, projected_MT = ctx.saved_tensors
        outer_MT = grads[0] * factor_T
        along_T = (grads[0] * projected_MT).sum(0) * factor_T.square() / -x_TX.shape[1]
        dx_TX = (outer_MT.T @ fn_MX).addcmul_(x_TX, along_T.unsqueeze(1))
        return dx_TX, outer_MT @ x_TX, None


class _Sinkhorn(torch.autograd.Function):
    """Columns, then rows and columns in turn, divided by their sums (+ epsilon).

    The matrices lie token-last, so that every operation runs over long rows; of the steps only the
    sums are kept, from which the way back recovers each step's matrix.
    """

    @staticmethod
    def forward(ctx: Any, start_NNT: Tensor, iterations: int, epsilon: float) -> Tensor:
        mix_NNT, sums = start_NNT.clone(memory_format=torch.contiguous_format), []
        for step in range(2 * iterations - 1):
            sums.append(mix_NNT.sum(step % 2, keepdim=True).add_(epsilon))
            mix_NNT.div_(sums[-1])
        ctx.save_for_backward(mix_NNT, *sums)
        return mix_NNT

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        mix_NNT, *sums = ctx.saved_tensors
        mix_NNT, d_NNT = mix_NNT.clone(), grads[0]
        for step in reversed(range(len(sums))):
            along = (d_NNT * mix_NNT).sum(step % 2, keepdim=True)
            d_NNT = (d_NNT - along).div_(sums[step])
            mix_NNT.mul_(sums[step])
        return d_NNT, None, None


class _Write(torch.autograd.Function):
    """Mixed streams plus each one's share of the sublayer's output, without a copy per term.

    The sums are in the type of the weights, float32 at least, and rounded to the streams' once:
    the mix in bfloat16 would not be doubly stochastic any more, and every layer would amplify a
    stream or let it fade by its error.
    """

    @staticmethod
    def forward(
        ctx: Any, x_TND: Tensor, out_TD: Tensor, post_TN: Tensor, mix_TNN: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TND, out_TD, post_TN, mix_TNN)
        x, out = (y.to(mix_TNN.dtype) for y in (x_TND, out_TD))
        mixed_TND = mix_TNN.transpose(1, 2) @ x
        return mixed_TND.addcmul_(post_TN.unsqueeze(2), out.unsqueeze(1)).to(x_TND.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TND, out_TD, post_TN, mix_TNN = ctx.saved_tensors
        x, out, dy_TND = (y.to(mix_TNN.dtype) for y in (x_TND, out_TD, grads[0]))
        return (
            (mix_TNN @ dy_TND).to(x_TND.dtype),
            (post_TN.unsqueeze(1) @ dy_TND).squeeze(1).to(out_TD.dtype),
            (dy_TND @ out.unsqueeze(2)).squeeze(2),
            x @ dy_TND.transpose(1, 2),
        )

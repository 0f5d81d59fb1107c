"""The sums of hyper-connections over a token's streams, laid out for speed.

`model.hyper` says what they are for. Twenty steps of Sinkhorn on matrices of 4 x 4 are all overhead
where a token's matrix lies together; here tokens lie last, so that every operation runs over long
rows, and results are turned back at the end. All of it is in float32 at least; streams are rounded
to their own type once, when they are written. `tests/model/test_hyper.py` has the same as plain
lines.

Axes: T tokens, N streams, D width, X = N * D, M mixing weights.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.widening import widened


@dataclass(frozen=True, slots=True)
class Writing:
    """The streams in front of a sublayer, and how they take up its output."""

    x_BSND: Tensor
    post_TN: Tensor
    mix_TNN: Tensor

    def write(self, out_BSD: Float[Tensor, "B S D"]) -> Float[Tensor, "B S N D"]:
        """Stream k becomes post_k out + sum_j mix_jk x_j."""
        x_TND = self.x_BSND.flatten(0, 1)
        written_TND = write(x_TND, out_BSD.flatten(0, 1), self.post_TN, self.mix_TNN)
        return written_TND.view_as(self.x_BSND)


def connection_weights(
    x_TND: Float[Tensor, "T N D"],
    fn_MX: Float[Tensor, "M X"],
    base_M: Float[Tensor, " M"],
    scale_3: Float[Tensor, "3"],
    *,
    norm_epsilon: float,
    epsilon: float,
    iterations: int,
) -> tuple[Float[Tensor, "T N"], Float[Tensor, "T N"], Float[Tensor, "T N N"]]:
    """(pre, post, mix) of each token, from w = scale * (fn x / rms(x)) + base of its N streams.

    pre = sigmoid(w) + epsilon of the first N, post = 2 sigmoid(w) of the next; mix is the softmax
    of the rows of the rest, plus epsilon, of which `iterations` times columns and, between them,
    rows are divided by their sums.
    """
    streams = x_TND.shape[1]
    sizes = [streams, streams, streams * streams]
    scale_M = torch.cat(
        [s.expand(n) for s, n in zip(widened(scale_3).split(1), sizes, strict=True)]
    )
    projected_MT = _projected(x_TND, fn_MX, norm_epsilon)
    parts = (projected_MT * scale_M.unsqueeze(1) + widened(base_M).unsqueeze(1)).split(sizes)
    start_NNT = parts[2].unflatten(0, (streams, streams)).softmax(1) + epsilon
    mix_NNT: Tensor = _Sinkhorn.apply(start_NNT, iterations, epsilon)
    return (
        parts[0].sigmoid().T.contiguous() + epsilon,
        2 * parts[1].sigmoid().T.contiguous(),
        mix_NNT.permute(2, 0, 1).contiguous(),
    )


def reading_weights(
    x_TND: Float[Tensor, "T N D"],
    fn_NX: Float[Tensor, "N X"],
    base_N: Float[Tensor, " N"],
    scale_1: Float[Tensor, "1"],
    *,
    norm_epsilon: float,
    epsilon: float,
) -> Float[Tensor, "T N"]:
    """`pre` alone."""
    projected_NT = _projected(x_TND, fn_NX, norm_epsilon)
    scaled_NT = projected_NT * widened(scale_1) + widened(base_N).unsqueeze(1)
    return scaled_NT.sigmoid().T.contiguous() + epsilon


def read(x_TND: Float[Tensor, "T N D"], pre_TN: Float[Tensor, "T N"]) -> Float[Tensor, "T D"]:
    """sum_i pre_i x_i, in the type of `x`."""
    return (pre_TN.unsqueeze(1) @ x_TND.to(pre_TN.dtype)).squeeze(1).to(x_TND.dtype)


def write(
    x_TND: Float[Tensor, "T N D"],
    out_TD: Float[Tensor, "T D"],
    post_TN: Float[Tensor, "T N"],
    mix_TNN: Float[Tensor, "T N N"],
) -> Float[Tensor, "T N D"]:
    """Stream k becomes post_k out + sum_j mix_jk x_j, in the type of `x`."""
    written: Tensor = _Write.apply(x_TND, out_TD, post_TN, mix_TNN)
    return written


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

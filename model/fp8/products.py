"""The three products of a Linear y = x W^T: forward, input gradient, weight gradient.

| | equation | contracts | left, by tiles of | right, by tiles of |
|---|---|---|---|---|
| `fprop` | y[T, O] = x[T, I] W[O, I]^T | I | x, 1 x 128 | W, 128 x 128 |
| `dgrad` | dx[T, I] = dy[T, O] W[O, I] | O | dy, 1 x 128 | W, 128 x 128 |
| `wgrad` | dW[O, I] = dy[T, O]^T x[T, I] | T | dy, 128 x 1 | x, 128 x 1 |

The names are those of DeepSeek-V3's figure 6. A scale can only be applied to a sum of products that
all share it, so tiles are long in the dim that is contracted: in channels for the first two, in
tokens for the third. W is read both ways and has square blocks. x and dy are quantised twice, once
along channels and once along tokens.

With `groups` the rows of x and dy are sorted by group, and each group has a matrix of its own: W is
[G, O, I]. Without, there is one matrix [O, I].

Axes: T tokens, I inputs, O outputs, G groups (experts, or heads' groups in V4).
"""

from torch import Tensor

from model.fp8.backends import Backend
from model.fp8.groups import Groups
from model.fp8.quantized import Quantized


def fprop(
    backend: Backend, x8_TI: Quantized, w8_OI: Quantized, groups: Groups | None = None
) -> Tensor:
    """y = x W^T: [T, O], in the backend's output dtype."""
    if groups is None:
        return backend.matmul(x8_TI, w8_OI.T)
    return backend.grouped_matmul(x8_TI, w8_OI.T, groups)


def dgrad(
    backend: Backend, dy8_TO: Quantized, w8_OI: Quantized, groups: Groups | None = None
) -> Tensor:
    """dx = dy W: [T, I], in the backend's output dtype."""
    if groups is None:
        return backend.matmul(dy8_TO, w8_OI)
    return backend.grouped_matmul(dy8_TO, w8_OI, groups)


def wgrad(
    backend: Backend, dy8_TO: Quantized, x8_TI: Quantized, groups: Groups | None = None
) -> Tensor:
    """dW = dy^T x, of operands with tiles along tokens: float32 [O, I] or [G, O, I].

    A group without rows has gradient 0.
    """
    if groups is None:
        return backend.matmul(dy8_TO.T, x8_TI)
    return backend.grouped_outer(dy8_TO, x8_TI, groups)

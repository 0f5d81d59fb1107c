"""Sums in float32 at least, whatever type the weights and the stream of states have.

bfloat16 has 8 bits: a sum of many terms held in it stops growing once a term is below 2^-9 of it,
and a softmax of scores rounded to it is off by their last bit, 3 % at a score of 8. So scores,
softmaxes, norms and every accumulator are float32 inside, and a result is rounded once, when it
leaves. float64 stays float64.
"""

import torch
from torch import Tensor


def widened(x: Tensor) -> Tensor:
    """`x` in float32 at least: narrower types are cast, float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))

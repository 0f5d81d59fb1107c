"""Which document each token of packed rows belongs to; needs nothing but torch.

Axes: N rows, S tokens of a row.
"""

from jaxtyping import Int
from torch import Tensor

from stages.framing import BOS_ID


def segments_of(tokens_NS: Int[Tensor, "N S"]) -> Int[Tensor, "N S"]:
    """The document of each token of packed rows [N, S], counted from 0 or 1 within each row.

    A row that begins inside a document calls that document 0; every BOS opens the next one.
    """
    return (tokens_NS == BOS_ID).cumsum(1)

"""How a document is framed: the tokens that begin and end it, here and in every released model.

Axes: N rows, S tokens of a row.
"""

from jaxtyping import Int
from torch import Tensor

BOS_ID = 0
EOS_ID = 1
BOS_TOKEN = "<|begin_of_text|>"
EOS_TOKEN = "<|end_of_text|>"


def segments_of(tokens_NS: Int[Tensor, "N S"]) -> Int[Tensor, "N S"]:
    """The document of each token of packed rows [N, S], counted from 0 or 1 within each row.

    A row that begins inside a document calls that document 0; every BOS opens the next one.
    """
    return (tokens_NS == BOS_ID).cumsum(1)

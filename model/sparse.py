"""DeepSeek Sparse Attention: latent attention over what a lightning indexer picks."""

from model.attention import LatentAttention


class SparseLatentAttention(LatentAttention):
    """MLA over the tokens that the indexer picks."""

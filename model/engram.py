"""Engram, conditional memory read by hashed n-grams (arXiv 2601.07372)."""

from jaxtyping import Float
from torch import Tensor, nn

from configs.model import ModelConfig
from model.passes import Pass


class Engram(nn.Module):
    """The memory in front of one layer."""

    def forward(
        self, h_BSND: Float[Tensor, "B S N D"], batch: Pass
    ) -> Float[Tensor, "B S N D"]:
        """The streams with what the memory adds to each."""
        raise NotImplementedError


def engram_before(config: ModelConfig, layer: int) -> Engram | None:
    """The memory read in front of `layer`, if the config has one there."""
    if config.engram is None or layer not in config.engram.layer_ids:
        return None
    raise NotImplementedError

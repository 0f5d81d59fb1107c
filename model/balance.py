"""Load balance without an auxiliary loss, and the small sequence-wise loss beside it.

DeepSeek-V3, section 2.1.2, eq. 16-20.

Axes: B sequences, S positions, E routed experts, K choices.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor


def updated_bias(
    bias_E: Float[Tensor, " E"], load_E: Float[Tensor, " E"], speed: float
) -> Float[Tensor, " E"]:
    """The routing bias after a step: lower where load exceeds the mean, higher below it."""
    return bias_E + speed * torch.sign(load_E.mean() - load_E)


def sequence_balance_loss(
    experts_BSK: Int[Tensor, "B S K"], scores_BSE: Float[Tensor, "B S E"]
) -> Float[Tensor, " B"]:
    """sum_i f_i P_i of each sequence; 1 when balanced, up to E / K when not.

    f_i is the share of choices that expert i got, times E / K; P_i is its mean normalised score.
    """
    batch, length, choices = experts_BSK.shape
    experts = scores_BSE.shape[-1]
    counts_BE = torch.zeros(batch, experts, device=scores_BSE.device)
    flat = experts_BSK.flatten(1)
    counts_BE.scatter_add_(1, flat, torch.ones_like(flat, dtype=counts_BE.dtype))
    frequency_BE = counts_BE * (experts / (choices * length))
    probability_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
    return (frequency_BE * probability_BE).sum(-1)


def imbalance(load_E: Float[Tensor, " E"]) -> float:
    """Largest load over the mean load, less one: 0 is perfect balance."""
    return float(load_E.max() / load_E.mean().clamp_min(1e-9) - 1)

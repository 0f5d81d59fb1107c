"""Load balance without an auxiliary loss, and the small sequence-wise loss beside it.

DeepSeek-V3, section 2.1.2, eq. 16-20.

Axes: B sequences, S positions, E routed experts, K choices.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def updated_bias(
    bias_E: Float[Tensor, " E"], load_E: Float[Tensor, " E"], speed: float
) -> Float[Tensor, " E"]:
    """The routing bias after a step: lower where load exceeds the mean, higher below it.

    Its mean is 0 from then on: more experts are usually above the mean load than below it or the
    other way round, so that all biases would drift together, of which no choice among experts
    takes notice, while float32 resolves ever less of what does. A speed of 0 leaves it as it is.
    """
    if not speed:
        return bias_E
    moved_E = bias_E + speed * torch.sign(load_E.mean() - load_E)
    return moved_E - moved_E.mean()


def sequence_balance_loss(scores_BSE: Float[Tensor, "B S E"], choices: int) -> Float[Tensor, " B"]:
    """sum_i f_i P_i of each sequence (eq. 17-20); 1 when balanced, up to E / K when not.

    f_i is the share of tokens among whose K best scores expert i is, times E / K; P_i is its mean
    normalised score. The scores are plain, as in eq. 18: neither the routing bias nor the limit of
    groups has a part. Counted by where tokens were sent, the bias would have evened out what this
    loss is there to even out, and its gradient would vanish.

    `choices` is K. Gradients flow through P alone.
    """
    length, experts = scores_BSE.shape[1:]
    best_BSK = scores_BSE.detach().topk(choices, sorted=False).indices
    chosen = best_BSK.flatten(1)
    counts_BE = torch.zeros_like(scores_BSE[:, 0], dtype=torch.int64)
    counts_BE.scatter_add_(1, chosen, torch.ones_like(chosen))
    frequency_BE = counts_BE.to(scores_BSE.dtype) * (experts / (choices * length))
    probability_BE = (scores_BSE / scores_BSE.sum(-1, keepdim=True)).mean(1)
    return (frequency_BE * probability_BE).sum(-1)


def imbalance(load_E: Float[Tensor, "*L E"]) -> Float[Tensor, "*L"]:
    """Largest load over the mean load, less one: 0 is perfect balance."""
    return load_E.amax(-1) / load_E.mean(-1).clamp_min(1e-9) - 1

"""The objective of DeepSeek-V3.2's GRPO as pure functions of log-probabilities.

Source: arXiv 2512.02556, section 3.1. With r = pi / pi_old for each answer token, A the reward
less its group's mean, and i over sequences:

    J = mean_i mean_t [ M_i min(r A_i, clip(r, 1 - eps, 1 + eps) A_i) - beta r (q - log q - 1) ]

where q = pi_ref / pi, and M_i = 0 if A_i < 0 and mean_t log(pi_old / pi) > delta, else 1.
The mask M leaves the KL term alone. pi_old is what the sampler returned, so r and M also see the
differences between sampler and trainer.

Axes: N sequences, T positions. Position t holds the log-probability of token t + 1; rows are padded
wherever `mask_NT` is false, and what stands there is never read.
"""

import statistics
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from configs.errors import TrainingError
from configs.rl import GrpoConfig


def advantages(rewards_G: Sequence[float]) -> list[float]:
    """Each reward of a group less the group's mean, without division by the deviation.

    The mean is taken exactly before it is rounded, so that equal rewards give exact zeros.
    """
    mean = statistics.mean(rewards_G)
    return [reward - mean for reward in rewards_G]


def token_logprobs(
    logits_NTV: Float[Tensor, "N T V"], tokens_NT: Int[Tensor, "N T"], *, temperature: float
) -> Float[Tensor, "N T"]:
    """Log-probability of each next token under the sampling distribution, in float32.

    `temperature` must be the sampler's, or policy and behaviour are different distributions.
    The last position predicts nothing and holds 0.
    """
    scaled = logits_NTV[:, :-1].float() / temperature
    chosen = scaled.log_softmax(-1).gather(-1, tokens_NT[:, 1:, None]).squeeze(-1)
    return torch.nn.functional.pad(chosen, (0, 1))


def grpo_loss(
    logprobs_NT: Float[Tensor, "N T"],
    behaviour_logprobs_NT: Float[Tensor, "N T"],
    reference_logprobs_NT: Float[Tensor, "N T"],
    advantages_N: Float[Tensor, " N"],
    mask_NT: Bool[Tensor, "N T"],
    *,
    config: GrpoConfig,
    num_sequences: int,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """-J of these sequences' share in a batch of `num_sequences`, and what to plot.

    `num_sequences` counts the sequences of all ranks, so that the ranks' losses and metrics add up
    to those of the whole batch; only `ratio_max` combines by maximum. A row without answer tokens
    is filler: it contributes nothing, and `num_sequences` does not count it.

    Metrics are means over sequences of means over answer tokens: `kl` (nats, the unbiased
    estimate), `clip_share` (tokens whose gradient the clip cut off), `masked_share` (sequences
    masked as off-policy), `ratio_mean`, and `ratio_max` over answer tokens.

    The ratio keeps its gradient inside the KL term: so, in expectation over pi_old, the term's
    gradient is that of KL(pi || pi_ref). Where a log-probability on an answer token or a ratio is
    not finite, the loss or a metric is not either: whoever reads them must look.
    """
    # Differences are zeroed at padding before exp, so that nothing there reaches value or gradient.
    log_ratio_NT = torch.where(mask_NT, logprobs_NT - behaviour_logprobs_NT, 0)
    log_reference_NT = torch.where(mask_NT, reference_logprobs_NT - logprobs_NT, 0)
    ratio_NT = log_ratio_NT.exp()
    advantages_N1 = advantages_N[:, None].to(ratio_NT.dtype)

    low, high = 1 - config.clip_epsilon, 1 + config.clip_epsilon
    gain_NT = torch.minimum(ratio_NT * advantages_N1, ratio_NT.clamp(low, high) * advantages_N1)
    kl_NT = ratio_NT * (torch.expm1(log_reference_NT) - log_reference_NT)
    gap_N = _sequence_mean(-log_ratio_NT.detach(), mask_NT)
    masked_N = (advantages_N < 0) & (gap_N > config.off_policy_delta)

    gain_N = _sequence_mean(gain_NT, mask_NT) * ~masked_N
    kl_N = _sequence_mean(kl_NT, mask_NT)
    loss = -(gain_N - config.kl_weight * kl_N).sum() / num_sequences

    ratio_NT = ratio_NT.detach()
    clipped_NT = (advantages_N1 > 0) & (ratio_NT > high) | (advantages_N1 < 0) & (ratio_NT < low)
    metrics = {
        "kl": kl_N.detach().sum() / num_sequences,
        "clip_share": _sequence_mean(clipped_NT, mask_NT).sum() / num_sequences,
        "masked_share": masked_N.sum() / num_sequences,
        "ratio_mean": _sequence_mean(ratio_NT, mask_NT).sum() / num_sequences,
        "ratio_max": (ratio_NT * mask_NT).max(),
    }
    return loss, metrics


def _sequence_mean(x_NT: Tensor, mask_NT: Tensor) -> Tensor:
    """Mean over each sequence's answer tokens; 0 for filler."""
    return (x_NT * mask_NT).sum(1) / mask_NT.sum(1).clamp(min=1)


def require_finite(name: str, value_NT: Float[Tensor, "N T"], mask_NT: Bool[Tensor, "N T"]) -> None:
    """TrainingError if a value on an answer token is not finite. Asks where the values lie."""
    wrong_NT = ~torch.isfinite(value_NT) & mask_NT
    if wrong_NT.any():
        row, position = (int(index) for index in wrong_NT.nonzero()[0])
        raise TrainingError(
            f"{name} is {float(value_NT[row, position])} at sequence {row}, position "
            f"{position}, not finite; lower posttrain.optim.learning_rate, or check the sampler"
        )

"""GRPO as DeepSeek-V3.2's paper writes it (arXiv 2512.02556, section 3.1), token by token.

    J = E[ 1/G sum_i 1/|o_i| sum_t ( M_it min(r_it A_it, clip(r_it, 1 - eps, 1 + eps) A_it)
                                     - beta D_KL(pi_theta || pi_ref) ) ]
    r_it = pi_theta(o_it) / pi_old(o_it)            A_it = R_i - mean(R_1 ... R_G)
    D_KL = r_it (pi_ref / pi_theta - log(pi_ref / pi_theta) - 1)
    M_it = 0 where A_it < 0 and 1/|o_i| sum_t log(pi_old / pi_theta) > delta, else 1

E is a mean over the questions q. Everything here is in float64.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.transformer import Transformer


@dataclass(frozen=True)
class Answered:
    """One answer o_i to a question q."""

    question: tuple[int, ...]
    answer: tuple[int, ...]
    old: tuple[float, ...]
    """log pi_old of each token of the answer, as the sampler said."""
    ref: tuple[float, ...]
    """log pi_ref of the same; see `logprobs_of`."""
    reward: float


def logprobs_of(
    model: Transformer, question: Sequence[int], answer: Sequence[int], temperature: float
) -> tuple[float, ...]:
    """log pi of each token of the answer, one text without padding, as the model predicts it."""
    text = torch.tensor([[*question, *answer]])
    with torch.no_grad():
        logits_TV = model(text)[0].double() / temperature
    found = []
    for place, token in enumerate(answer):
        row_V = logits_TV[len(question) - 1 + place]
        found.append(float(row_V[token] - row_V.logsumexp(0)))
    return tuple(found)


def objective(
    groups: Sequence[Sequence[Answered]],
    policy: Transformer,
    *,
    temperature: float,
    epsilon: float,
    beta: float,
    delta: float,
) -> float:
    """J; its negative is what trainers minimise."""
    total = 0.0
    for group in groups:
        mean_reward = math.fsum(one.reward for one in group) / len(group)
        inner = 0.0
        for one in group:
            advantage = one.reward - mean_reward
            theta = logprobs_of(policy, one.question, one.answer, temperature)
            behind = sum(o - p for o, p in zip(one.old, theta, strict=True)) / len(one.answer)
            kept = 0.0 if advantage < 0 and behind > delta else 1.0
            tokens = 0.0
            for log_theta, log_old, log_ref in zip(theta, one.old, one.ref, strict=True):
                ratio = math.exp(log_theta - log_old)
                clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
                gain = kept * min(ratio * advantage, clipped * advantage)
                quotient = math.exp(log_ref - log_theta)
                divergence = ratio * (quotient - math.log(quotient) - 1)
                tokens += gain - beta * divergence
            inner += tokens / len(one.answer)
        total += inner / len(group)
    return total / len(groups)

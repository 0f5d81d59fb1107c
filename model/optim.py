"""AdamW as DeepSeek-V3 sets it, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from configs.train import OptimConfig


def adamw(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Weight decay on matrices only; norms and biases are vectors."""
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.dim() > 1], "weight_decay": config.weight_decay},
        {"params": [p for _, p in named if p.dim() <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        eps=config.epsilon,
        fused=True,
    )


def warmup_cosine(
    step: int, *, steps: int, warmup_steps: int, decay_share: float, final_share: float
) -> float:
    """Factor of the peak learning rate at `step` (1 .. steps): linear up, flat, cosine down."""
    if step <= warmup_steps:
        return step / warmup_steps
    decay_steps = round(steps * decay_share)
    done = step - (steps - decay_steps)
    if done <= 0:
        return 1.0
    cosine = 0.5 * (1 + math.cos(math.pi * done / decay_steps))
    return final_share + (1 - final_share) * cosine


def moments(
    optimizer: torch.optim.AdamW, named: Iterable[tuple[str, nn.Parameter]]
) -> dict[str, Tensor]:
    """First and second moments by parameter name: `exp_avg/<name>`, `exp_avg_sq/<name>`."""
    found = {}
    for name, parameter in named:
        state = optimizer.state.get(parameter)
        if state:
            found[f"exp_avg/{name}"] = state["exp_avg"]
            found[f"exp_avg_sq/{name}"] = state["exp_avg_sq"]
    return found


def restore_moments(
    optimizer: torch.optim.AdamW,
    named: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
    step: int,
) -> None:
    """Put back what `moments` gave, after `step` optimiser steps."""
    for name, parameter in named:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": tensors[f"exp_avg/{name}"].clone(),
            "exp_avg_sq": tensors[f"exp_avg_sq/{name}"].clone(),
        }

"""AdamW as DeepSeek-V3 sets it, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from configs.train import OptimConfig
from model.engram import MemoryTable


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose moments rest in a type of their own between steps.

    DeepSeek-V3 keeps them in bfloat16 (section 3.3.3). A step widens one parameter's moments at a
    time to float32 and rounds them to nearest when it is done; so it does a parameter that is not
    float32 itself.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        super().__init__(
            groups,
            lr=config.learning_rate,
            betas=(config.beta1, config.beta2),
            eps=config.epsilon,
            fused=True,
        )
        self.rest_dtype = getattr(torch, config.moments)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One update of every parameter that has a gradient; closures are not called."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group)

    def rest(self, moment: Tensor) -> Tensor:
        """`moment` in the type that moments rest in, as a tensor of its own."""
        return moment.to(self.rest_dtype, copy=True)

    def _update(self, parameter: Tensor, slope: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0, device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.rest_dtype)
        state["step"] += 1
        first, second = (state[name].float() for name in ("exp_avg", "exp_avg_sq"))
        wide = parameter.float()
        torch._fused_adamw_(
            [wide],
            [slope.float()],
            [first],
            [second],
            [],
            [state["step"]],
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        if wide is not parameter:
            parameter.copy_(wide)
        if first is not state["exp_avg"]:
            state["exp_avg"].copy_(first)
            state["exp_avg_sq"].copy_(second)


def adamw(model: nn.Module, config: OptimConfig) -> AdamW:
    """Weight decay on matrices only, AdamW's update for every parameter.

    A matrix is what has at least two dimensions and begins at random, V4's generators of
    hyper-connection weights among them. What a module lists in its `initial_values` is an offset, a
    factor or a tap, with a value of its own to begin from, and does not decay whatever its shape:
    V4's `position_bias` and the taps of Engram's convolution have two dimensions. Norms and biases
    are vectors.

    Tables of n-grams do not decay either, or rows would fade from one reading to the next, and
    they learn at `config.table_rate_factor` times the rate. Each group says its factor of the rate
    as `lr_factor`, for whoever sets `lr`.
    """
    tables = [m.weight for m in model.modules() if isinstance(m, MemoryTable)]
    apart = {id(table) for table in tables}
    others = [p for p in model.parameters() if id(p) not in apart]
    constant = {id(p) for p in _start_at_a_constant(model)}
    decaying = [p for p in others if p.dim() > 1 and id(p) not in constant]
    matrices = {id(p) for p in decaying}
    staying = [p for p in others if id(p) not in matrices]
    rate, factor = config.learning_rate, config.table_rate_factor
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": config.weight_decay, "lr_factor": 1.0},
        {"params": staying, "weight_decay": 0.0, "lr_factor": 1.0},
    ]
    if tables:
        groups.append(
            {"params": tables, "weight_decay": 0.0, "lr_factor": factor, "lr": rate * factor}
        )
    return AdamW(groups, config)


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


def moments(optimizer: AdamW, named: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Tensor]:
    """First and second moments by parameter name: `exp_avg/<name>`, `exp_avg_sq/<name>`."""
    found = {}
    for name, parameter in named:
        state = optimizer.state.get(parameter)
        if state:
            found[f"exp_avg/{name}"] = state["exp_avg"]
            found[f"exp_avg_sq/{name}"] = state["exp_avg_sq"]
    return found


def restore_moments(
    optimizer: AdamW,
    named: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
    step: int,
) -> None:
    """Put back what `moments` gave, after `step` optimiser steps."""
    for name, parameter in named:
        optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            "exp_avg": optimizer.rest(tensors[f"exp_avg/{name}"]),
            "exp_avg_sq": optimizer.rest(tensors[f"exp_avg_sq/{name}"]),
        }


def _start_at_a_constant(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        constants: Mapping[str, float] = getattr(module, "initial_values", {})
        for name, parameter in module.named_parameters(recurse=False):
            if name in constants:
                yield parameter

"""AdamW as DeepSeek-V3 sets it, and learning-rate schedules as pure functions of the step."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from configs.errors import ArtifactError, ConfigError
from configs.train import OptimConfig
from model.engram import MemoryTable

CAST_VALUES = 2**24
"""Moments that are in float32 at a time where they rest in less: 128 MiB for both of each."""
RateGroup = Literal["model", "table", "indexer"]
"""Parameters that share a learning rate."""


class AdamW(torch.optim.AdamW):
    """torch's fused AdamW, whose moments rest in a type of their own between steps.

    DeepSeek-V3 keeps them in bfloat16 (section 3.3.3). A step casts the moments of a few parameters
    at a time to float32 and rounds them to nearest when it is done. A parameter without a gradient
    is left alone: neither its moments nor its weight decay move it.
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
            learning = [p for p in group["params"] if p.grad is not None]
            for part in _portions(learning, cast=self.rest_dtype != torch.float32):
                self._update(part, group)

    def rest(self, moment: Tensor) -> Tensor:
        """`moment` in the type that moments rest in, as a tensor of its own."""
        return moment.to(self.rest_dtype, copy=True)

    def _update(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One call for all of them: on a device each call costs as much as a small update."""
        states = [self._state_of(parameter) for parameter in parameters]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1)
        first, second = (
            [state[name].float() for state in states] for name in ("exp_avg", "exp_avg_sq")
        )
        torch._fused_adamw_(
            parameters,
            [parameter.grad for parameter in parameters if parameter.grad is not None],
            first,
            second,
            [],
            steps,
            lr=group["lr"],
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            amsgrad=False,
            maximize=False,
        )
        if self.rest_dtype != torch.float32:
            torch._foreach_copy_([state["exp_avg"] for state in states], first)
            torch._foreach_copy_([state["exp_avg_sq"] for state in states], second)

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            # Made on the device: a copy to it would be waited for.
            state["step"] = torch.zeros((), device=parameter.device)
            for name in ("exp_avg", "exp_avg_sq"):
                state[name] = torch.zeros_like(parameter, dtype=self.rest_dtype)
        return state


def _portions(parameters: Sequence[Tensor], *, cast: bool) -> Iterator[list[Tensor]]:
    """Those of one device at a time, and where moments are cast only so many values."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for parameter in parameters:
        by_device.setdefault(parameter.device, []).append(parameter)
    for together in by_device.values():
        if not cast:
            yield together
            continue
        part: list[Tensor] = []
        for parameter in together:
            if part and sum(p.numel() for p in part) + parameter.numel() > CAST_VALUES:
                yield part
                part = []
            part.append(parameter)
        yield part


def adamw(model: nn.Module, config: OptimConfig) -> AdamW:
    """Weight decay on matrices only, AdamW's update for every parameter that has a gradient.

    A matrix is what has at least two dimensions and begins at random, V4's generators of
    hyper-connection weights among them. What a module lists in its `initial_values` is an offset, a
    factor or a tap, with a value of its own to begin from, and does not decay whatever its shape:
    V4's `position_bias` and the taps of Engram's convolution have two dimensions. Norms and biases
    are vectors.

    Tables of n-grams do not decay either, or rows would fade from one reading to the next, and
    they learn at `config.table_rate_factor` times the rate. Indexers have groups of their own, for
    they learn from another loss at another rate (`set_rates`).

    ConfigError for a parameter that is not float32: a bfloat16 one has 8 bits, of which an update
    a thousandth as large as the weight changes none, so that training would stand still.
    """
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32:
            raise ConfigError(
                f"{name} is {str(parameter.dtype).removeprefix('torch.')}, and AdamW's small "
                "updates need float32 weights to add to; cast the model with .float()"
            )
    tables = {id(m.weight) for m in model.modules() if isinstance(m, MemoryTable)}
    constants = {id(p) for p in _start_at_a_constant(model)}
    groups: dict[tuple[RateGroup, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        matrix = parameter.dim() > 1 and id(parameter) not in constants | tables
        group: RateGroup = "table" if id(parameter) in tables else rate_group(name)
        decay = config.weight_decay if matrix else 0.0
        groups.setdefault((group, decay), []).append(parameter)
    optimizer = AdamW(
        [
            {"params": parameters, "weight_decay": decay, "rate_group": group}
            for (group, decay), parameters in groups.items()
        ],
        config,
    )
    set_rates(optimizer, config.learning_rate, table_rate_factor=config.table_rate_factor)
    return optimizer


def rate_group(name: str) -> Literal["model", "indexer"]:
    """Whose learning rate and clip the parameter `name` follows.

    An indexer's loss reaches nothing but the indexer, and no other loss reaches it. Under one clip
    the larger of two unrelated gradients would shrink the other.
    """
    return "indexer" if "indexer" in name.split(".") else "model"


def set_rates(
    optimizer: AdamW,
    learning_rate: float,
    *,
    indexer_learning_rate: float | None = None,
    table_rate_factor: float,
) -> None:
    """Set the rates of the next step; an indexer's is the model's unless given."""
    rates: dict[RateGroup, float] = {
        "model": learning_rate,
        "table": learning_rate * table_rate_factor,
        "indexer": learning_rate if indexer_learning_rate is None else indexer_learning_rate,
    }
    for group in optimizer.param_groups:
        group["lr"] = rates[group["rate_group"]]


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
    """What the optimiser knows of each parameter, by its name.

    `exp_avg/<name>` and `exp_avg_sq/<name>` are the first and second moments, shaped as the
    parameter is; `updates/<name>` says how many updates each of its rows has had, float32 [rows].
    Nothing is there of a parameter that never had a gradient.
    """
    found = {}
    for name, parameter in named:
        state = optimizer.state.get(parameter)
        if state:
            found[f"exp_avg/{name}"] = state["exp_avg"]
            found[f"exp_avg_sq/{name}"] = state["exp_avg_sq"]
            # By rows, so that stacked experts can be saved and read one by one.
            found[f"updates/{name}"] = state["step"].expand(len(parameter))
    return found


def restore_moments(
    optimizer: AdamW,
    named: Iterable[tuple[str, nn.Parameter]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Put back what `moments` gave, beside each parameter on its device.

    ArtifactError if it gave moments without their updates.
    """
    for name, parameter in named:
        if f"updates/{name}" not in tensors:
            if f"exp_avg/{name}" in tensors:
                raise ArtifactError(
                    f"the save holds moments of {name} and not how many updates it has had; it is "
                    "of an older version: begin the training again"
                )
            optimizer.state.pop(parameter, None)
            continue
        optimizer.state[parameter] = {
            "step": tensors[f"updates/{name}"][0].to(parameter.device, copy=True),
            "exp_avg": optimizer.rest(tensors[f"exp_avg/{name}"]).to(parameter.device),
            "exp_avg_sq": optimizer.rest(tensors[f"exp_avg_sq/{name}"]).to(parameter.device),
        }


def _start_at_a_constant(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        constants: Mapping[str, float] = getattr(module, "initial_values", {})
        for name, parameter in module.named_parameters(recurse=False):
            if name in constants:
                yield parameter

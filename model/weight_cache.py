"""What products need of weights in another form, made once while the weights stay as they are.

Masters are float32; a product in bfloat16 or FP8 takes a copy of them. Made at each product, the
copy is made again for every micro-batch and every generated token. torch's own count of changes
(`Tensor._version`) does not move under a fused optimiser, so that whoever changes weights must say
so: a trainer after its step, a sampler after an update.

Nothing is kept of a model that nobody asked to `keep`: a product then makes its own copy each time.
"""

from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")

_kept: Any = WeakIdKeyDictionary()
"""By weight: what was made of it, by form."""
_of_copy: Any = WeakIdKeyDictionary()
"""By copy with a gradient: its weight."""


def keep(model: nn.Module) -> None:
    """From now on keep what is made of the weights of `model`, until it is told to `forget`."""
    for weight in model.parameters():
        _kept.setdefault(weight, {})
    model.register_load_state_dict_post_hook(_forget_loaded)


def forget(model: nn.Module) -> None:
    """The weights of `model` have changed: what was made of them is dropped."""
    for weight in model.parameters():
        if weight in _kept:
            _kept[weight].clear()


def _forget_loaded(model: nn.Module, _: object) -> None:
    forget(model)


def cached(weight: Tensor, form: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives, or gave when it was last asked for `weight` in this `form`.

    What is made must depend on the weight and the form alone.
    """
    made: dict[Hashable, T] | None = _kept.get(weight)
    if made is None:
        return make()
    if form not in made:
        made[form] = fit_to_learn(make)
    return made[form]


def fit_to_learn(make: Callable[[], T]) -> T:
    """What `make` gives, without gradients, and fit to take part in a later backward pass: what is
    made in inference mode is not."""
    with torch.inference_mode(False), torch.no_grad():
        return make()


def cast(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """`weight` in `dtype`, for a product; its gradient has the weight's own type.

    A weight of that type is returned as it is.
    """
    if weight.dtype == dtype:
        return weight
    copy = cached(weight, dtype, lambda: weight.detach().to(dtype))
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return copy
    made: Tensor = _Cast.apply(weight, copy)
    _of_copy[made] = weight
    return made


def weight_of(copy: Tensor) -> Tensor:
    """The weight that `cast` made `copy` of; what it did not make is a weight itself."""
    weight: Tensor = _of_copy.get(copy, copy)
    return weight


class _Cast(torch.autograd.Function):
    """The copy, in the graph of the weight."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, copy: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        ctx.set_materialize_grads(False)
        return copy.view_as(copy)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return None if grads[0] is None else grads[0].to(ctx.dtype), None

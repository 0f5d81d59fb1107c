"""Which part of a model was the first to give a value that is not finite.

Looked for only once a loss or gradient was found to be so: the batch that did it is run forward
again, with the same weights, under hooks on every module. A good step has none of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from functools import partial

import torch
from torch import Tensor, nn


@dataclass(slots=True)
class Sighting:
    """What a forward pass showed."""

    begun: list[str] = field(default_factory=list)
    """Modules in the order in which they were first called."""
    ended: list[str] = field(default_factory=list)
    """Modules in the order in which calls of them returned, each as often as it was called."""
    first: int | None = None
    """The place in `ended` of the first call that gave a value that is not finite; none if all
    were finite."""


@contextmanager
def watched(model: nn.Module) -> Iterator[Sighting]:
    """Watch what the modules of `model` return within. The host waits for each of them.

    A module returns before the one that holds it: so the first is the innermost. What is called
    without its module, as weights that are multiplied together with others', counts as part of
    the module that does so.
    """
    seen = Sighting()

    def begin(name: str, *_: object) -> None:
        if name not in seen.begun:
            seen.begun.append(name)

    def end(name: str, module: nn.Module, given: object, made: object) -> None:
        if seen.first is None and not is_finite(made):
            seen.first = len(seen.ended)
        seen.ended.append(name)

    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(partial(begin, name)))
        handles.append(module.register_forward_hook(partial(end, name)))
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def is_finite(made: object) -> bool:
    """Whether all numbers are, in a tensor or in a nest of sequences, mappings and dataclasses."""
    match made:
        case Tensor():
            return not made.is_floating_point() or bool(torch.isfinite(made).all())
        case Mapping():
            return all(map(is_finite, made.values()))
        case list() | tuple():
            return all(map(is_finite, made))
        case _ if is_dataclass(made):
            return all(is_finite(getattr(made, one.name)) for one in fields(made))
    return True


def in_backward_order(parameters: Sequence[str], begun: Sequence[str]) -> list[str]:
    """Names of parameters in the order in which a backward pass completes their gradients.

    `begun` is that of `Sighting`. A gradient is complete when the first use of its parameter has
    been gone back through; so that is the order of first uses, turned round. A parameter whose
    module was never called is used where the one that holds it begins; where none does, behind all
    modules, as the output head by the loss.
    """
    place = {name: number for number, name in enumerate(begun)}

    def first_use(parameter: str) -> int:
        owner = parameter
        while owner:
            owner = owner.rpartition(".")[0]
            if owner in place:
                return place[owner]
        return len(place)

    numbered = [(first_use(name), number, name) for number, name in enumerate(parameters)]
    return [name for *_, name in sorted(numbered, reverse=True)]

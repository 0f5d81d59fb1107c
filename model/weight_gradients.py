"""Weight gradients, which a backward pass may leave for later.

Nobody waits for the gradient of a weight before the step's end, while the gradient of an input is
what the layer below, or another machine, waits for. A schedule that fills its pauses with weight
gradients (zero bubble, arXiv 2401.10241; DualPipe, DeepSeek-V3, section 3.2.1) runs forward and
backward passes within `later`, and makes them when it likes. Outside of it they are made at once.

What is left are products of matrices: Linears, SwiGLUs and experts. In high precision gates and
V4's grouped projection are made at once always, and so are norms, embeddings, hyper-connections and
the output head, which is part of the loss.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.weight_cache import weight_of

Make = Callable[[], Sequence[Tensor]]


@dataclass(slots=True)
class Left:
    """Gradients that were left, in the order in which they could have been made."""

    waiting: list[tuple[list[Tensor], Make]] = field(default_factory=list)

    def flush(self) -> None:
        """Make all of them, and add each to its weight's, as the backward pass would have."""
        while self.waiting:
            weights, make = self.waiting.pop(0)
            with torch.no_grad():
                made = zip(weights, make(), strict=True)
                learning = [(one, grad.to(one.dtype)) for one, grad in made if one.requires_grad]
            # Whoever waits for a weight's gradient is told, which an assignment would not.
            torch.autograd.backward([one for one, _ in learning], [grad for _, grad in learning])


_left: list[Left] = []
"""The innermost `later`, last."""


@contextmanager
def later() -> Iterator[Left]:
    """Within it, forward passes prepare for it and backward passes leave weight gradients."""
    left = Left()
    _left.append(left)
    try:
        yield left
    finally:
        _left.pop()


def is_left() -> bool:
    """Whether weight gradients are left now."""
    return bool(_left)


def gradients(weights: Sequence[Tensor], make: Make) -> Sequence[Tensor | None]:
    """What a backward pass returns for `weights`, parameters or copies that `weight_cache.cast`
    gave: what `make` gives for them, or nothing yet."""
    if not _left:
        return make()
    leaves = [weight_of(one) for one in weights]
    if any(one.requires_grad for one in leaves):
        _left[-1].waiting.append((leaves, make))
    return [None] * len(weights)

"""Weight gradients, which a backward pass may leave for later.

Nobody waits for the gradient of a weight before the step's end, while the gradient of an input is
what the layer below, or another machine, waits for. A schedule that fills its pauses with weight
gradients (zero bubble, arXiv 2401.10241; DualPipe, DeepSeek-V3, section 3.2.1) runs forward and
backward passes within `later`, and makes them when it likes. Outside of it they are made at once.

What is left are products of matrices: Linears, SwiGLUs and experts. Gates, norms, embeddings,
hyper-connections and the output head are small or part of the loss, and are made at once always.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

Make = Callable[[], Sequence[Tensor]]


@dataclass(slots=True)
class Left:
    """Gradients that were left, in the order in which they could have been made."""

    waiting: list[tuple[list[Tensor], Make]] = field(default_factory=list)

    def flush(self) -> None:
        """Make all of them, and add each to its weight's, as the backward pass would have."""
        waiting, self.waiting = self.waiting, []
        for weights, make in waiting:
            with torch.no_grad():
                made = [g.to(w.dtype) for w, g in zip(weights, make(), strict=True)]
            # Whoever waits for a weight's gradient is told, which an assignment would not.
            torch.autograd.backward(weights, made)


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
    _left[-1].waiting.append(([getattr(one, "leaf", one) for one in weights], make))
    return [None] * len(weights)

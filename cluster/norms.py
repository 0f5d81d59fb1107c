"""Norms of gradients over ranks, of which each tells what it owns: figures under `SQUARE`.

Added up exactly, of experts one by one by their numbers, so that neither the order of ranks nor the
place of an expert decides a bit of what gradients are clipped by.

Axes: E experts of a layer, by their numbers.
"""

import math
from collections.abc import Mapping, Sequence, Set

import numpy as np
import torch
from torch import Tensor, nn

from cluster.figures import Figures
from model.optim import rate_group

SQUARE = "square of the norm of "
"""Begins the names of norms among figures; over ranks their squares are added up."""


def own_norms(
    named: Mapping[str, nn.Parameter], stacks: Mapping[str, Tensor], experts: int
) -> dict[str, float | Tensor]:
    """The norm of each gradient that is here, and 0 for the others; of the parameters in `stacks`,
    which says the numbers of their rows, one for each of a layer's experts."""
    grads = {name: p.grad for name, p in named.items() if p.grad is not None}
    dense = [name for name in grads if name not in stacks]
    norms: dict[str, float | Tensor] = {SQUARE + name: 0.0 for name in named if name not in stacks}
    for name, norm in zip(dense, _norms([grads[name] for name in dense]), strict=True):
        norms[SQUARE + name] = norm
    for name, numbers in stacks.items():
        norm_E = torch.zeros(experts, device=named[name].device)
        if name in grads:
            rows = grads[name].flatten(1)
            norm = torch.linalg.vector_norm(rows, dim=1, dtype=_wide(rows))
            norm_E = norm.new_zeros(experts).index_copy_(0, numbers, norm)
        norms[SQUARE + name] = norm_E
    return norms


def grad_norms(found: Figures, learnt: Set[str]) -> dict[str, float]:
    """The norm of each clip group, of the squares of what was `learnt`; `found` has each once.

    Added up exactly, so that the order of ranks and of experts on them decides nothing.
    """
    squares: dict[str, list[float]] = {"grad_norm": []}
    for name in sorted(learnt):
        squares.setdefault(clip_group(name), []).extend(found[SQUARE + name].ravel().tolist())
    return {group: math.fsum(several) ** 0.5 for group, several in squares.items()}


def not_finite(found: Figures) -> list[str]:
    """The parameters whose gradients are not, on any rank."""
    names = [name for name in found if name.startswith(SQUARE)]
    return [n.removeprefix(SQUARE) for n in names if not bool(np.isfinite(found[n]).all())]


def clip_group(parameter: str) -> str:
    """The name of the norm that the parameter's gradient is clipped by."""
    return "indexer_grad_norm" if rate_group(parameter) == "indexer" else "grad_norm"


def _norms(grads: list[Tensor]) -> Sequence[Tensor]:
    """The Euclidean norm of each; in float64 on CPUs, where kernels add in the type they are in."""
    if not grads:
        return ()
    return torch._foreach_norm(grads, dtype=_wide(grads[0]))


def _wide(x: Tensor) -> torch.dtype | None:
    """The type that norms are added up in, if it is not the tensor's own."""
    return torch.float64 if x.device.type == "cpu" else None

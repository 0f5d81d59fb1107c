"""Numbers on their way from where they were computed to the host, and over all ranks.

A host that asks a device for a number waits until the device has done all that it was told before.
So what there is to ask of a step is asked at once.
"""

from collections.abc import Mapping

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

Figures = dict[str, NDArray[np.float64]]
"""Numbers, each by its name and in the shape that it was computed in."""


def fetch(values: Mapping[str, float | Tensor]) -> Figures:
    """All of `values` as float64, in one copy to the host, which waits for it."""
    tensors = {name: one for name, one in values.items() if isinstance(one, Tensor)}
    words = iter(_words([one.detach() for one in tensors.values()]))
    return {
        name: _numbers(next(words), one.dtype).reshape(tuple(one.shape))
        if isinstance(one, Tensor)
        else np.array(one, dtype=np.float64)
        for name, one in values.items()
    }


def read(values: Mapping[str, float | Tensor]) -> dict[str, float]:
    """Numbers and tensors of no dim as numbers, by `fetch`."""
    return {name: float(one) for name, one in fetch(values).items()}


def summed(figures: Figures, *, over_ranks: bool) -> Figures:
    """The sum of each figure over all ranks, in float64; every rank must have the same names."""
    if not over_ranks or not figures:
        return figures
    names = sorted(figures)
    total = torch.from_numpy(np.concatenate([figures[name].ravel() for name in names]))
    dist.all_reduce(total)
    ends = np.cumsum([figures[name].size for name in names])
    parts = np.split(total.numpy(), ends[:-1])
    return {
        name: part.reshape(figures[name].shape) for name, part in zip(names, parts, strict=True)
    }


def _words(tensors: list[Tensor]) -> list[NDArray[np.int64]]:
    """The values of tensors of any types as 64-bit words, floats by their bits: not every device
    has float64, and float32 has no room for large counts."""
    if not tensors:
        return []
    words = torch.cat([_as_words(one).flatten() for one in tensors]).cpu().numpy()
    return np.split(words, np.cumsum([one.numel() for one in tensors])[:-1])


def _as_words(x: Tensor) -> Tensor:
    if x.dtype == torch.float64:
        return x.view(torch.int64)
    if x.is_floating_point():
        return x.float().view(torch.int32).long()
    return x.long()


def _numbers(words: NDArray[np.int64], dtype: torch.dtype) -> NDArray[np.float64]:
    if dtype == torch.float64:
        return words.view(np.float64)
    if dtype.is_floating_point:
        return words.astype(np.int32).view(np.float32).astype(np.float64)
    return words.astype(np.float64)

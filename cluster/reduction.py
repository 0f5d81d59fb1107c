"""Gradients to their owners during the backward pass, and weights from their owners after a step.

What all parameters of one layer have for one owner travels together, as soon as the backward pass
is through the layer, while it goes on with the next. Afterwards only owners hold gradients.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cluster.groups import Groups
from cluster.mesh import AxisName
from cluster.owners import Owners
from configs.errors import TrainingError

_ELSEWHERE = "parameters on another device"
_AHEAD = 2
"""Layers that are on their way at a time."""


@dataclass(slots=True)
class _Travelling:
    """Gradients of one layer on the way to one owner."""

    names: list[str]
    flat: Tensor
    work: Any
    mine: bool


class Reduction:
    """The collectives of one rank's dense parameters and experts' copies.

    All ranks begin the same ones in the same order: which gradients travel is decided by which ones
    a backward pass has reached, and that is the same on all of them.
    """

    def __init__(self, named: Mapping[str, nn.Parameter], owners: Owners, groups: Groups) -> None:
        self.named, self.owners, self.groups = named, owners, groups
        self.bytes: dict[str, int] = {"gradients": 0, "weights": 0}
        """Of this rank's parameters, handed to others since the count was last emptied: what it is
        asked for, whatever way a collective takes."""
        self.layers: dict[str, list[str]] = {}
        """The parameters of each layer that learn and have copies. Those that lie on another device
        than most are a layer of their own: the backward pass comes to them on another thread."""
        self.learnt: set[str] = set()
        """Parameters with copies that have had a gradient since weights were last shared."""
        self._armed = False
        self._reached: set[str] = set()
        """Those that a backward pass has come to since their gradients last travelled."""
        self._last: set[str] | None = None
        """Those that the last pass with a reduction came to."""
        self._seen: set[str] = set()
        self._waiting: dict[str, set[str]] = {}
        self._travelling: list[list[_Travelling]] = []
        devices = Counter(parameter.device for parameter in named.values())
        ((most, _),) = devices.most_common(1)
        for name, parameter in named.items():
            if not parameter.requires_grad or groups.mesh.axis(owners.axis(name)).size == 1:
                continue
            layer = _layer_of(name) if parameter.device == most else _ELSEWHERE
            self.layers.setdefault(layer, []).append(name)
            parameter.register_hook(partial(self._coming, name))
            parameter.register_post_accumulate_grad_hook(partial(self._arrived, name, layer))

    @contextmanager
    def within_backward(self) -> Iterator[None]:
        """Reduce the gradients of the backward pass within; they are with their owners at its end.

        RuntimeError if a peer does not take part.
        """
        self._armed, self._seen = True, set()
        # A layer is complete when all has arrived that arrived the last time.
        self._waiting = {
            layer: {name for name in names if self._last is None or name in self._last}
            for layer, names in self.layers.items()
            if layer != _ELSEWHERE
        }
        try:
            yield
            # What was not foreseen, and what is elsewhere.
            for layer in self.layers:
                self._send(layer)
            while self._travelling:
                self._take(self._travelling.pop(0))
            self._last = self._seen
        except BaseException:
            # What was under way is lost; whoever goes on begins with a new backward pass.
            self._reached.clear()
            self.learnt.clear()
            raise
        finally:
            self._armed, self._travelling = False, []

    def require_reduced(self) -> None:
        """TrainingError if this rank holds a gradient that is another's, and would be lost."""
        for names in self.layers.values():
            for name in names:
                if self.named[name].grad is not None and not self.owners.mine(name):
                    raise TrainingError(
                        f"the gradient of {name} is on a rank that does not own it; make gradients "
                        "within the backward pass that reduces them"
                    )

    def due(self, narrow: Mapping[str, torch.dtype]) -> int:
        """Bytes of weights that this rank will hand to others in `share`."""
        mine = [name for name in self.learnt if self.owners.mine(name)]
        return sum(
            (self.groups.mesh.axis(self.owners.axis(name)).size - 1)
            * self.named[name].numel()
            * narrow.get(name, self.named[name].dtype).itemsize
            for name in mine
        )

    def share(self, narrow: Mapping[str, torch.dtype]) -> None:
        """Send the weights whose gradients were reduced since the last time, in the types of
        `narrow` or their own.

        An owner keeps its weight as it is.
        """
        learnt, self.learnt = self.learnt, set()
        under_way: list[tuple[list[str], Tensor, Any, bool]] = []
        with torch.no_grad():
            for layer in self.layers.values():
                begun = len(under_way)
                for (axis, place, dtype), names in self._by_owner(layer, narrow).items():
                    present = [name for name in names if name in learnt]
                    if present:
                        under_way.append(self._begin_share(axis, place, dtype, present))
                while len(under_way) > _AHEAD * max(1, len(under_way) - begun):
                    self._end_share(*under_way.pop(0))
            for one in under_way:
                self._end_share(*one)

    def _coming(self, name: str, gradient: Tensor | None) -> None:
        # Where a backward pass left a gradient for later, or has none, it comes with nothing; on
        # the owner the parameter may have one of an earlier pass.
        if gradient is not None:
            self._reached.add(name)
            if self._armed:
                self._seen.add(name)

    def _arrived(self, name: str, layer: str, _: Tensor) -> None:
        if not self._armed or name not in self._seen:
            return
        if (left := self._waiting.get(layer)) is not None and name in left:
            left.remove(name)
            if not left:
                self._send(layer)

    def _send(self, layer: str) -> None:
        """Begin to reduce what has been reached of a layer."""
        reached = [name for name in self.layers[layer] if name in self._reached]
        self._reached.difference_update(reached)
        self.learnt.update(reached)
        sent = []
        for (axis, place, _), names in self._by_owner(reached, {}).items():
            flat = torch.cat([self._grad(name).flatten() for name in names])
            over = self.groups.mesh.axis(axis)
            mine = over.index == place
            if not mine:
                self.bytes["gradients"] += flat.numel() * flat.element_size()
            for name in names:
                self.named[name].grad = None
            work = dist.reduce(flat, over.ranks[place], group=self.groups[axis], async_op=True)
            sent.append(_Travelling(names, flat, work, mine))
        if sent:
            self._travelling.append(sent)
        if len(self._travelling) > _AHEAD:
            self._take(self._travelling.pop(0))

    def _take(self, layer: list[_Travelling]) -> None:
        """Wait for a layer's gradients; owners keep them."""
        for one in layer:
            one.work.wait()
            if one.mine:
                self._fill(one.names, one.flat)

    def _fill(self, names: Sequence[str], flat: Tensor) -> None:
        sizes = [self.named[name].numel() for name in names]
        for name, part in zip(names, flat.split(sizes), strict=True):
            parameter = self.named[name]
            if parameter.grad is None:
                # A tensor of its own: a part of `flat` would keep all of it.
                parameter.grad = part.view_as(parameter).clone()
            else:
                # More has come since this was sent.
                parameter.grad += part.view_as(parameter)

    def _grad(self, name: str) -> Tensor:
        grad = self.named[name].grad
        assert grad is not None
        return grad

    def _by_owner(
        self, names: Sequence[str], narrow: Mapping[str, torch.dtype]
    ) -> dict[tuple[AxisName, int, torch.dtype], list[str]]:
        """Names by the axis of their copies, the owner's place on it, and the type they travel in.

        Sorted, so that all ranks begin the same collectives in the same order.
        """
        found: dict[tuple[AxisName, int, torch.dtype], list[str]] = {}
        for name in names:
            # No layer has parameters on two devices.
            dtype = narrow.get(name, self.named[name].dtype)
            key = self.owners.axis(name), self.owners.places[name], dtype
            found.setdefault(key, []).append(name)
        return dict(sorted(found.items(), key=lambda item: str(item[0])))

    def _begin_share(
        self, axis: AxisName, place: int, dtype: torch.dtype, names: list[str]
    ) -> tuple[list[str], Tensor, Any, bool]:
        over = self.groups.mesh.axis(axis)
        mine = over.index == place
        count = sum(self.named[name].numel() for name in names)
        if mine:
            flat = torch.cat([self.named[name].detach().flatten().to(dtype) for name in names])
            self.bytes["weights"] += (over.size - 1) * count * flat.element_size()
        else:
            flat = torch.empty(count, dtype=dtype, device=self.named[names[0]].device)
        work = dist.broadcast(flat, over.ranks[place], group=self.groups[axis], async_op=True)
        return names, flat, work, mine

    def _end_share(self, names: list[str], flat: Tensor, work: Any, mine: bool) -> None:
        work.wait()
        if mine:
            return
        sizes = [self.named[name].numel() for name in names]
        for name, part in zip(names, flat.split(sizes), strict=True):
            self.named[name].copy_(part.view_as(self.named[name]))


def _layer_of(name: str) -> str:
    """`model.layers.3` of what is in it; what is in no layer goes by its own module."""
    parts = name.split(".")
    return ".".join(parts[:3]) if parts[:2] == ["model", "layers"] else ".".join(parts[:2])

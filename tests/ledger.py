"""What an accelerator waits for, refuses or does in no fixed order, read from operations.

`tests.standin` shows every aten operation that touches its device to a `Ledger`, which notes

| kind | where |
|---|---|
| sync | the host needs a result before it goes on: `item`, `nonzero`, a boolean mask, a copy back |
| upload | memory that is not pinned is copied to the device, and the host waits until it is there |
| mixed devices | a tensor of the host beside one of the device; the operation is refused as well |
| mixed dtypes | a matrix product of two floating types |
| atomics | fractions are added up at an index that repeats, where they lie, and so in any order |
| float64 | a tensor of the device has a type that NPUs lack |

The rules are what CUDA's kernels do as far as arguments tell. A wait inside a kernel that no rule
names is not seen, and collectives are not judged. Additions of whole numbers are exact in any
order, and no atomics here; those of `index_put_` are, though CUDA's kernel sorts them first.
"""

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import torch
from torch import Tensor

Kind = Literal["sync", "upload", "mixed devices", "mixed dtypes", "atomics", "float64"]

ROOT = Path(__file__).resolve().parents[1]
FLOORS = tuple(f"{ROOT / floor}/" for floor in ("configs", "model", "cluster", "stages"))
ENGINE = "autograd"
"""The place of what torch's engine does by itself on the way back."""

aten = torch.ops.aten
READS = {
    *(aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten.equal, aten.bincount),
    *(aten._unique, aten._unique2, aten.unique_dim, aten.unique_consecutive),
}
"""The host asks the device for a result, or for its size; `bincount` for the largest number."""
PRODUCTS = {aten.mm, aten.bmm, aten.addmm, aten.addmm_, aten.baddbmm, aten.mv, aten._grouped_mm}
INDEXING = {aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_}
SCALARS_FROM_HOST = {
    *(aten.masked_fill, aten.masked_fill_, aten.fill, aten.fill_, aten.index_fill_, *INDEXING),
    *(aten._fused_adamw_, aten._foreach_mul, aten._foreach_mul_, aten._foreach_div_),
}
"""Take a tensor of no dim wherever it lies, as elementwise operations do."""


@dataclass(frozen=True, slots=True)
class Place:
    """The innermost frame of the project."""

    file: str
    function: str
    line: int

    def __str__(self) -> str:
        """Without the line, which moves with every edit."""
        return f"{self.file} {self.function}".rstrip()


@dataclass(frozen=True, slots=True)
class Note:
    """One finding."""

    kind: Kind
    op: str
    place: Place

    def __str__(self) -> str:
        return f"{self.kind}: {self.op} at {self.place.file}:{self.place.line}"


class MixedDevices(RuntimeError):
    """What an accelerator says of an operation on tensors of two devices."""


@dataclass
class Ledger:
    """Findings, in the order in which they came."""

    notes: list[Note] = field(default_factory=list)
    operations: set[str] = field(default_factory=set)
    """Of the device, such as `aten::add.Tensor`."""
    _pinned: dict[int, Any] = field(default_factory=dict)
    """Storages that count as pinned, by address; kept, so that no address is given out again."""

    def counts(self, *kinds: Kind) -> Counter[str]:
        """How many findings of these kinds each place has, as `file function`."""
        return Counter(str(note.place) for note in self.notes if note.kind in kinds)

    def of(self, *kinds: Kind) -> list[str]:
        """Findings of these kinds, with their lines."""
        return [str(note) for note in self.notes if note.kind in kinds]

    def note(self, kind: Kind, op: object) -> None:
        """Add one, at the place that is running."""
        self.notes.append(Note(kind, str(op).removeprefix("aten."), place()))

    def clear(self) -> None:
        """Forget the findings."""
        self.notes.clear()

    def judge(
        self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], tensors: Sequence[Tensor]
    ) -> None:
        """Note what is to be said of a call with these tensors; MixedDevices if it is refused."""
        op = func.overloadpacket
        self.operations.add(func.name())
        if op is aten.copy_:
            self._copied(func, args[0].device, args[1], args[2:] == (True,))
            return
        if op is aten._to_copy:
            target = torch.device(kwargs.get("device") or args[0].device)
            self._copied(func, target, args[0], bool(kwargs.get("non_blocking")))
            return
        if (generator := kwargs.get("generator")) is not None and generator.device.type == "cpu":
            self.note("mixed devices", func)
            raise MixedDevices(f"{func}: a generator of the host draws for the device")
        if not any(map(on_device, tensors)):
            return
        self._placed(func, tensors)
        sized = op is aten.repeat_interleave and kwargs.get("output_size") is None
        if op in READS or sized or (op in INDEXING and _counts_a_mask(op, args)):
            self.note("sync", func)
        floating = {x.dtype for x in tensors if x.is_floating_point()}
        if op in PRODUCTS and len(floating) > 1:
            self.note("mixed dtypes", func)
        if on_device(args[0]) and args[0].is_floating_point() and _adds_fractions(op, args):
            self.note("atomics", func)

    def made(self, func: Any, host: Tensor) -> None:
        """Note what is to be said of a result on the device."""
        if host.dtype in (torch.float64, torch.complex128):
            self.note("float64", func)

    def pin(self, host: Tensor) -> Tensor:
        """A copy in memory that counts as pinned."""
        copy = host.clone()
        self._pinned[copy.untyped_storage().data_ptr()] = copy.untyped_storage()
        return copy

    def is_pinned(self, host: Tensor) -> bool:
        """Whether it lies in memory that `pin` gave."""
        return host.untyped_storage().data_ptr() in self._pinned

    def _copied(self, func: Any, to: torch.device, source: Tensor, non_blocking: bool) -> None:
        if on_device(source) and to.type == "cpu":
            # Whoever does not wait here must wait before reading, and says so himself.
            self.note("sync", func)
        elif to.type != "cpu" and not on_device(source):
            number = source.dim() == 0 and func.overloadpacket is aten.copy_
            if not number and not (non_blocking and self.is_pinned(source)):
                self.note("upload", func)

    def _placed(self, func: Any, tensors: Sequence[Tensor]) -> None:
        """Refuse tensors of both sides in one operation, but for numbers and indices."""
        op = func.overloadpacket
        of_host = [x for x in tensors if not on_device(x)]
        vectors = [x for x in of_host if x.dim() > 0]
        numbers_may = torch.Tag.pointwise in func.tags or op in SCALARS_FROM_HOST
        if op in INDEXING and not any(x.is_floating_point() for x in vectors):
            # Indices are sent after the tensor.
            for _ in vectors:
                self.note("upload", func)
        elif vectors or (of_host and not numbers_may):
            self.note("mixed devices", func)
            shapes = ", ".join(str(list(x.shape)) for x in of_host)
            raise MixedDevices(f"{func}: tensors of the host ({shapes}) beside one of the device")


def on_device(tensor: object) -> bool:
    """Whether it is a tensor of the device."""
    return isinstance(tensor, Tensor) and tensor.device.type != "cpu"


def host_of(tensor: Any) -> Any:
    """What holds the values of a tensor of the device; anything else as it is."""
    return getattr(tensor, "host", tensor)


def place() -> Place:
    """Where the project is now; `ENGINE` where none of its frames runs."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(FLOORS):
            file = code.co_filename.removeprefix(f"{ROOT}/")
            return Place(file, code.co_qualname, frame.f_lineno)
        frame = frame.f_back
    return Place(ENGINE, "", 0)


def _counts_a_mask(op: Any, args: Sequence[Any]) -> bool:
    """Whether the host must know how many elements a mask lets through.

    To write through masks alone a number that it has itself, it need not. Python hands over such a
    number as a tensor of the host for CUDA only: elsewhere `x[mask] = 0` waits, `masked_fill_` not.
    """
    masks = [x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1]]
    if op is aten.index or not all(masks) or any(args[3:4]):
        return any(masks)
    return on_device(args[2]) or args[2].numel() > 1


def _adds_fractions(op: Any, args: Sequence[Any]) -> bool:
    """Whether several numbers that are not all whole are added to one of `args[0]`."""
    target, *rest = (host_of(x) for x in args)
    if op in (aten.index_add, aten.index_add_):
        _, index_N, summands = rest[:3]
        repeats = bool(target.numel()) and len(index_N.unique()) < len(index_N)
    elif op in (aten.scatter_add, aten.scatter_add_):
        dim, index, summands = rest
        hits = torch.zeros(target.shape, dtype=torch.int32)
        hits.scatter_add_(dim, index, torch.ones(index.shape, dtype=torch.int32))
        repeats = bool((hits > 1).any())
    elif op in INDEXING and any(rest[2:3]):
        where, summands = [host_of(x) for x in rest[0]], rest[1]
        hits = torch.zeros(target.shape, dtype=torch.int32)
        hits.index_put_(where, torch.ones((), dtype=torch.int32), accumulate=True)
        repeats = bool((hits > 1).any())
    else:
        return False
    return repeats and not torch.equal(summands, summands.round())

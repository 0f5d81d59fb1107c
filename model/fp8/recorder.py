"""Counts of what quantising does to a model's tensors, while a recorder watches.

Two things can go wrong silently in FP8: values that are small beside their tile's largest become
zero (flushed), and values may exceed what their scale can say (clipped). Both are counted by role,
which is a part of the model and a kind of tensor, as `routed_experts_gradients`. `drift.py` judges
the counts.

A recorder also remembers the scales of every operand of a step. Where a loss is not finite, the
first scale that is not tells which tensor was the first to be so.

Nothing is asked of a device while it computes: counts stay there, and are read all at once.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from model.fp8.format import E4M3_MAX, SMALLEST_SCALE
from model.fp8.quantized import Quantized
from model.fp8.reference import Reference, spread_scales, tile_amax, tile_reduce


@dataclass(frozen=True, slots=True)
class Tally:
    """Counts over one role's tensors of one step."""

    nonzero: float = 0.0
    """Values that were not zero before: the whole that the next three are shares of."""
    clipped: float = 0.0
    """Values beyond 448 times their scale. Scales are taken from the tile itself, so that there are
    none unless something is wrong."""
    flushed: float = 0.0
    """Values that became zero."""
    lost: float = 0.0
    """Those of them in tiles that count as zero, since their scale would fall below 2^-126."""
    low: float = float("inf")
    """log2 of the smallest scale of a tile with values that does not count as zero."""
    high: float = float("-inf")
    """log2 of the largest."""

    @property
    def flushed_share(self) -> float:
        """`flushed` as a share of the values that were not zero."""
        return self.flushed / max(self.nonzero, 1)

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(
            self.nonzero + other.nonzero,
            self.clipped + other.clipped,
            self.flushed + other.flushed,
            self.lost + other.lost,
            min(self.low, other.low),
            max(self.high, other.high),
        )


@dataclass(slots=True)
class Recorder:
    """Is shown every operand of a model's FP8 products; one object for all of its Linears."""

    watching: bool = False
    """Whether to be shown any: a recorder that nobody empties would grow without end."""
    counting: bool = False
    """Whether to tally, which costs as much as quantising does several times over."""
    _tallies: dict[str, Tally] = field(default_factory=dict)
    _counts: list[tuple[str, Tensor]] = field(default_factory=list)
    """What is not in `_tallies` yet, by role, where it was counted."""
    _scales: list[tuple[str, Tensor]] = field(default_factory=list)

    def start(self, *, counting: bool) -> None:
        """Forget what was seen, and watch; with `counting`, tally too."""
        self.watching, self.counting = True, counting
        self._tallies, self._counts, self._scales = {}, [], []

    def stop(self) -> None:
        """Watch no longer; what was seen stays until the next start."""
        self.watching = False

    def resting(self) -> "Resting":
        """Watch nothing within: what is computed a second time was seen the first."""
        return Resting(self)

    def forget(self) -> None:
        """Free the scales that were seen; tallies stay."""
        self._scales = []

    def note(self, role: str, x: Tensor | Quantized, q: Quantized) -> None:
        """`x` was quantised to `q`."""
        # Asking now whether they are finite would make a GPU wait at every product.
        self._scales.append((role, q.scales))
        if self.counting:
            self._counts.append((role, _counts(x, q)))

    @property
    def tallies(self) -> dict[str, Tally]:
        """By role, of all that was noted since the start; the host waits for the device once."""
        counts, self._counts = self._counts, []
        if counts:
            rows = _read(torch.stack([count for _, count in counts]))
            for (role, _), row in zip(counts, rows, strict=True):
                self._tallies[role] = self._tallies.get(role, Tally()) + row
        return self._tallies

    def first_not_finite(self) -> int | None:
        """Which operand since the start was the first with a value that is not finite, if any."""
        if not self._scales:
            return None
        finite = torch.stack([scales.isfinite().all() for _, scales in self._scales]).tolist()
        return finite.index(False) if False in finite else None

    def role(self, place: int) -> str:
        """The role of the operand that was seen as number `place` since the start, from 0."""
        return self._scales[place][0]


class Resting:
    """A context that can be entered again, as those of a recomputation may be."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder, self._watching = recorder, False

    def __enter__(self) -> None:
        self._watching, self._recorder.watching = self._recorder.watching, False

    def __exit__(self, *_: object) -> None:
        self._recorder.watching = self._watching


def tally(x: Tensor | Quantized, q: Quantized) -> Tally:
    """Counts of what became of the values of `x`, which was quantised to `q`."""
    (found,) = _read(_counts(x, q).unsqueeze(0))
    return found


def _counts(x: Tensor | Quantized, q: Quantized) -> Tensor:
    """int64 [6], where the values lie: what `_read` makes a `Tally` of."""
    if isinstance(x, Quantized):
        x = _float32(x)
    gone = (x != 0) & (_float32(q) == 0)
    gone_by_tile = tile_reduce(gone.int(), q.tile, q.groups, torch.sum)
    largest = tile_amax(x, q.tile, q.groups)
    faint = (largest > 0) & (largest / E4M3_MAX < SMALLEST_SCALE)
    # Half a step of 32 beyond the largest still rounds to it.
    spread = spread_scales(q.scales, q.tile, x.shape, q.groups)
    clipped = (x.abs() / spread > E4M3_MAX + 16).sum()
    # FP4's floor is lower than E4M3's: its faint tiles need not be lost.
    counted = (largest > 0) & ~(faint & (q.scales == 1))
    sizes = q.scales.log2()
    low, high = float("inf"), float("-inf")
    counts = (
        x.count_nonzero(),
        clipped,
        gone_by_tile.sum(),
        torch.where(faint, gone_by_tile, 0).sum(),
    )
    ends = (
        _extreme(torch.where(counted, sizes, low), torch.amin, low),
        _extreme(torch.where(counted, sizes, high), torch.amax, high),
    )
    return torch.cat([torch.stack(counts), torch.stack(ends).view(torch.int32).long()])


def _read(counts: Tensor) -> list[Tally]:
    """What `_counts` found of several tensors [N, 6]; the host waits once for all of them.

    The ends are floats whose bits came as whole numbers, which every device has in 64 bits.
    """
    read = counts.cpu()
    ends = read[:, 4:].int().view(torch.float32)
    return [
        Tally(*map(float, row), *end)
        for row, end in zip(read[:, :4].tolist(), ends.tolist(), strict=True)
    ]


def _extreme(values: Tensor, pick: Callable[[Tensor], Tensor], otherwise: float) -> Tensor:
    """The smallest or largest of the values, if there are any."""
    return pick(values) if values.numel() else values.new_tensor(otherwise)


def _float32(q: Quantized) -> Tensor:
    return q.float32 if q.float32 is not None else Reference().dequantize(q)

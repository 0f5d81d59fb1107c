"""Counts of what quantising does to a model's tensors, while a recorder watches.

Two things can go wrong silently in FP8: values that are small beside their tile's largest become
zero (flushed), and values may exceed what their scale can say (clipped). Both are counted by role,
which is a part of the model and a kind of tensor, as `routed_experts_gradients`. `drift.py` judges
the counts.

A recorder also remembers the scales of every operand of a step. Where a loss is not finite, the
first scale that is not tells which tensor was the first to be so.
"""

from dataclasses import dataclass, field

from torch import Tensor

from model.fp8.format import E4M3_MAX, SMALLEST_SCALE
from model.fp8.quantized import Quantized
from model.fp8.reference import Reference, spread_scales, tile_amax


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
    tallies: dict[str, Tally] = field(default_factory=dict)
    _scales: list[tuple[str, Tensor]] = field(default_factory=list)

    def start(self, *, counting: bool) -> None:
        """Forget what was seen, and watch; with `counting`, tally too."""
        self.watching, self.counting = True, counting
        self.tallies, self._scales = {}, []

    def stop(self) -> None:
        """Watch no longer; what was seen stays until the next start."""
        self.watching = False

    def forget(self) -> None:
        """Free the scales that were seen; tallies stay."""
        self._scales = []

    def note(self, role: str, x: Tensor | Quantized, q: Quantized) -> None:
        """`x` was quantised to `q`."""
        # Asking now whether they are finite would make a GPU wait at every product.
        self._scales.append((role, q.scales))
        if self.counting:
            self.tallies[role] = self.tallies.get(role, Tally()) + tally(x, q)

    def first_not_finite(self) -> int | None:
        """Which operand since the start was the first with a value that is not finite, if any."""
        for place, (_, scales) in enumerate(self._scales):
            if not bool(scales.isfinite().all()):
                return place
        return None

    def role(self, place: int) -> str:
        """The role of the operand that was seen as number `place` since the start, from 0."""
        return self._scales[place][0]


def tally(x: Tensor | Quantized, q: Quantized) -> Tally:
    """Counts of what became of the values of `x`, which was quantised to `q`.

    By the maxima of tiles where these decide, which is cheap; value by value only where something
    is wrong.
    """
    if isinstance(x, Quantized):
        x = _float32(x)
    gone = (x != 0) & (_float32(q) == 0)
    flushed = float(gone.sum())
    largest = tile_amax(x, q.tile, q.counts)
    faint = (largest > 0) & (largest / E4M3_MAX < SMALLEST_SCALE)
    # Half a step of 32 beyond the largest still rounds to it.
    narrow = largest / q.scales > E4M3_MAX + 16
    clipped = lost = 0.0
    if bool(narrow.any()):
        clipped = float(((x.abs() / _spread(q.scales, q, x)) > E4M3_MAX + 16).sum())
    if bool(faint.any()):
        lost = float((gone & (_spread(faint.float(), q, x) > 0)).sum())
    # FP4's floor is lower than E4M3's: its faint tiles need not be lost.
    scales = q.scales[(largest > 0) & ~(faint & (q.scales == 1))].log2()
    empty = scales.numel() == 0
    return Tally(
        float(x.count_nonzero()),
        clipped,
        flushed,
        lost,
        float("inf") if empty else float(scales.min()),
        float("-inf") if empty else float(scales.max()),
    )


def _spread(of_tiles: Tensor, q: Quantized, x: Tensor) -> Tensor:
    return spread_scales(of_tiles, q.tile, x.shape, q.counts)


def _float32(q: Quantized) -> Tensor:
    return q.float32 if q.float32 is not None else Reference().dequantize(q)

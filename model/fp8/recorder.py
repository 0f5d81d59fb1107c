"""What quantisation does to a model's tensors, counted by role while a recorder watches.

A role is a part of the model and a kind of tensor: `routed_experts_gradients`.
"""

from dataclasses import dataclass, field

from torch import Tensor

from model.fp8.format import E4M3_MAX, SMALLEST_SCALE
from model.fp8.quantized import Quantized
from model.fp8.reference import Reference, spread_scales, tile_amax


@dataclass(frozen=True, slots=True)
class Tally:
    """One role's tensors of one step."""

    nonzero: float = 0.0
    """Values that were not zero before; what the next two are shares of."""
    clipped: float = 0.0
    """Beyond the largest that their scale can say. Scales are taken from the tile itself, so that
    there are none unless something is wrong."""
    flushed: float = 0.0
    """Became zero."""
    lost: float = 0.0
    """Of these, such as lie in tiles that count as zero: their scale would fall under 2^-126."""
    low: float = float("inf")
    """log2 of the smallest scale of a tile with values that does not count as zero."""
    high: float = float("-inf")
    """log2 of the largest."""

    @property
    def flushed_share(self) -> float:
        """Of the values that were not zero."""
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
    """Hears of every operand of a model's FP8 products; one object for all of its Linears."""

    watching: bool = False
    """Whether to be told at all: one that nobody empties would grow without end."""
    counting: bool = False
    """Whether to tally, which costs as much as quantising does several times over."""
    tallies: dict[str, Tally] = field(default_factory=dict)
    _scales: list[tuple[str, Tensor]] = field(default_factory=list)

    def start(self, *, counting: bool) -> None:
        """Forget what was seen, and watch."""
        self.watching, self.counting = True, counting
        self.tallies, self._scales = {}, []

    def stop(self) -> None:
        """Watch no longer; what was seen stays until the next start."""
        self.watching = False

    def forget(self) -> None:
        """Let go of the scales that were seen; tallies stay."""
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
        """Of the operand that was seen as number `place` since the start."""
        return self._scales[place][0]


def tally(x: Tensor | Quantized, q: Quantized) -> Tally:
    """What became of the values of `x`.

    Tile by tile where that tells, which is cheap; value by value only in what is wrong.
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

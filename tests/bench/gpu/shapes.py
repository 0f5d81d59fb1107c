"""Which products are measured, and what each of them must do at the least.

Axes of a product: T tokens, I inputs, O outputs.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from configs.train import Fp8Backend
from model.fp8.format import TILE
from tests.bench.gpu.rows import Figure

Pass = Literal["forward", "input gradient", "weight gradient"]
PASSES: tuple[Pass, ...] = ("forward", "input gradient", "weight gradient")
BACKENDS: tuple[Fp8Backend, ...] = ("cublas", "triton")
VARIANTS = [
    "bf16",
    "torch alone",
    *(f"{name}, {what}" for name in BACKENDS for what in ("product", "with casts")),
]


@dataclass(frozen=True, slots=True)
class Shape:
    """A Linear's, or that of experts with as many tokens each."""

    name: str
    tokens: int
    inputs: int
    outputs: int
    experts: int = 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Tokens of each expert."""
        return (self.tokens // self.experts,) * self.experts


SHAPES = [
    Shape("gate and up, 7168 to 4096", 4096, 7168, 4096),
    Shape("down, 2048 to 7168", 4096, 2048, 7168),
    Shape("dense gate and up, 7168 to 36864", 4096, 7168, 36864),
    Shape("dense down, 18432 to 7168", 4096, 18432, 7168),
    Shape("32 experts' gate and up, 7168 to 4096", 32 * 256, 7168, 4096, 32),
    Shape("32 experts' down, 2048 to 7168", 32 * 256, 2048, 7168, 32),
]


@dataclass(frozen=True, slots=True)
class Product:
    """What was found of one pass of one shape."""

    shape: Shape
    which: Pass
    seconds: Mapping[str, Figure]
    """By variant."""
    errors: Mapping[str, Figure]
    """Worst error as a share of what is allowed, by backend."""
    copy_seconds: Figure


def flops(shape: Shape) -> int:
    """Of any of the three passes: a multiplication and an addition for T x I x O."""
    return 2 * shape.tokens * shape.inputs * shape.outputs


def bytes_moved(shape: Shape, which: Pass) -> int:
    """Read and written once in FP8: values, their scales, and bfloat16 or float32 results."""
    tokens, inputs, outputs = shape.tokens, shape.inputs, shape.outputs
    weights = shape.experts * outputs * inputs
    blocks = shape.experts * _up(outputs) * _up(inputs)
    match which:
        case "forward":
            values, scales, results = tokens * inputs + weights, tokens * _up(inputs), 2 * outputs
        case "input gradient":
            values, scales, results = tokens * outputs + weights, tokens * _up(outputs), 2 * inputs
        case "weight gradient":
            bands = sum(_up(count) for count in shape.counts)
            values = tokens * (inputs + outputs)
            return values + 4 * bands * (inputs + outputs) + 4 * weights
    return values + 4 * (scales + blocks) + tokens * results


def floor_seconds(flops: int, peak: Figure, copy_seconds: Figure) -> Figure:
    """The longer of the copy and the arithmetic at `peak` FLOP/s."""
    if isinstance(peak, str):
        return peak
    return copy_seconds if isinstance(copy_seconds, str) else max(copy_seconds, flops / peak)


def _up(count: int) -> int:
    return -(-count // TILE)

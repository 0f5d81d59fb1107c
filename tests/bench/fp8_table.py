"""What the FP8 benchmark measures, and the table that it prints: shapes, floors, rows.

Axes of a product: T tokens, I inputs, O outputs.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from configs.train import Fp8Backend
from model.fp8.format import TILE

Pass = Literal["forward", "input gradient", "weight gradient"]
PASSES: tuple[Pass, ...] = ("forward", "input gradient", "weight gradient")
BACKENDS: tuple[Fp8Backend, ...] = ("cublas", "triton")
VARIANTS = [
    "bf16",
    "torch alone",
    *(f"{name}, {what}" for name in BACKENDS for what in ("product", "with casts")),
]
FAILED = "failed: "
"""Begins a cell of what could not be measured; one must not lose the others."""
SQUARE = 8192
GIBIBYTE = 2**30

Figure = float | str
"""Seconds, bytes or a share; or why there is none."""


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


@dataclass(frozen=True, slots=True)
class Step:
    """What was found of a whole training step in one precision."""

    precision: str
    seconds: Figure
    peak_bytes: Figure
    """Beyond what the model and its optimiser hold, in a forward pass that gradients may follow."""
    saved_bytes: Figure
    """Of that, what is saved for the backward pass."""


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


def share(part: Figure, whole: Figure) -> Figure:
    """part / whole, or the reason of the one that is none."""
    if isinstance(part, str):
        return part
    return whole if isinstance(whole, str) else part / whole


def cell(figure: Figure, digits: int = 2, scale: float = 1.0) -> str:
    """A number, or why there is none."""
    if isinstance(figure, str):
        return "not measured" if not figure else f"not measured: {figure}"
    return f"{figure * scale:,.{digits}f}"


def product_rows(product: Product, peak_fp8: Figure) -> list[str]:
    """Markdown rows of one pass of one shape."""
    work = flops(product.shape)
    floor = floor_seconds(work, peak_fp8, product.copy_seconds)
    rows = []
    for variant in VARIANTS:
        seconds = product.seconds[variant]
        if isinstance(seconds, str):
            figures = [cell(seconds), *["not measured"] * 3]
        else:
            figures = [
                cell(seconds, 3, 1e3),
                cell(work / seconds, 0, 1e-12),
                cell(share(product.seconds["bf16"], seconds)),
                # BF16 has another floor.
                "" if variant == "bf16" else cell(share(floor, seconds)),
            ]
        error = product.errors.get(variant.split(",")[0], "")
        figures.append("" if variant in ("bf16", "torch alone") else cell(error, 4))
        rows.append(row(product.shape.name, product.which, variant, *figures))
    return rows


def step_rows(steps: Sequence[Step], step_flops: float) -> list[str]:
    """Markdown rows of the training step; times BF16 by the step called bf16."""
    baseline = next(step.seconds for step in steps if step.precision == "bf16")
    rows = []
    for step in steps:
        if isinstance(step.seconds, str):
            figures = [cell(step.seconds), *["not measured"] * 2]
        else:
            figures = [
                cell(step.seconds, 1, 1e3),
                cell(step_flops / step.seconds, 0, 1e-12),
                cell(share(baseline, step.seconds)),
            ]
        rows.append(row("1B MoE", "training step", step.precision, *figures, "", ""))
    memory: dict[str, Callable[[Step], Figure]] = {
        "forward's peak, GiB": lambda step: step.peak_bytes,
        "saved for backward, GiB": lambda step: step.saved_bytes,
    }
    for name, of in memory.items():
        bf16 = next(of(step) for step in steps if step.precision == "bf16")
        for step in steps:
            figure, times = cell(of(step), 2, 1 / GIBIBYTE), cell(share(bf16, of(step)))
            if isinstance(of(step), str):
                times = "not measured"
            rows.append(row("1B MoE", name, step.precision, figure, "", times, "", ""))
    return rows


def row(*cells: str) -> str:
    """One line of the table; bars within a cell would end it."""
    return "| " + " | ".join(one.replace("|", "/").replace("\n", " ") for one in cells) + " |"


def table(
    products: Iterable[Product], steps: Iterable[Step], step_flops: float, peak_bf16: Figure
) -> Iterator[str]:
    """Everything, as one table, line by line as it is measured."""
    yield row(
        "what",
        "pass",
        "by",
        "ms (or GiB)",
        "TFLOP/s",
        "times BF16",
        "floor / time",
        "error / bound",
    )
    yield "|---|---|---|--:|--:|--:|--:|--:|"
    peak_fp8 = peak_bf16 if isinstance(peak_bf16, str) else 2 * peak_bf16
    peak = cell(peak_bf16, 0, 1e-12)
    yield row(f"{SQUARE}³, torch.mm", "best", "bf16", "", peak, "", "", "")
    for product in products:
        yield from product_rows(product, peak_fp8)
    yield from step_rows(list(steps), step_flops)


def _up(count: int) -> int:
    return -(-count // TILE)

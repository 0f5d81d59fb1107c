"""Part 4: FP8 against BF16 in products of DeepSeek-V3's shapes.

Every variant of a product is timed in turn, round after round, by CUDA events after a warm-up and
with a cold cache; figures are medians. A backend's result is compared with the exact one of its own
operands before it is timed, and what is wrong is not timed.

*product*: operands quantised beforehand. *with casts*: what training does, which quantises inputs
and weights for the output, the output's gradient for the input's, and both again along tokens for
the weight's. *torch alone*: `scaled_mm` on operands that lie as it wants them. The floor is the
longer of a device copy of the bytes that a product must move, and its arithmetic at twice the best
BF16 rate seen (Hopper's FP8 units are twice as wide).
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from configs.errors import MachineError
from model.fp8.backends import Backend, backend_for
from model.fp8.cublas import expert_rows, lacking, multiply, operand, padded_counts, whole_tiles
from model.fp8.format import TILE
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized
from model.fp8.reference import Reference
from tests.bench.gpu.rows import FAILED, SKIPPED, Figure, Row, attempted, cell, ratio, share, why
from tests.bench.gpu.setting import Setting, best_rate, interleaved
from tests.bench.gpu.shapes import (
    BACKENDS,
    PASSES,
    SHAPES,
    VARIANTS,
    Pass,
    Product,
    Shape,
    bytes_moved,
    floor_seconds,
    flops,
)

CHECKED_ROWS = 64
SMALL = [Shape("a small Linear", 128, 256, 128), Shape("two small experts", 256, 128, 128, 2)]


def rows(setting: Setting) -> Iterator[Row]:
    """Each pass of each shape, by each variant."""
    rates: list[Figure] = []
    yield from attempted(setting, "best rate", "bf16", _peak, rates)
    peak = rates[0] if rates else ""
    for shape in setting.pick(SHAPES, SMALL):
        for which in PASSES:
            what = f"{shape.name}: {which}"
            yield from attempted(setting, what, "all", _measured, shape, which, peak)


def _peak(setting: Setting, rates: list[Figure]) -> Iterator[Row]:
    rates.append(best_rate(setting))
    yield Row("square product, best", "bf16", share(rates[0], 1e12), "TFLOP/s")


def _measured(setting: Setting, shape: Shape, which: Pass, peak_bf16: Figure) -> Iterator[Row]:
    peak = peak_bf16 if isinstance(peak_bf16, str) else 2 * peak_bf16
    yield from product_rows(measure_product(shape, which, setting), peak)


def product_rows(product: Product, peak_fp8: Figure) -> Iterator[Row]:
    """One for each variant of one pass of one shape."""
    work = flops(product.shape)
    floor = floor_seconds(work, peak_fp8, product.copy_seconds)
    what = f"{product.shape.name}: {product.which}"
    for variant in VARIANTS:
        seconds = product.seconds[variant]
        bf16 = ratio(product.seconds["bf16"], seconds)
        more: dict[str, Figure] = {"TFLOP/s": ratio(work / 1e12, seconds)}
        # BF16 has another floor.
        if variant != "bf16":
            more["floor / time"] = ratio(floor, seconds)
        if (error := product.errors.get(variant.split(",")[0], "")) != "":
            more["error / bound"] = error
        told = {name: one for name, one in more.items() if one != ""}
        figure = share(seconds, 1e-3)
        yield Row(what, variant, figure, "ms", ratio=bf16, of="times bf16", more=told)


def allowed_error(dtype: torch.dtype, exact: Tensor, size: Tensor) -> Tensor:
    """What a product may be off by: |A| |B| is `size`.

    Tensor cores keep about 14 bits of a sum (DeepSeek-V3, section 3.3.2) over 128 columns; a
    result in bfloat16 is rounded to 8.
    """
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-22
    return 2**-10 * size + rounding * exact.abs()


def measure_product(shape: Shape, which: Pass, setting: Setting) -> Product:
    """All variants of one pass of one shape."""
    device = setting.device
    torch.manual_seed(0)
    stacked = (shape.experts,) if shape.experts > 1 else ()
    make: dict[str, Any] = {"dtype": torch.bfloat16, "device": device}
    x = torch.randn(shape.tokens, shape.inputs, **make)
    dy = torch.randn(shape.tokens, shape.outputs, **make)
    w = torch.randn(*stacked, shape.outputs, shape.inputs, **make)
    half = torch.empty(bytes_moved(shape, which) // 2, dtype=torch.uint8, device=device)
    other = torch.empty_like(half)
    variants: dict[str, Callable[[], object] | str] = {
        "copy": lambda: other.copy_(half),
        "bf16": in_bf16(shape, which, x, w, dy),
    }
    errors: dict[str, Figure] = {}
    counts = shape.counts if stacked else None
    # As in training, the host does not know how many rows an expert has.
    groups = Groups.of(counts, device) if counts else None
    groups = replace(groups, known=None) if groups else None
    lack = lacking(device)
    variants["torch alone"] = f"{SKIPPED}{lack}" if lack else prepared(which, x, w, dy, counts)
    for name in BACKENDS:
        keys = f"{name}, product", f"{name}, with casts"
        try:
            backend = backend_for(device, name)
            casts, run = in_fp8(backend, which, x, w, dy, groups)
            operands = casts()
            errors[name] = worst_error(run(*operands), *operands, counts, which)
            setting.wait()
        except MachineError as error:
            variants |= dict.fromkeys(keys, f"{SKIPPED}{error}")
            continue
        except Exception as error:
            variants |= dict.fromkeys(keys, why(error))
            continue
        if isinstance(errors[name], str) or not float(errors[name]) <= 1:
            variants |= dict.fromkeys(keys, f"{FAILED}wrong, {cell(errors[name])} times its bound")
            continue
        variants[keys[0]] = partial(run, *operands)
        variants[keys[1]] = partial(_cast_and_run, casts, run)
    seconds = interleaved(variants, setting, why)
    return Product(shape, which, seconds, errors, seconds["copy"])


def _cast_and_run(
    casts: Callable[[], tuple[Quantized, Quantized]],
    run: Callable[[Quantized, Quantized], Tensor],
) -> Tensor:
    return run(*casts())


def in_bf16(shape: Shape, which: Pass, x: Tensor, w: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    """torch's own product, or grouped product, in bfloat16."""
    a, b = {"forward": (x, w.mT), "input gradient": (dy, w), "weight gradient": (dy.mT, x)}[which]
    if shape.experts == 1:
        return lambda: torch.mm(a, b)
    ends = torch.tensor(shape.counts, device=x.device).cumsum(0).to(torch.int32)
    return lambda: F.grouped_mm(a, b, offs=ends)


def in_fp8(
    backend: Backend,
    which: Pass,
    x: Tensor,
    w: Tensor,
    dy: Tensor,
    groups: Groups | None,
) -> tuple[Callable[[], tuple[Quantized, Quantized]], Callable[[Quantized, Quantized], Tensor]]:
    """The casts that training makes for a pass, and its product of what they give."""
    if which == "weight gradient":
        # What was saved for the backward pass is quantised already.
        x8 = backend.quantize(x, ACTIVATION)

        def along() -> tuple[Quantized, Quantized]:
            both = (backend.quantize(t, ALONG_TOKENS, groups=groups, saved=False) for t in (dy, x8))
            left, right = both
            return left, right

        if groups is None:
            return along, lambda a, b: backend.matmul(a.T, b)
        return along, lambda a, b: backend.grouped_outer(a, b, groups)
    if which == "forward":

        def casts() -> tuple[Quantized, Quantized]:
            return backend.quantize(x, ACTIVATION), backend.quantize(w, BLOCK, by_column=True).T

    else:
        w8 = backend.quantize(w, BLOCK, by_column=True)

        def casts() -> tuple[Quantized, Quantized]:
            return backend.quantize(dy, ACTIVATION, saved=False), w8

    if groups is None:
        return casts, backend.matmul
    return casts, lambda a, b: backend.grouped_matmul(a, b, groups)


def prepared(
    which: Pass, x: Tensor, w: Tensor, dy: Tensor, counts: tuple[int, ...] | None
) -> Callable[[], object] | str:
    """`scaled_mm` alone, once for each expert, on what is quantised and laid out already."""
    try:
        groups = None if counts is None else Groups.of(counts, x.device)
        casts, _ = in_fp8(Reference(), which, x, w, dy, groups)
        a, b = casts()
        if which == "weight gradient":
            rows = groups or Groups.even(1, len(x), x.device)
            whole = [whole_tiles(q, rows).T for q in (a, b)]
            left, right = (operand(q, blocks=False) for q in whole)
            pairs, first = [], 0
            for count in padded_counts(rows.on_host, TILE):
                last = first + count
                pairs.append((left.part(first, last), right.part(first, last)))
                first = last
            dtype = torch.float32
        elif groups is None:
            pairs, dtype = [(operand(a), operand(b.T))], torch.bfloat16
        else:
            lefts, _ = expert_rows(a, groups)
            rights = [
                operand(Quantized(v, s, b.tile).T) for v, s in zip(b.values, b.scales, strict=True)
            ]
            pairs, dtype = list(zip(lefts, rights, strict=True)), torch.bfloat16
    except Exception as error:
        return why(error)
    return lambda: [multiply(one, other, dtype) for one, other in pairs]


def worst_error(
    found: Tensor, a: Quantized, b: Quantized, counts: tuple[int, ...] | None, which: Pass
) -> float:
    """The worst error as a share of `allowed_error`: some rows of the first and last expert."""
    reference = Reference()
    float32_a, float32_b = reference.dequantize(a), reference.dequantize(b)
    along = which == "weight gradient"
    if counts is None:
        return worst_share(found, float32_a.mT if along else float32_a, float32_b)
    parts, others = float32_a.split(counts), float32_b.split(counts) if along else float32_b
    results = found if along else found.split(counts)
    return max(
        worst_share(results[e], parts[e].mT if along else parts[e], others[e])
        for e in (0, len(counts) - 1)
    )


def worst_share(found: Tensor, a: Tensor, b: Tensor) -> float:
    """The worst error of a @ b in rows from all over it, as a share of `allowed_error`."""
    picked = torch.arange(0, len(a), max(1, len(a) // CHECKED_ROWS), device=found.device)
    left, right = a[picked].double(), b.double()
    exact, size = left @ right, left.abs() @ right.abs()
    error = (found[picked].double() - exact).abs()
    return float((error / allowed_error(found.dtype, exact, size).clamp_min(1e-300)).max())

"""Part 2: every Triton kernel of FP8 against the slow twin, on what is hard to get right.

Casts must equal the reference bit for bit; a figure is the number of values or scales that differ.
Products may differ by the order of additions and by what tensor cores drop; a figure is the worst
error as a share of that.
"""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from configs.errors import MachineError
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized, QuantizedE5M6, Tile
from model.fp8.reference import Reference
from model.fp8.triton import INTERPRETED, Triton
from tests.bench.gpu.conversion import conversion_rows
from tests.bench.gpu.rows import SKIPPED, Row, attempted
from tests.bench.gpu.setting import Setting

TENSOR_CORE = 132 * 2.0**-13
"""What a block of 128 may lose on Hopper, as a part of the sum of magnitudes: four steps of 32
products and what was there before, each term cut to 14 bits of the largest (DeepSeek-V3, 3.3.2)."""
NAMES = {ACTIVATION: "1 x 128", ALONG_TOKENS: "128 x 1", BLOCK: "128 x 128"}
COUNTS = {
    "aligned": (128, 256, 384, 128),
    "ragged": (5, 130, 257, 1),
    "with empty groups": (0, 128, 0, 0, 77, 0),
    "all empty but one": (0, 0, 3),
}

SHAPES: list[tuple[int, ...]] = [(512, 1024), (257, 129), (3, 200, 70), (1, 1), (130, 20)]

slow = Reference()


def rows(setting: Setting) -> Iterator[Row]:
    """Casts, then products, then the hardware's own conversion."""
    if not (setting.on_cuda or INTERPRETED):
        yield Row("kernels", "triton", f"{SKIPPED}Triton's kernels need a GPU")
        return
    for tile, name in NAMES.items():
        yield from _cast_rows(setting, tile, name)
    yield from attempted(setting, "E5M6", "triton", _e5m6)
    for dtype in setting.pick((torch.float32, torch.bfloat16), (torch.bfloat16,)):
        yield from _product_rows(setting, dtype)
    yield from attempted(setting, "not finite", "triton", _not_finite)
    yield from conversion_rows(setting)


def _cast_rows(setting: Setting, tile: Tile, name: str) -> Iterator[Row]:
    for shape in setting.pick(SHAPES, SHAPES[-1:]):
        for power in setting.pick((False, True), (False,)):
            what = f"cast {name}, {list(shape)}{', powers of two' if power else ''}"
            yield from attempted(setting, what, "triton", _casts, what, shape, tile, power)
    for kind, counts in _counts(setting).items():
        what = f"cast {name}, groups {kind}"
        yield from attempted(setting, what, "triton", _grouped_cast, what, counts, tile)


def _counts(setting: Setting) -> dict[str, tuple[int, ...]]:
    kinds = setting.pick(list(COUNTS), ["all empty but one"])
    return {kind: COUNTS[kind] for kind in kinds}


def _casts(
    setting: Setting, what: str, shape: tuple[int, ...], tile: Tile, power_of_two: bool
) -> Iterator[Row]:
    """Of float32, bfloat16, a transposed view, and what is quantised already."""
    mine, count = Triton(), 0
    x = hard(setting.device, *shape)
    sources: list[Tensor | Quantized] = [x, x.bfloat16(), x.bfloat16().mT]
    if len(shape) == 2:
        sources.append(slow.quantize(x, ACTIVATION))
    for source in sources:
        found = mine.quantize(source, tile, power_of_two=power_of_two)
        wanted = slow.quantize(source, tile, power_of_two=power_of_two)
        count += differences(found, wanted)
        count += differing(mine.dequantize(found), slow.dequantize(wanted))
    yield Row(what, "triton", count, "differ", most=0)


def _grouped_cast(
    setting: Setting, what: str, counts: tuple[int, ...], tile: Tile
) -> Iterator[Row]:
    x = hard(setting.device, sum(counts), setting.pick(384, 20))
    count = 0
    for told in (True, False):
        groups = groups_of(setting, counts, told=told)
        found, wanted = (one.quantize(x, tile, groups=groups) for one in (Triton(), slow))
        count += differences(found, wanted)
    yield Row(what, "triton", count, "differ", most=0)


def _e5m6(setting: Setting) -> Iterator[Row]:
    for shape in setting.pick([(512, 1024), (257, 129), (40, 300)], [(33, 8)]):
        x = hard(setting.device, *shape)
        found, wanted = Triton().quantize_e5m6(x), slow.quantize_e5m6(x)
        count = int((found.words != wanted.words).sum()) + differing(found.scales, wanted.scales)
        read = QuantizedE5M6(wanted.words, wanted.scales, wanted.columns)
        count += differing(Triton().dequantize_e5m6(read), slow.dequantize_e5m6(read))
        yield Row(f"E5M6, {list(shape)}", "triton", count, "differ", most=0)


def _product_rows(setting: Setting, dtype: torch.dtype) -> Iterator[Row]:
    mine = Triton(dtype)
    by = f"triton, {str(dtype).removeprefix('torch.')}"
    for size in setting.pick([(512, 768, 1024), (129, 300, 130), (1, 16, 16)], [(17, 130, 20)]):
        what = f"products of {' x '.join(map(str, size))}"
        yield from attempted(setting, what, by, _linear, mine, size, by)
    for kind, counts in _counts(setting).items():
        what = f"experts' products, {kind}"
        yield from attempted(setting, what, by, _experts, mine, counts, what, by)


def _linear(setting: Setting, mine: Triton, sizes: tuple[int, int, int], by: str) -> Iterator[Row]:
    """The three products of a Linear of tokens, inputs and outputs."""
    tokens, inputs, outputs = sizes
    x8 = quantised(setting, (tokens, inputs), ACTIVATION, 1)
    w8 = quantised(setting, (outputs, inputs), BLOCK, 2)
    dy8 = quantised(setting, (tokens, outputs), ACTIVATION, 3)
    dy_tokens8 = quantised(setting, (tokens, outputs), ALONG_TOKENS, 3)
    pairs = {
        "forward": (x8, w8.T),
        "input gradient": (dy8, w8),
        "weight gradient": (dy_tokens8.T, mine.quantize(x8, ALONG_TOKENS)),
    }
    for name, (a, b) in pairs.items():
        size = slow.matmul(magnitudes(a), magnitudes(b))
        error = worst(mine.matmul(a, b), slow.matmul(a, b), size, a.values.shape[1])
        what = f"{name}, {tokens} x {inputs} x {outputs}"
        yield Row(what, by, error, "error / bound", most=1)


def _experts(
    setting: Setting, mine: Triton, counts: tuple[int, ...], what: str, by: str
) -> Iterator[Row]:
    width, inner = setting.pick((384, 256), (130, 20))
    a = quantised(setting, (sum(counts), width), ACTIVATION, 1)
    b = quantised(setting, (len(counts), inner, width), BLOCK, 2).T
    groups = groups_of(setting, counts, told=False)
    size = slow.grouped_matmul(magnitudes(a), magnitudes(b), groups)
    exact = slow.grouped_matmul(a, b, groups)
    error = worst(mine.grouped_matmul(a, b, groups), exact, size, width)
    yield Row(f"{what}, by rows", by, error, "error / bound", most=1)
    left, right = (
        quantised(setting, (sum(counts), columns), ALONG_TOKENS, 3, groups)
        for columns in (width, inner)
    )
    size = slow.grouped_outer(magnitudes(left), magnitudes(right), groups)
    exact = slow.grouped_outer(left, right, groups)
    found = mine.grouped_outer(left, right, groups)
    error = worst(found, exact, size, max(counts))
    yield Row(f"{what}, weight gradient", by, error, "error / bound", most=1)
    idle = [expert for expert, count in enumerate(counts) if count == 0]
    if idle:
        count = int((found[idle] != 0).sum())
        yield Row(f"{what}, gradients without rows", by, count, "are not zero", most=0)


def _not_finite(setting: Setting) -> Iterator[Row]:
    """A NaN or an infinity makes its own row of the product NaN, and no other."""
    for name, value in {"NaN": torch.nan, "infinity": torch.inf}.items():
        x = random(setting.device, 130, 256)
        x[3, 200] = value
        y = Triton().matmul(
            Triton().quantize(x, ACTIVATION), quantised(setting, (256, 40), BLOCK, 1)
        )
        wrong = int((~y[3].isnan()).sum() + y.isnan().sum()) - y.shape[1]
        yield Row(f"{name} in one row of a product", "triton", wrong, "results wrong", most=0)


def random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    """N(0, 1), the same on every device."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def hard(device: torch.device, *shape: int) -> Tensor:
    """Rows of all magnitudes from 1e-44 to 1e38, and what is hard to round, here and there."""
    x = random(device, *shape)
    sizes = torch.logspace(-44, 37, shape[-2]).to(device)
    x = (x * sizes[:, None]).clamp(-3e38, 3e38)
    specials = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 448.0, -448.0, 1e-45, -1e-40]
    flat = x.view(-1)
    for index, special in enumerate(specials):
        flat[index * 523 % flat.numel()] = special
    x[..., shape[-2] // 2, :] = -0.0
    return x


def quantised(
    setting: Setting,
    shape: tuple[int, ...],
    tile: Tile,
    seed: int,
    groups: Groups | None = None,
) -> Quantized:
    """Values whose tiles differ in size, as the kernels lay them out."""
    sizes = torch.logspace(-3, 3, shape[-2]).to(setting.device)
    x = random(setting.device, *shape, seed=seed) * sizes[:, None]
    return Triton().quantize(x, tile, groups=groups, by_column=True)


def magnitudes(q: Quantized) -> Quantized:
    """The same without signs."""
    bits = q.values.view(torch.uint8) & 0x7F
    values = bits.view(torch.float8_e4m3fn)
    return Quantized(values, q.scales, q.tile, q.groups, padded=q.padded)


def groups_of(setting: Setting, counts: tuple[int, ...], *, told: bool) -> Groups:
    """Groups of so many rows, which the host is told or not, as in training."""
    known = Groups.of(counts, setting.device)
    return known if told else replace(known, known=None)


def differences(found: Quantized, wanted: Quantized) -> int:
    """How many values and scales differ in their bits."""
    found = found.unpadded()
    if found.values.shape != wanted.values.shape or found.tile != wanted.tile:
        raise MachineError(
            f"the kernel gave {tuple(found.values.shape)} by tiles {found.tile}, the reference "
            f"{tuple(wanted.values.shape)} by {wanted.tile}; look at its launch"
        )
    codes = found.values.view(torch.uint8) != wanted.values.view(torch.uint8)
    return int(codes.sum()) + differing(found.scales, wanted.scales)


def differing(found: Tensor, wanted: Tensor) -> int:
    """How many floats differ in their bits, every NaN being as good as another."""
    found, wanted = found.contiguous(), wanted.contiguous()
    same_bits = found.view(torch.int32) == wanted.view(torch.int32)
    return int((~(same_bits | (found.isnan() & wanted.isnan()))).sum())


def worst(found: Tensor, exact: Tensor, size: Tensor, contraction: int) -> float:
    """The worst error as a share of what the order of additions, tensor cores and the result's own
    rounding may make; `size` is |A| |B|."""
    bound = (contraction + 8) * 2.0**-24 + (0 if INTERPRETED else TENSOR_CORE)
    rounding = 2.0**-8 if found.dtype == torch.bfloat16 else 0.0
    allowed = bound * size + rounding * exact.abs()
    error = (found.float() - exact).abs()
    return float((error / allowed.clamp_min(1e-30)).max()) if error.numel() else 0.0

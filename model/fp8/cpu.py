"""FP8 on CPUs: float32 products of operands that were rounded to E4M3.

CPUs have no FP8 products. So a quantised tensor has up to two forms here: values * scales in
float32, which torch's own products multiply, and E4M3 bytes with scales, which are saved for the
backward pass. `quantize` makes only those that its caller says it needs. The results are those of
FP8 training with float32 sums; the speed is not.

CPUs also cast to float8 slowly. `cpu.c` rounds by float arithmetic instead, in about twice the time
of a copy, and is used if it gives the reference's bits. Without a C compiler, eager torch gives
them, several times as slowly.
"""

import ctypes
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from model.compiled import compiled
from model.fp8.format import TILE, round_to_grid
from model.fp8.groups import Groups
from model.fp8.quantized import (
    ACTIVATION,
    BLOCK,
    Quantized,
    QuantizedE5M6,
    Tile,
    expect_rows,
    expect_stacked,
)
from model.fp8.reference import Reference, spread_scales, tile_amax, tile_scales

_SOURCE = Path(__file__).with_name("cpu.c")
_ELEMENTS_A_THREAD = 2**17
"""With fewer, starting a thread costs more than it saves."""
_TILES = {ACTIVATION, (TILE, 1), BLOCK}


class Cpu:
    """Casts that equal the reference's bit for bit; products in float32 by torch."""

    name = "cpu"
    reads_columns = False

    def __init__(self, kernels: ctypes.CDLL | None) -> None:
        """With the functions of `cpu.c`, or with eager torch in place of them."""
        self._kernels = kernels
        self._reference = Reference()

    def quantize(
        self,
        x: Tensor | Quantized,
        tile: Tile,
        *,
        power_of_two: bool = False,
        groups: Groups | None = None,
        saved: bool = True,
        multiplied: bool = True,
        by_column: bool = False,
    ) -> Quantized:
        """`x` [..., R, C] as E4M3: `values` if `saved`, and `float32` if `multiplied`.

        The C kernels know tiles of 1 x 128, 128 x 1 and 128 x 128; others are made by eager torch,
        which makes `float32` always.
        """
        whole = x.values.shape if isinstance(x, Quantized) else x.shape
        expect_rows(whole, groups)
        if self._kernels is None or tile not in _TILES or 0 in whole[:-2]:
            return self._eagerly(x, tile, power_of_two, groups, saved)
        codes = code_scales = None
        if isinstance(x, Quantized) and x.float32 is None and x.tile == ACTIVATION:
            # The kernel dequantises these itself, panel by panel.
            codes, code_scales, shape = x.values.contiguous(), x.scales.contiguous(), x.values.shape
            source = None
        else:
            source = self.dequantize(x) if isinstance(x, Quantized) else x.float()
            source = source.contiguous()
            shape = source.shape
        starts = _starts(shape, tile, groups)
        num_bands = _matrices(shape) * shape[-2] if starts is None else len(starts) - 1
        leading = shape[:-2] if groups is None else shape[:0]
        num_panels = shape[-1] if tile[1] == 1 else -(-shape[-1] // TILE)
        values = _empty_values(shape, saved)
        float32 = torch.empty(shape) if multiplied else None
        scales = torch.empty(*leading, num_bands // math.prod(leading), num_panels)
        self._kernels.ingot_quantize(
            _pointer(source),
            _pointer(codes),
            _pointer(code_scales),
            _pointer(starts),
            num_bands,
            shape[-1],
            tile[1] == 1,
            power_of_two,
            _pointer(float32),
            _pointer(values if saved else None),
            _pointer(scales),
            _threads(shape),
        )
        return Quantized(values, scales, tile, groups, float32)

    def dequantize(self, q: Quantized) -> Tensor:
        """values * scales: float32 [..., R, C], or `q.float32` where there is one."""
        if q.float32 is not None:
            return q.float32
        if self._kernels is None or q.tile not in _TILES or not q.values.is_contiguous():
            return self._reference.dequantize(q)
        starts = _starts(q.values.shape, q.tile, q.groups)
        rows = _matrices(q.values.shape) * q.values.shape[-2]
        float32, scales = torch.empty(q.values.shape), q.scales.contiguous()
        self._kernels.ingot_dequantize(
            _pointer(q.values),
            _pointer(scales),
            _pointer(starts),
            rows if starts is None else len(starts) - 1,
            q.values.shape[-1],
            q.tile[1] == 1,
            _pointer(float32),
            _threads(float32.shape),
        )
        return float32

    def matmul(self, a: Quantized, b: Quantized) -> Tensor:
        """a @ b: float32 [M, N]."""
        return self._float32(a) @ self._float32(b)

    def grouped_matmul(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """Rows of `a` [R, K] times their expert's matrix of `b` [E, K, N]: float32 [R, N]."""
        expect_stacked(b, groups)
        left, right = self._float32(a), self._float32(b)
        out = left.new_empty(left.shape[0], right.shape[-1])
        counts = groups.on_host
        parts = zip(left.split(list(counts)), right, out.split(list(counts)), strict=True)
        for rows, matrix, part in parts:
            torch.mm(rows, matrix, out=part)
        return out

    def grouped_outer(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """a^T b over each expert's rows: float32 [E, M, N]."""
        left, right = self._float32(a), self._float32(b)
        out, counts = left.new_empty(len(groups), left.shape[-1], right.shape[-1]), groups.on_host
        parts = zip(left.split(list(counts)), right.split(list(counts)), out, strict=True)
        for one, other, part in parts:
            torch.mm(one.T, other, out=part)
        return out

    def quantize_e5m6(self, x: Tensor) -> QuantizedE5M6:
        """`x` [R, C] in E5M6, by tiles of 1 x 128, scales powers of two."""
        if self._kernels is None:
            return self._reference.quantize_e5m6(x)
        x = x.float().contiguous()
        rows, columns = x.shape
        words = torch.empty(rows, -(-columns // 8) * 3, dtype=torch.int32)
        scales = torch.empty(rows, -(-columns // TILE))
        self._kernels.ingot_quantize_e5m6(
            _pointer(x), rows, columns, _pointer(words), _pointer(scales), _threads(x.shape)
        )
        return QuantizedE5M6(words, scales, columns)

    def dequantize_e5m6(self, q: QuantizedE5M6) -> Tensor:
        """codes * scales: float32 [R, C]."""
        if self._kernels is None:
            return self._reference.dequantize_e5m6(q)
        rows = q.words.shape[0]
        float32 = torch.empty(rows, q.columns)
        self._kernels.ingot_dequantize_e5m6(
            _pointer(q.words),
            _pointer(q.scales),
            rows,
            q.columns,
            _pointer(float32),
            _threads(float32.shape),
        )
        return float32

    def _float32(self, q: Quantized) -> Tensor:
        """`dequantize`, also of transposed bytes, which kernels read as they lie."""
        if q.float32 is None and not q.values.is_contiguous():
            return self.dequantize(q.T).mT
        return self.dequantize(q)

    def _eagerly(
        self,
        x: Tensor | Quantized,
        tile: Tile,
        power_of_two: bool,
        groups: Groups | None,
        saved: bool,
    ) -> Quantized:
        x = self.dequantize(x) if isinstance(x, Quantized) else x.float()
        scales = tile_scales(tile_amax(x, tile, groups), power_of_two)
        spread = spread_scales(scales, tile, x.shape, groups)
        scaled = x / spread
        values = _empty_values(x.shape, saved=False)
        if saved:
            values = torch.where(spread.isnan(), torch.nan, scaled).to(torch.float8_e4m3fn)
        float32 = round_to_grid(scaled).mul_(spread)
        return Quantized(values, scales, tile, groups, float32)


@lru_cache(1)
def cpu_backend() -> tuple[Cpu, str]:
    """(the CPU backend of this process, "compiled by cc" or "eager: " and why)."""
    library, why = compiled(_SOURCE, "-ffp-contract=off")
    if library is None:
        return Cpu(None), f"eager: {why}"
    made = Cpu(_declared(library))
    if not _agrees(made):
        return Cpu(None), f"eager: what {why} made does not give the reference's bits"
    return made, f"compiled by {why}"


def _declared(kernels: ctypes.CDLL) -> ctypes.CDLL:
    """The library with its functions' arguments: left to themselves, numbers would be 32 bits."""
    number, address = ctypes.c_int64, ctypes.c_void_p
    arguments = {
        "ingot_quantize": [address] * 4 + [number] * 4 + [address] * 3 + [number],
        "ingot_dequantize": [address] * 3 + [number] * 3 + [address, number],
        "ingot_quantize_e5m6": [address, number, number, address, address, number],
        "ingot_dequantize_e5m6": [address, address, number, number, address, number],
    }
    for name, types in arguments.items():
        function = getattr(kernels, name)
        function.argtypes, function.restype = types, None
    return kernels


def _agrees(made: Cpu) -> bool:
    """Whether compiled kernels give the reference's bits on a tensor with every kind of value."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 200, generator=generator)
    x *= torch.logspace(-45, 35, 200).unsqueeze(1)
    x[0, 0], x[1, 199], x[7], x[8] = torch.inf, torch.nan, 0, 448
    slow = Reference()
    found_e5m6, expected_e5m6 = made.quantize_e5m6(x), slow.quantize_e5m6(x)
    agrees = torch.equal(found_e5m6.words, expected_e5m6.words)
    agrees &= _same(found_e5m6.scales, expected_e5m6.scales)
    agrees &= _same(made.dequantize_e5m6(expected_e5m6), slow.dequantize_e5m6(expected_e5m6))
    sources: tuple[Tensor | Quantized, ...] = x, slow.quantize(x, ACTIVATION)
    for source, tile, power_of_two in product(sources, _TILES, (False, True)):
        found = made.quantize(source, tile, power_of_two=power_of_two)
        expected = slow.quantize(source, tile, power_of_two=power_of_two)
        float32 = slow.dequantize(expected)
        agrees &= torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
        agrees &= _same(found.scales, expected.scales)
        agrees &= _same(found.float32, float32) and _same(made.dequantize(expected), float32)
    return agrees


def _same(one: Tensor | None, other: Tensor) -> bool:
    return one is not None and torch.equal(one.nan_to_num(-7), other.nan_to_num(-7))


def _starts(shape: torch.Size, tile: Tile, groups: Groups | None) -> Tensor | None:
    """First rows of all bands, then the end: int64; None where each row is a band."""
    if tile[0] == 1:
        return None
    per_matrix = [shape[-2]] * _matrices(shape) if groups is None else groups.on_host
    starts, first = list[int](), 0
    for rows in per_matrix:
        starts.extend(range(first, first + rows, tile[0]))
        first += rows
    return torch.tensor([*starts, first])


def _empty_values(shape: Sequence[int], saved: bool) -> Tensor:
    """float8_e4m3fn of `shape`, not yet filled; without rows if not `saved`."""
    rows = shape[-2] if saved else 0
    return torch.empty((*shape[:-2], rows, shape[-1]), dtype=torch.float8_e4m3fn)


def _matrices(shape: Sequence[int]) -> int:
    """How many matrices are stacked in [..., R, C]."""
    return math.prod(shape[:-2])


def _pointer(tensor: Tensor | None) -> int | None:
    """Where its entries lie; None is C's null."""
    return None if tensor is None else tensor.data_ptr()


def _threads(shape: Sequence[int]) -> int:
    """Threads that are worth starting for so many entries."""
    return max(1, min(torch.get_num_threads(), math.prod(shape) // _ELEMENTS_A_THREAD))

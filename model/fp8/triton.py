"""FP8 on CUDA devices by Triton kernels: the backend that launches them.

The kernels are in `triton_casts.py` and `triton_products.py`, their operands' layouts in
`triton_layout.py`. A kernel is one program that runs many times over, each time on another block of
its output; here it is decided how large the blocks are and how many programs that makes.

Written for Hopper: blocks of 128 x 128 x 128, and bytes go to the FP8 tensor cores as they are.
Where a device has no products of float8, operands are cast to bfloat16, which holds every E4M3
value. Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported) runs the same
kernels without a GPU, slowly, and multiplies in float32.

Layouts are chosen for the products. Scales of 1 x 128 tiles have neighbouring rows side by side,
since one program reads a column of them. Values of 128 x 1 tiles have neighbouring tokens side by
side, the contracted dim of the weight gradient, if every expert starts at a multiple of 16 rows:
then 16 are read at a time. Otherwise they could not be, and the values lie as usual. Both are views
of the shapes that `Quantized` promises.

Axes: R rows, C columns, P stacked matrices, M K N rows, contraction and columns of a product,
E experts.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from configs.errors import DataError, MachineError
from model.fp8 import triton_casts as cast_kernels
from model.fp8 import triton_products as product_kernels
from model.fp8.format import TILE
from model.fp8.quantized import (
    ACTIVATION,
    ALONG_TOKENS,
    Quantized,
    QuantizedE5M6,
    Tile,
    expect_stacked,
)
from model.fp8.triton_layout import (
    Matrix,
    aligned,
    described,
    empty,
    expect_bands,
    expect_product,
    expect_tile,
    flat,
    group_heights,
    group_table,
)

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on any device's tensors."""
FLOAT8_PRODUCTS = (8, 9)
"""The first compute capability whose tensor cores multiply E4M3."""

_ROWS = 32
"""Rows of one program where tiles are one row high: 32 x 128 floats fill 4 warps."""
_COLUMNS = 64
"""Columns of one program where each has a scale of its own: two such programs fit one SM."""
_BLOCK_N = 128
"""Columns of a product's block."""
_TOGETHER = 8
"""Rows of blocks that programs running together share, for the L2 cache."""
_PACKED = 8
"""Values in three words of E5M6."""


class Triton:
    """Casts that equal the reference's bit for bit; products summed in float32.

    Outputs and input gradients leave in `products`, float32 or bfloat16; weight gradients, whose
    right operand has 128 x 1 tiles, always in float32. Within 128 contracted values Hopper's
    tensor cores keep about 14 bits of a sum (arXiv 2412.19437, section 3.3.2).
    """

    name = "triton"

    def __init__(self, products: torch.dtype = torch.float32) -> None:
        """`products` is the dtype of outputs and input gradients."""
        if products not in (torch.float32, torch.bfloat16):
            raise DataError(f"products cannot be stored as {products}; choose float32 or bfloat16")
        self._products = products

    def quantize(
        self,
        x: Tensor | Quantized,
        tile: Tile,
        *,
        power_of_two: bool = False,
        counts: Sequence[int] | None = None,
        saved: bool = True,
        multiplied: bool = True,
    ) -> Quantized:
        """`x` [..., R, C] as E4M3, always with values: they are what is multiplied.

        By tiles of 1 x 128, 128 x 1 or 128 x 128; DataError for others, and for counts that do not
        sum to the rows of a matrix [R, C].
        """
        expect_tile(tile)
        if isinstance(x, Quantized) and x.tile != ACTIVATION:
            x = self.dequantize(x)
        source = x.values.view(torch.uint8) if isinstance(x, Quantized) else _loadable(x)
        shape, columns = source.shape, source.shape[-1]
        heights = group_heights(shape, counts)
        source = flat(source)
        number = len(source) if tile[0] == 1 else sum(-(-height // TILE) for height in heights)
        across = columns if tile[1] == 1 else -(-columns // TILE)
        out = empty(source, tile, heights, number, across)
        width = _COLUMNS if tile[1] == 1 else TILE
        programs = (-(-number // _ROWS) if tile[0] == 1 else number) * -(-columns // width)
        if programs:
            read = Matrix(source, flat(x.scales) if isinstance(x, Quantized) else source)
            with _launching(source):
                cast_kernels.quantize[(programs,)](
                    **read.arguments("source", "rc"),
                    **out.arguments("out", "rc"),
                    table=group_table(heights, TILE, source.device),
                    rows=len(source),
                    columns=columns,
                    groups=len(heights),
                    SOURCE=_source(x),
                    ONE_ROW=tile[0] == 1,
                    ONE_COLUMN=tile[1] == 1,
                    POWER_OF_TWO=power_of_two,
                    ALIGNED=aligned(heights),
                    ROWS=_ROWS if tile[0] == 1 else TILE,
                    COLUMNS=width,
                    GROUPS=triton.next_power_of_2(len(heights)),
                    num_warps=4 if tile[0] == 1 else 8,
                    enable_fp_fusion=False,
                )
        return Quantized(
            out.codes.view(torch.float8_e4m3fn).reshape(shape),
            out.scales if len(shape) == 2 else out.scales.reshape(*shape[:-2], -1, across),
            tile,
            None if counts is None else tuple(counts),
        )

    def dequantize(self, q: Quantized) -> Tensor:
        """values * scales: float32 [..., R, C], contiguous."""
        expect_tile(q.tile)
        shape, columns = q.values.shape, q.values.shape[-1]
        out = torch.empty(shape, device=q.values.device)
        if not out.numel():
            return out
        heights = group_heights(shape, q.counts)
        source = Matrix(flat(q.values.view(torch.uint8)), flat(q.scales))
        rows = len(source.codes)
        number = rows if q.tile[0] == 1 else len(source.scales)
        programs = (-(-number // _ROWS) if q.tile[0] == 1 else number) * -(-columns // TILE)
        with _launching(out):
            cast_kernels.dequantize[(programs,)](
                **source.arguments("source", "rc"),
                out=out,
                table=group_table(heights, TILE, out.device),
                rows=rows,
                columns=columns,
                groups=len(heights),
                ONE_ROW=q.tile[0] == 1,
                ONE_COLUMN=q.tile[1] == 1,
                ROWS=_ROWS if q.tile[0] == 1 else TILE,
                GROUPS=triton.next_power_of_2(len(heights)),
                num_warps=4 if q.tile[0] == 1 else 8,
                enable_fp_fusion=False,
            )
        return out

    def matmul(self, a: Quantized, b: Quantized) -> Tensor:
        """a @ b: [M, N], in float32 where `b` has tiles of 128 x 1, else in the output dtype.

        DataError for stacks, for dims that do not match, and for tiles not 128 long along K.
        """
        for q in (a, b):
            if q.values.ndim != 2:
                raise DataError(
                    f"matmul of {described(a)} and {described(b)}; use grouped_matmul for stacks"
                )
            expect_bands(q, None)
        expect_product(a, b)
        dtype = torch.float32 if b.tile == ALONG_TOKENS else None
        stacked = replace(b, values=b.values[None], scales=b.scales[None], counts=None)
        return self._multiply(a, stacked, (len(a.values),), dtype)

    def grouped_matmul(self, a: Quantized, b: Quantized, counts: Sequence[int]) -> Tensor:
        """Rows of `a` [R, K] times their expert's matrix of `b` [E, K, N], in the output dtype.

        DataError as `matmul`, and if `a` has tiles that rows of two experts could share.
        """
        if a.values.ndim != 2 or b.values.ndim != 3:
            raise DataError(
                f"grouped_matmul of {described(a)} and {described(b)}; want 2 and 3 dims"
            )
        expect_stacked(b, counts)
        if a.tile[0] != 1:
            raise DataError(
                f"the rows of {described(a)} share scales with other experts'; "
                f"quantise by tiles {ACTIVATION}"
            )
        expect_product(a, b)
        return self._multiply(a, b, tuple(counts), None)

    def grouped_outer(self, a: Quantized, b: Quantized, counts: Sequence[int]) -> Tensor:
        """a^T b over each expert's rows: float32 [E, M, N].

        DataError unless both have tiles of 128 x 1 that start anew at these counts.
        """
        for q in (a, b):
            if q.tile != ALONG_TOKENS or q.values.ndim != 2 or len(q.values) != len(a.values):
                raise DataError(
                    f"grouped_outer of {described(a)} and {described(b)}; "
                    f"both need as many rows and tiles {ALONG_TOKENS}"
                )
            expect_bands(q, counts)
        heights = group_heights(a.values.shape, counts)
        height, columns = a.values.shape[1], b.values.shape[1]
        out = torch.empty(len(heights), height, columns, device=a.values.device)
        if not out.numel():
            return out
        if not len(a.values):
            return out.zero_()
        blocking = _blocking(height, a.values.device)
        blocks = -(-height // blocking.rows) * -(-columns // _BLOCK_N)
        operands = _operands(out.device)
        with _launching(out):
            product_kernels.outer[(len(heights) * blocks,)](
                **matrix(a, operands).arguments("a", "km"),
                **matrix(b, operands).arguments("b", "kn"),
                out=out,
                table=group_table(heights, TILE, out.device),
                height=height,
                columns=columns,
                groups=len(heights),
                OPERANDS=operands,
                BLOCK_M=blocking.rows,
                BLOCK_N=_BLOCK_N,
                TOGETHER=_TOGETHER,
                ALIGNED=aligned(heights),
                num_warps=blocking.warps,
                num_stages=blocking.stages,
                enable_fp_fusion=True,
            )
        return out

    def quantize_e5m6(self, x: Tensor) -> QuantizedE5M6:
        """`x` [R, C] in E5M6, by tiles of 1 x 128, scales powers of two; DataError for stacks."""
        if x.ndim != 2:
            raise DataError(f"quantize_e5m6 of shape {tuple(x.shape)}; flatten it to 2 dims")
        source, (rows, columns) = _loadable(x), x.shape
        words = source.new_empty(rows, -(-columns // _PACKED) * 3, dtype=torch.int32)
        scales = source.new_empty(rows, -(-columns // TILE), dtype=torch.float32)
        if source.numel():
            with _launching(source):
                cast_kernels.quantize_e5m6[(-(-rows // _ROWS) * scales.shape[1],)](
                    source=source,
                    words=words,
                    scales=scales,
                    rows=rows,
                    columns=columns,
                    source_r=source.stride(0),
                    source_c=source.stride(1),
                    SOURCE=_source(x),
                    ROWS=_ROWS,
                    num_warps=4,
                    enable_fp_fusion=False,
                )
        return QuantizedE5M6(words, scales, columns)

    def dequantize_e5m6(self, q: QuantizedE5M6) -> Tensor:
        """codes * scales: float32 [R, C]."""
        words, scales = q.words.contiguous(), q.scales.contiguous()
        out = scales.new_empty(len(words), q.columns)
        if out.numel():
            with _launching(words):
                cast_kernels.dequantize_e5m6[(-(-len(words) // _ROWS) * scales.shape[1],)](
                    words=words,
                    scales=scales,
                    out=out,
                    rows=len(words),
                    columns=q.columns,
                    ROWS=_ROWS,
                    num_warps=4,
                    enable_fp_fusion=False,
                )
        return out

    def _multiply(
        self, a: Quantized, b: Quantized, counts: tuple[int, ...], dtype: torch.dtype | None
    ) -> Tensor:
        """Each group's rows of `a` [R, K] times its matrix of `b` [E, K, N]."""
        rows, contraction = a.values.shape
        columns = b.values.shape[-1]
        heights = group_heights(a.values.shape, counts)
        dtype = dtype or self._products
        # The interpreter does not round to bfloat16 as the hardware does; torch does.
        out_dtype = torch.float32 if INTERPRETED else dtype
        out = torch.empty(rows, columns, dtype=out_dtype, device=a.values.device)
        if not out.numel():
            return out.to(dtype)
        if not contraction:
            return out.zero_().to(dtype)
        blocking = _blocking(rows // len(heights), a.values.device)
        tiles = sum(-(-height // blocking.rows) for height in heights)
        operands = _operands(out.device)
        with _launching(out):
            product_kernels.multiply[(tiles * -(-columns // _BLOCK_N),)](
                **matrix(a, operands).arguments("a", "mk"),
                **matrix(b, operands).arguments("b", "ekn"),
                out=out,
                out_m=columns,
                table=group_table(heights, blocking.rows, out.device),
                tiles=tiles,
                contraction=contraction,
                columns=columns,
                groups=len(heights),
                A_ROWS=a.tile[0],
                B_COLUMNS=b.tile[1],
                OPERANDS=operands,
                BLOCK_M=blocking.rows,
                BLOCK_N=_BLOCK_N,
                TOGETHER=_TOGETHER,
                GROUPS=triton.next_power_of_2(len(heights)),
                num_warps=blocking.warps,
                num_stages=blocking.stages,
                enable_fp_fusion=True,
            )
        return out.to(dtype)


class _Blocking(NamedTuple):
    """How a product is cut into programs."""

    rows: int
    """Of a block of the output."""
    warps: int
    """Groups of 32 threads that work on a block."""
    stages: int
    """Blocks of operands that are being loaded at once."""


def _blocking(rows: int, device: torch.device) -> _Blocking:
    """Blocks for groups of about so many rows.

    Two warp groups share 128 rows: the accumulator and one block's product then take 128 registers
    a thread. A stage is 32 KiB (24 with 64 rows) of Hopper's 227; others may have fewer than 100.
    """
    hopper = device.type != "cuda" or torch.cuda.get_device_capability(device) >= (9, 0)
    if rows <= 64:
        return _Blocking(64, 4, 5 if hopper else 2)
    return _Blocking(128, 8, 4 if hopper else 2)


def _loadable(x: Tensor) -> Tensor:
    """`x` as kernels read it: float32, or bfloat16's bits."""
    x = x.detach()
    return x.view(torch.int16) if x.dtype is torch.bfloat16 else x.float()


def _source(x: Tensor | Quantized) -> Any:
    """The kernels' name for the form that `x` is in: a constexpr, which has no type here."""
    if isinstance(x, Quantized):
        return cast_kernels.CODES
    return cast_kernels.BFLOATS if x.dtype is torch.bfloat16 else cast_kernels.FLOATS


def _operands(device: torch.device) -> Any:
    """The kernels' name for the type that the device multiplies: a constexpr, as above."""
    if INTERPRETED:
        return product_kernels.FLOAT32
    able = torch.cuda.get_device_capability(device) >= FLOAT8_PRODUCTS
    return product_kernels.FLOAT8 if able else product_kernels.BFLOAT16


def matrix(q: Quantized, operands: Any) -> Matrix:
    """The codes and scales of `q` as a product reads them."""
    as_they_are = operands is product_kernels.FLOAT8
    return Matrix(q.values if as_they_are else q.values.view(torch.uint8), q.scales)


def _launching(x: Tensor) -> AbstractContextManager[Any]:
    """Make the device of `x` the current one, on which kernels are launched.

    MachineError if it is no CUDA device, unless kernels are interpreted.
    """
    if INTERPRETED:
        return nullcontext()
    if x.device.type != "cuda":
        raise MachineError(
            f"Triton's kernels cannot run on {x.device}; move tensors to a CUDA device, or set "
            f"TRITON_INTERPRET=1 before Triton is imported"
        )
    return torch.cuda.device(x.device)

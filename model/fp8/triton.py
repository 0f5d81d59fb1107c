"""FP8 on CUDA devices by Triton kernels: the backend that launches them.

The kernels are in `triton_casts.py` and `triton_products.py`, their operands' layouts in
`triton_layout.py`. A kernel is one program that runs many times over, each time on another block of
its output; here it is decided how large the blocks are and how many programs that makes.

Written for Hopper: blocks of 128 x 128 x 128, and bytes go to the FP8 tensor cores as they are.
Where a device has no products of float8, operands are cast to bfloat16, which holds every E4M3
value. Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported) runs the same
kernels without a GPU, slowly, and multiplies in float32.

Layouts are chosen for the products, whose operands Hopper's tensor cores read along the contraction
alone. Weights are contracted along both dims and have codes of both layouts. Scales of 1 x 128
tiles have neighbouring rows side by side, since one program reads a column of them. Values of
128 x 1 tiles have neighbouring tokens side by side, the contracted dim of the weight gradient. With
groups, each is padded to whole tiles of tokens, so that wherever it begins 16 values are read at a
time and none need to be held back. Without, that takes a multiple of 16 rows; else values lie as
usual. All but the padding are views of the shapes that `Quantized` promises.

How many rows a group has is read by kernels, never by the host: it launches programs for as many
blocks as there can be, and those beyond the last return at once.

Axes: R rows, C columns, P stacked matrices, M K N rows, contraction and columns of a product,
E experts.
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from configs.errors import DataError, MachineError
from model.fp8 import triton_casts as cast_kernels
from model.fp8 import triton_products as product_kernels
from model.fp8.format import TILE
from model.fp8.groups import Groups
from model.fp8.quantized import (
    ACTIVATION,
    ALONG_TOKENS,
    BLOCK,
    Quantized,
    QuantizedE5M6,
    Tile,
    expect_rows,
    expect_same_groups,
    expect_stacked,
)
from model.fp8.triton_layout import (
    Bands,
    Matrix,
    described,
    empty,
    expect_product,
    expect_tile,
    flat,
)

INTERPRETED = bool(triton.knobs.runtime.interpret)
"""Whether Triton's interpreter runs the kernels, on any device's tensors."""
FLOAT8_PRODUCTS = (8, 9)
"""The first compute capability whose tensor cores multiply E4M3."""

_ROWS = 32
"""Rows of one program where tiles are one row high: 32 x 128 floats fill 4 warps."""
_COLUMNS = 64
"""Columns of one program where each has a scale of its own: two such programs fit one SM."""
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
    reads_columns = True

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
        groups: Groups | None = None,
        saved: bool = True,
        multiplied: bool = True,
        by_column: bool = False,
    ) -> Quantized:
        """`x` [..., R, C] as E4M3, always with values: they are what is multiplied.

        By tiles of 1 x 128, 128 x 1 or 128 x 128; DataError for others, and for groups that are not
        of the rows of a matrix [R, C].
        """
        expect_tile(tile)
        if isinstance(x, Quantized) and x.tile != ACTIVATION:
            x = self.dequantize(x)
        source = x.values.view(torch.uint8) if isinstance(x, Quantized) else _loadable(x)
        shape, columns, one_row = source.shape, source.shape[-1], tile[0] == 1
        expect_rows(shape, groups)
        source = flat(source)
        bands = Bands.of(shape, groups, TILE, source.device)
        padded, both = groups is not None and tile == ALONG_TOKENS, by_column and tile == BLOCK
        number = len(source) if one_row else bands.number
        across = columns if tile[1] == 1 else -(-columns // TILE)
        out = empty(source, tile, number, across, padded=padded)
        turned = source.new_empty(*shape[:-2], columns, shape[-2], dtype=torch.uint8)
        turned = turned if both else out.codes
        width = _COLUMNS if tile[1] == 1 else TILE
        programs = (-(-number // _ROWS) if one_row else number) * -(-columns // width)
        if programs:
            read = Matrix(source, flat(x.scales) if isinstance(x, Quantized) else source)
            with _launching(source):
                cast_kernels.quantize[(programs,)](
                    **read.arguments("source", "rc"),
                    **out.arguments("out", "rc"),
                    by_column=turned,
                    table=bands.table,
                    rows=len(source),
                    columns=columns,
                    groups=bands.groups,
                    height=shape[-2],
                    SOURCE=_source(x),
                    ONE_ROW=one_row,
                    ONE_COLUMN=tile[1] == 1,
                    POWER_OF_TWO=power_of_two,
                    ALIGNED=groups is None and shape[-2] % 16 == 0,
                    PADDED=padded,
                    BY_COLUMN=both,
                    ROWS=_ROWS if one_row else TILE,
                    COLUMNS=width,
                    GROUPS=triton.next_power_of_2(bands.groups),
                    num_warps=4 if one_row else 8,
                    enable_fp_fusion=False,
                )
        codes = out.codes.view(torch.float8_e4m3fn)
        return Quantized(
            codes if padded else codes.reshape(shape),
            out.scales if len(shape) == 2 else out.scales.reshape(*shape[:-2], -1, across),
            tile,
            groups,
            padded=padded,
            by_column=turned.view(torch.float8_e4m3fn).mT if both else None,
        )

    def dequantize(self, q: Quantized) -> Tensor:
        """values * scales: float32 [..., R, C], contiguous."""
        expect_tile(q.tile)
        shape, columns, one_row = q.values.shape, q.values.shape[-1], q.tile[0] == 1
        if q.padded and q.groups is not None:
            shape = torch.Size([q.groups.rows, columns])
        out = torch.empty(shape, device=q.values.device)
        if not out.numel():
            return out
        bands = Bands.of(shape, q.groups, TILE, out.device)
        rows = out.numel() // columns
        programs = (-(-rows // _ROWS) if one_row else bands.number) * -(-columns // TILE)
        source = Matrix(flat(q.values.view(torch.uint8)), flat(q.scales))
        with _launching(out):
            cast_kernels.dequantize[(programs,)](
                **source.arguments("source", "rc"),
                out=out,
                table=bands.table,
                rows=rows,
                columns=columns,
                groups=bands.groups,
                ONE_ROW=one_row,
                ONE_COLUMN=q.tile[1] == 1,
                PADDED=q.padded,
                ROWS=_ROWS if one_row else TILE,
                GROUPS=triton.next_power_of_2(bands.groups),
                num_warps=4 if one_row else 8,
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
            expect_same_groups(q, None)
        a, b = a.unpadded(), b.unpadded()
        expect_product(a, b)
        dtype = torch.float32 if b.tile == ALONG_TOKENS else None
        return self._multiply(a, b.stacked(), None, dtype)

    def grouped_matmul(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """Rows of `a` [R, K] times their expert's matrix of `b` [E, K, N], in the output dtype.

        DataError as `matmul`, and if `a` has tiles that rows of two experts could share.
        """
        if a.values.ndim != 2 or b.values.ndim != 3:
            raise DataError(
                f"grouped_matmul of {described(a)} and {described(b)}; want 2 and 3 dims"
            )
        expect_stacked(b, groups)
        if a.tile[0] != 1:
            raise DataError(
                f"the rows of {described(a)} share scales with other experts'; "
                f"quantise by tiles {ACTIVATION}"
            )
        expect_product(a, b)
        expect_rows(a.values.shape, groups)
        return self._multiply(a, b, groups, None)

    def grouped_outer(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
        """a^T b over each expert's rows: float32 [E, M, N].

        DataError unless both have tiles of 128 x 1 that start anew with these groups, padded as
        `quantize` makes them.
        """
        for q in (a, b):
            if q.tile != ALONG_TOKENS or not q.padded:
                raise DataError(
                    f"grouped_outer of {described(a)} and {described(b)}; "
                    f"both need tiles {ALONG_TOKENS} of the same groups"
                )
            expect_same_groups(q, groups)
        height, columns = a.values.shape[1], b.values.shape[1]
        out = torch.empty(len(groups), height, columns, device=a.values.device)
        if not out.numel():
            return out
        blocking = _blocking(height, a.values.device)
        blocks = -(-height // blocking.rows) * -(-columns // blocking.columns)
        operands = _operands(out.device)
        with _launching(out):
            product_kernels.outer[(len(groups) * blocks,)](
                **matrix(a, operands, -2).arguments("a", "km"),
                **matrix(b, operands, -2).arguments("b", "kn"),
                out=out,
                table=groups.table(TILE),
                height=height,
                columns=columns,
                groups=len(groups),
                OPERANDS=operands,
                BLOCK_M=blocking.rows,
                BLOCK_N=blocking.columns,
                TOGETHER=_TOGETHER,
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
        self, a: Quantized, b: Quantized, groups: Groups | None, dtype: torch.dtype | None
    ) -> Tensor:
        """Each group's rows of `a` [R, K], or all, times its matrix of `b` [E, K, N]."""
        rows, contraction = a.values.shape
        columns = b.values.shape[-1]
        dtype = dtype or self._products
        # The interpreter does not round to bfloat16 as the hardware does; torch does.
        out_dtype = torch.float32 if INTERPRETED else dtype
        out = torch.empty(rows, columns, dtype=out_dtype, device=a.values.device)
        if not out.numel():
            return out.to(dtype)
        if not contraction:
            return out.zero_().to(dtype)
        blocking = _blocking(rows // len(b.values), a.values.device)
        tiles = Bands.of(a.values.shape, groups, blocking.rows, out.device)
        operands = _operands(out.device)
        with _launching(out):
            product_kernels.multiply[(tiles.number * -(-columns // blocking.columns),)](
                **matrix(a, operands, -1).arguments("a", "mk"),
                **matrix(b, operands, -2).arguments("b", "ekn"),
                out=out,
                out_m=columns,
                table=tiles.table,
                contraction=contraction,
                columns=columns,
                groups=tiles.groups,
                A_ROWS=a.tile[0],
                B_COLUMNS=b.tile[1],
                OPERANDS=operands,
                BLOCK_M=blocking.rows,
                BLOCK_N=blocking.columns,
                TOGETHER=_TOGETHER,
                GROUPS=triton.next_power_of_2(tiles.groups),
                EVEN=contraction % TILE == 0,
                num_warps=blocking.warps,
                num_stages=blocking.stages,
                enable_fp_fusion=True,
            )
        return out.to(dtype)


class _Blocking(NamedTuple):
    """How a product is cut into programs."""

    rows: int
    """Of a block of the output."""
    columns: int
    warps: int
    """Groups of 32 threads that work on a block."""
    stages: int
    """Blocks of operands that are being loaded at once."""


def _blocking(rows: int, device: torch.device) -> _Blocking:
    """Blocks for groups of about so many rows.

    On Hopper two warp groups share 128 rows: the accumulator and one block's product then take 128
    registers a thread. A stage is 32 KiB (24 with 64 rows) of its 227. Older tensor cores take
    operands from registers, where those of a block so large have no room beside the sums: compiled
    for sm_80, 128 rows spill 7 KiB a thread. And shared memory may have fewer than 100 KiB.
    """
    if not INTERPRETED and torch.cuda.get_device_capability(device) < (9, 0):
        return _Blocking(64, 128, 8, 2)
    if rows <= 64:
        return _Blocking(64, 128, 4, 5)
    return _Blocking(128, 128, 8, 4)


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


def matrix(q: Quantized, operands: Any, contracted: int) -> Matrix:
    """The codes and scales of `q` as a product reads them that contracts this dim."""
    codes = q.contracted(contracted)
    return Matrix(
        codes if operands is product_kernels.FLOAT8 else codes.view(torch.uint8), q.scales
    )


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

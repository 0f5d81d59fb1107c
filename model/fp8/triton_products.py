"""Triton kernels that multiply block-scaled E4M3.

`multiply` is a product by rows, with one matrix or with each expert's own: forward and input
gradient. `outer` contracts the rows of each expert: weight gradients. A program computes one block
of the output. It takes 128 contracted values at a time: their products are summed by the tensor
cores, scaled by both operands' scales, and added up in float32.

An operand `a` comes as `a` and `a_scales`, pointers, and a stride for each of its axes, as `a_m`
and `a_scales_m`. Tables are those of `triton_casts.py`, as is the padding of what `outer`
contracts. EVEN says that all of a contraction are whole blocks of 128, so that nothing beyond its
end needs to be held back.

Axes: M K N rows, contraction and columns of a product.
"""

from typing import no_type_check

import triton
import triton.language as tl

from model.fp8.triton_casts import WIDTH, band_of, decode

# Kernels are `no_type_check`: their arguments are pointers and numbers of the GPU program, and what
# checks the types of other functions would stand between Triton and the source it compiles.

FLOAT8 = tl.constexpr(0)
"""Codes go to the tensor cores as they are, typed as what they are: bytes that are cast after they
were loaded could not be handed over from shared memory."""
BFLOAT16 = tl.constexpr(1)
"""For GPUs without products of float8: bfloat16 holds every E4M3 value."""
FLOAT32 = tl.constexpr(2)
"""For Triton's interpreter, which multiplies float8 by way of float16."""


@no_type_check
@triton.jit
def multiply(
    a,
    a_scales,
    b,
    b_scales,
    table,
    out,
    contraction,
    columns,
    groups,
    a_m,
    a_k,
    a_scales_m,
    a_scales_k,
    b_e,
    b_k,
    b_n,
    b_scales_e,
    b_scales_k,
    b_scales_n,
    out_m,
    A_ROWS: tl.constexpr,
    B_COLUMNS: tl.constexpr,
    OPERANDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOGETHER: tl.constexpr,
    GROUPS: tl.constexpr,
    EVEN: tl.constexpr,
):
    """One block of out [M, N]: an expert's rows of a [M, K] times its matrix of b [E, K, N]."""
    tiles = tl.load(table + 2 * groups + 1)
    if tl.program_id(0) >= tiles * tl.cdiv(columns, BLOCK_N):
        return
    tile, across = _swizzled(tl.program_id(0), tiles, tl.cdiv(columns, BLOCK_N), TOGETHER)
    expert, _, first, last = band_of(table, tile, groups, BLOCK_M, GROUPS)
    row, column = first + tl.arange(0, BLOCK_M), across * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = expert.to(tl.int64)
    total = _sum_of_blocks(
        (a, a_scales, a_m, a_k, a_scales_m, a_scales_k),
        (b + expert * b_e, b_scales + expert * b_scales_e, b_n, b_k, b_scales_n, b_scales_k),
        row,
        last,
        column,
        columns,
        contraction,
        A_ROWS,
        B_COLUMNS,
        OPERANDS,
        BLOCK_M,
        BLOCK_N,
        EVEN,
    )
    inside = (row < last)[:, None] & (column < columns)[None, :]
    to = out + row[:, None].to(tl.int64) * out_m + column[None, :]
    tl.store(to, total.to(out.dtype.element_ty), mask=inside)


@no_type_check
@triton.jit
def outer(
    a,
    a_scales,
    b,
    b_scales,
    table,
    out,
    height,
    columns,
    groups,
    a_k,
    a_m,
    a_scales_k,
    a_scales_m,
    b_k,
    b_n,
    b_scales_k,
    b_scales_n,
    OPERANDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    """One block of out [E, M, N]: an expert's rows of a [K, M], transposed, times those of b.

    Experts' rows are filled up to whole bands of 128.
    """
    down, across = tl.cdiv(height, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    expert, inner = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    tile_m, tile_n = _swizzled(inner, down, across, TOGETHER)
    row, column = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    # Both sides begin at the expert's first band, as their scales do.
    bands = table + groups + 1 + expert
    band, end = tl.load(bands).to(tl.int64), tl.load(bands + 1)
    start = band * WIDTH
    total = _sum_of_blocks(
        (a + start * a_k, a_scales + band * a_scales_k, a_m, a_k, a_scales_m, a_scales_k),
        (b + start * b_k, b_scales + band * b_scales_k, b_n, b_k, b_scales_n, b_scales_k),
        row,
        height,
        column,
        columns,
        (end - band.to(tl.int32)) * WIDTH,
        1,
        1,
        OPERANDS,
        BLOCK_M,
        BLOCK_N,
        True,
    )
    inside = (row < height)[:, None] & (column < columns)[None, :]
    to = out + (expert.to(tl.int64) * height + row[:, None]) * columns + column[None, :]
    tl.store(to, total, mask=inside)


@no_type_check
@triton.jit
def _sum_of_blocks(
    of_a,
    of_b,
    row,
    last_row,
    column,
    columns,
    contraction,
    A_ROWS: tl.constexpr,
    B_COLUMNS: tl.constexpr,
    OPERANDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    EVEN: tl.constexpr,
):
    """float32 [BLOCK_M, BLOCK_N]: 128 contracted values at a time, scaled, added in float32.

    `of_a` and `of_b` are tuples: pointers to codes and to scales, then four strides, of codes
    across (m or n) and along the contraction (k), and the same two of scales. A_ROWS rows of a
    share a scale, and B_COLUMNS columns of b.

    Tensor cores keep few bits of their sums. Leaving them every 128 values is the promotion of
    DeepSeek-V3 (arXiv 2412.19437, section 3.3.2). The two scales are multiplied with one another
    first: where one of them belongs to the whole block, as with weights, one fused multiplication
    and addition remains for each value.
    """
    a, a_scales, a_m, a_k, a_scales_m, a_scales_k = of_a
    b, b_scales, b_n, b_k, b_scales_n, b_scales_k = of_b
    real_row, real_column = row < last_row, column < columns
    a_row = a + row[:, None].to(tl.int64) * a_m
    b_column = b + column[None, :].to(tl.int64) * b_n
    a_scale_at = a_scales + (row // A_ROWS).to(tl.int64) * a_scales_m
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for block in range(tl.cdiv(contraction, WIDTH)):
        k = block * WIDTH + tl.arange(0, WIDTH)
        of_left, of_right = real_row[:, None], real_column[None, :]
        if not EVEN:
            of_left, of_right = (
                of_left & (k < contraction)[None, :],
                of_right & (k < contraction)[:, None],
            )
        k = k.to(tl.int64)
        left = tl.load(a_row + k[None, :] * a_k, mask=of_left, other=0.0)
        right = tl.load(b_column + k[:, None] * b_k, mask=of_right, other=0.0)
        # Both scales before the product: a load behind it would begin when that has ended.
        a_scale = tl.load(a_scale_at + block * a_scales_k, mask=real_row, other=0.0)
        b_at = b_scales + block * b_scales_k
        if B_COLUMNS == 1:
            b_scale = tl.load(b_at + column * b_scales_n, mask=real_column, other=0.0)
            total += _dot(left, right, OPERANDS) * (a_scale[:, None] * b_scale[None, :])
        else:
            # A block of columns lies within one tile: its width divides 128.
            b_scale = tl.load(b_at + tl.min(column, axis=0) // B_COLUMNS * b_scales_n)
            total += _dot(left, right, OPERANDS) * (a_scale * b_scale)[:, None]
    return total


@no_type_check
@triton.jit
def _dot(left, right, OPERANDS: tl.constexpr):
    """The product of two blocks of codes, float32.

    One branch each: what comes after a `return` would be compiled too.
    """
    if OPERANDS == FLOAT8:
        part = tl.dot(left, right)
    elif OPERANDS == BFLOAT16:
        part = tl.dot(decode(left).to(tl.bfloat16), decode(right).to(tl.bfloat16))
    else:
        part = tl.dot(decode(left), decode(right), input_precision="ieee")
    return part


@no_type_check
@triton.jit
def _swizzled(program, down, across, TOGETHER: tl.constexpr):
    """Row and column of a block: programs that run together share TOGETHER rows of blocks.

    What they read of both operands then stays in the L2 cache.
    """
    above = program // (TOGETHER * across) * TOGETHER
    size = tl.minimum(down - above, TOGETHER)
    inner = program % (TOGETHER * across)
    return above + inner % size, inner // size

"""Triton kernels that quantise to E4M3 and to E5M6, and dequantise both.

The numbers are those of `reference.py`, bit for bit. Three things make sure of that on a GPU:

- `tl.div_rn`: plain `/` of float32 is approximate there.
- E4M3 is rounded by float arithmetic and packed through an integer view: casts to float8 differ
  between GPUs and do not exist on old ones. Comparisons with the smallest normal number look at
  bits, so they hold even where subnormals are flushed.
- A multiplication followed by an addition may be fused, which skips a rounding. Wherever one
  follows the other here the multiplication is exact, so that there is none to skip.

A program works on a panel: some rows, or a band of 128 that share scales, times at most 128
columns.

A matrix `x` comes as `x` and `x_scales`, pointers, and `x_r`, `x_c`, `x_scales_r`, `x_scales_c`,
strides along rows and columns: it may be a transposed view. Stacked matrices are one long matrix.
A group is one of them, or an expert's rows. `table`, int32 [2, groups + 1], has the first row and
the first band of each group, then the totals. The host, which does not wait for it, launches
programs for as many bands as there can be: those beyond the last return. PADDED says that results
are written, or were, with each group's last band filled up to 128 rows, so that band b begins at
row 128 b. ALIGNED says that all groups begin at multiples of 16 rows, which the compiler cannot see
in a number that it loads: it lets values that lie along the rows be read 16 at a time.

Axes: R rows, C columns.
"""

from typing import no_type_check

import triton
import triton.language as tl

# Kernels are `no_type_check`: their arguments are pointers and numbers of the GPU program, and what
# checks the types of other functions would stand between Triton and the source it compiles.

WIDTH = tl.constexpr(128)
"""Columns of a panel, and values under one scale."""
FLOATS = tl.constexpr(0)
"""Float32."""
BFLOATS = tl.constexpr(1)
"""Bfloat16, passed as int16: the interpreter's own casts of it are not exact."""
CODES = tl.constexpr(2)
"""E4M3 with a scale for each row and 128 columns."""


@no_type_check
@triton.jit
def quantize(
    source,
    source_scales,
    table,
    out,
    out_scales,
    by_column,
    rows,
    columns,
    groups,
    height,
    source_r,
    source_c,
    source_scales_r,
    source_scales_c,
    out_r,
    out_c,
    out_scales_r,
    out_scales_c,
    SOURCE: tl.constexpr,
    ONE_ROW: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
    POWER_OF_TWO: tl.constexpr,
    ALIGNED: tl.constexpr,
    PADDED: tl.constexpr,
    BY_COLUMN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """E4M3 codes, uint8, and scales, float32, of a panel: ROWS rows or one band, COLUMNS columns.

    Tiles are ONE_ROW high, ONE_COLUMN wide, or else blocks of 128 x 128. With BY_COLUMN the codes
    of blocks are written a second time, into `by_column`, for each of the stacked matrices of
    `height` rows transposed: [groups, columns, height], contiguous.
    """
    panels = tl.cdiv(columns, COLUMNS)
    band, panel = tl.program_id(0) // panels, tl.program_id(0) % panels
    column = panel * COLUMNS + tl.arange(0, COLUMNS)
    group, within, row, last = _rows(table, band, rows, groups, ONE_ROW, ALIGNED, ROWS, GROUPS)
    to = out_scales + band.to(tl.int64) * out_scales_r
    if not ONE_ROW:  # noqa: SIM102 - the outer is decided when the kernel is compiled
        if band >= tl.load(table + 2 * groups + 1):
            # No such band: its scale is that of zeros.
            one = tl.full([COLUMNS], 1.0, dtype=tl.float32)
            if ONE_COLUMN:
                tl.store(to + column * out_scales_c, one, mask=column < columns)
            else:
                tl.store(to + panel * out_scales_c, 1.0)
            return
    inside = (row < last)[:, None] & (column < columns)[None, :]
    at = row[:, None] * source_r + column[None, :].to(tl.int64) * source_c
    if SOURCE == CODES:
        stored = tl.load(source + at, mask=inside, other=0)
        scale_at = row * source_scales_r + panel * COLUMNS // WIDTH * source_scales_c
        stored_scale = tl.load(source_scales + scale_at, mask=row < last, other=0.0)
        v = decode(stored) * stored_scale[:, None]
    elif SOURCE == BFLOATS:
        v = tl.load(source + at, mask=inside, other=0).to(tl.int32) << 16
        v = v.to(tl.float32, bitcast=True)
    else:
        v = tl.load(source + at, mask=inside, other=0.0)
    # Magnitudes order as their bits do, and what is not finite comes last.
    magnitude = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if ONE_ROW:
        scale = _scale(tl.max(magnitude, axis=1), 448.0, POWER_OF_TWO)
        scale_at = out_scales + row * out_scales_r + panel * out_scales_c
        tl.store(scale_at, scale, mask=row < last)
        code = _encode(v, scale[:, None])
    elif ONE_COLUMN:
        scale = _scale(tl.max(magnitude, axis=0), 448.0, POWER_OF_TWO)
        tl.store(to + column * out_scales_c, scale, mask=column < columns)
        code = _encode(v, scale[None, :])
    else:
        scale = _scale(tl.max(tl.max(magnitude, axis=1), axis=0), 448.0, POWER_OF_TWO)
        tl.store(to + panel * out_scales_c, scale)
        code = _encode(v, scale)
    if PADDED:
        # In a tile that is not finite, rows of padding stay zeros.
        filled = tl.where((row < last)[:, None], code, 0)
        row = band.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        at = row[:, None] * out_r + column[None, :].to(tl.int64) * out_c
        tl.store(out + at, filled, mask=(column < columns)[None, :])
    else:
        at = row[:, None] * out_r + column[None, :].to(tl.int64) * out_c
        tl.store(out + at, code, mask=inside)
    if BY_COLUMN:
        at = (group.to(tl.int64) * columns + column[None, :]) * height + within[:, None]
        tl.store(by_column + at, code, mask=inside)


@no_type_check
@triton.jit
def dequantize(
    source,
    source_scales,
    table,
    out,
    rows,
    columns,
    groups,
    source_r,
    source_c,
    source_scales_r,
    source_scales_c,
    ONE_ROW: tl.constexpr,
    ONE_COLUMN: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """codes * scales of a panel, into float32 `out` [R, C], contiguous."""
    panels = tl.cdiv(columns, WIDTH)
    band, panel = tl.program_id(0) // panels, tl.program_id(0) % panels
    _, _, row, last = _rows(table, band, rows, groups, ONE_ROW, False, ROWS, GROUPS)
    if not ONE_ROW:  # noqa: SIM102 - the outer is decided when the kernel is compiled
        if band >= tl.load(table + 2 * groups + 1):
            return
    column = panel * WIDTH + tl.arange(0, WIDTH)
    inside = (row < last)[:, None] & (column < columns)[None, :]
    source_row = row
    if PADDED:
        source_row = band.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    at = source_row[:, None] * source_r + column[None, :].to(tl.int64) * source_c
    value = decode(tl.load(source + at, mask=inside, other=0))
    of = source_scales + band.to(tl.int64) * source_scales_r
    if ONE_ROW:
        scale_at = source_scales + row * source_scales_r + panel * source_scales_c
        scale = tl.load(scale_at, mask=row < last, other=0.0)
        value = value * scale[:, None]
    elif ONE_COLUMN:
        scale = tl.load(of + column * source_scales_c, mask=column < columns, other=0.0)
        value = value * scale[None, :]
    else:
        value = value * tl.load(of + panel * source_scales_c)
    tl.store(out + row[:, None] * columns + column[None, :], value, mask=inside)


@no_type_check
@triton.jit
def quantize_e5m6(
    source,
    words,
    scales,
    rows,
    columns,
    source_r,
    source_c,
    SOURCE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """E5M6 of ROWS rows times 128 columns: words as `format.pack_e5m6` packs, contiguous."""
    panels = tl.cdiv(columns, WIDTH)
    row = (tl.program_id(0) // panels) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    panel = tl.program_id(0) % panels
    column = panel * WIDTH + tl.arange(0, WIDTH)
    from_row = source + row[:, None] * source_r
    v = _floats(from_row, row, rows, column, columns, source_c, SOURCE)
    magnitude = v.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    scale = _scale(tl.max(magnitude, axis=1), 65024.0, True)
    tl.store(scales + row * panels + panel, scale, mask=row < rows)
    known = (scale == scale)[:, None]
    divisor = tl.where(known, scale[:, None], 1.0)
    eight = panel * (WIDTH // 8) + tl.arange(0, WIDTH // 8)
    low = tl.zeros([ROWS, WIDTH // 8], dtype=tl.int32)
    middle = tl.zeros([ROWS, WIDTH // 8], dtype=tl.int32)
    high = tl.zeros([ROWS, WIDTH // 8], dtype=tl.int32)
    # The values were read a moment ago, so that this second reading comes from the cache.
    for j in tl.static_range(8):
        v = _floats(from_row, row, rows, eight * 8 + j, columns, source_c, SOURCE)
        code = _encode_e5m6(tl.div_rn(tl.where(known, v, 0.0), divisor))
        if j < 3:
            low |= code << (12 * j)
        if j == 2:
            middle |= code >> 8
        if j > 2 and j < 6:
            middle |= code << (12 * j - 32)
        if j == 5:
            high |= code >> 4
        if j > 5:
            high |= code << (12 * j - 64)
    to = words + row[:, None] * (tl.cdiv(columns, 8) * 3) + eight[None, :] * 3
    inside = (row < rows)[:, None] & (eight * 8 < columns)[None, :]
    tl.store(to, low, mask=inside)
    tl.store(to + 1, middle, mask=inside)
    tl.store(to + 2, high, mask=inside)


@no_type_check
@triton.jit
def dequantize_e5m6(words, scales, out, rows, columns, ROWS: tl.constexpr):
    """codes * scales of what `quantize_e5m6` packed, into float32 `out` [R, C], contiguous."""
    panels = tl.cdiv(columns, WIDTH)
    row = (tl.program_id(0) // panels) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    panel = tl.program_id(0) % panels
    column = panel * WIDTH + tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    bit = (column % 8) * 12
    word, shift = bit // 32, bit % 32
    from_row = words + row[:, None] * (tl.cdiv(columns, 8) * 3)
    at = from_row + (column // 8 * 3 + word)[None, :]
    lower = tl.load(at, mask=inside, other=0).to(tl.uint32, bitcast=True)
    # Codes 2 and 5 end in the next word. No shift may reach 32, where it would mean nothing.
    straddles = shift > 20
    up = tl.where(straddles, 32 - shift, 0)
    upper = tl.load(at + 1, mask=inside & straddles[None, :], other=0).to(tl.uint32, bitcast=True)
    bits = (lower >> shift[None, :].to(tl.uint32)) | (upper << up[None, :].to(tl.uint32))
    scale = tl.load(scales + row * panels + panel, mask=row < rows, other=0.0)
    value = _decode_e5m6((bits & 0xFFF).to(tl.int32)) * scale[:, None]
    tl.store(out + row[:, None] * columns + column[None, :], value, mask=inside)


@no_type_check
@triton.jit
def band_of(table, band, groups, HEIGHT: tl.constexpr, GROUPS: tl.constexpr):
    """Group, first row within it, first row and last row (exclusive) of a band of HEIGHT rows.

    Beyond the last band, a band of a group that is not there: read nothing of it.
    """
    group = tl.arange(0, GROUPS)
    ends = tl.load(table + groups + 2 + group, mask=group < groups, other=2147483647)
    found = tl.sum((ends <= band).to(tl.int32), axis=0)
    within = (band - tl.load(table + groups + 1 + found)) * HEIGHT
    first = tl.load(table + found) + within
    return found, within, first, tl.minimum(first + HEIGHT, tl.load(table + found + 1))


@no_type_check
@triton.jit
def decode(code):
    """The values of E4M3 codes, float32."""
    bits8 = code.to(tl.int32)
    magnitude = bits8 & 0x7F
    # Codes below 8 have no leading one: it is lent, and taken back.
    lent = tl.where(magnitude < 8, 121 << 23, 120 << 23)
    value = ((magnitude << 20) + lent).to(tl.float32, bitcast=True)
    value -= tl.where(magnitude < 8, 0.015625, 0.0)
    bits = tl.where(magnitude == 0x7F, 0x7FC00000, value.to(tl.int32, bitcast=True))
    return (bits | ((bits8 & 0x80) << 24)).to(tl.float32, bitcast=True)


@no_type_check
@triton.jit
def _rows(
    table,
    band,
    rows,
    groups,
    ONE_ROW: tl.constexpr,
    ALIGNED: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
):
    """Group, rows within it, rows, int64, of one program, and where they end (exclusive)."""
    step = tl.arange(0, ROWS).to(tl.int64)
    if ONE_ROW:
        group, within, first, last = 0, band * ROWS, band * ROWS, rows
    else:
        group, within, first, last = band_of(table, band, groups, ROWS, GROUPS)
        if ALIGNED:
            first, last = tl.multiple_of(first, 16), tl.multiple_of(last, 16)
    return group, within + step, first + step, last


@no_type_check
@triton.jit
def _scale(amax, LARGEST: tl.constexpr, POWER_OF_TWO: tl.constexpr):
    """The scale of tiles whose largest magnitudes are `amax`, as bits: see `format.tile_scales`."""
    finite = amax < 0x7F800000
    bits = tl.div_rn(tl.where(finite, amax, 0).to(tl.float32, bitcast=True), LARGEST)
    bits = bits.to(tl.int32, bitcast=True)
    counts_as_zero = bits < 0x00800000
    if POWER_OF_TWO:
        bits = (bits + 0x7FFFFF) & 0x7F800000
    bits = tl.where(counts_as_zero, 0x3F800000, bits)
    return tl.where(finite, bits, 0x7FC00000).to(tl.float32, bitcast=True)


@no_type_check
@triton.jit
def _encode(v, scale):
    """E4M3 codes of v / scale, uint8; a scale that is NaN makes all of them 0x7F."""
    known = scale == scale
    ratio = tl.div_rn(tl.where(known, v, 0.0), tl.where(known, scale, 1.0))
    # See `format.round_to_grid`. Fusing `leading * 1.5 * 2^20` into the addition changes nothing:
    # a power of two times that is exact. Flushing subnormals neither: they round to zero.
    leading = (ratio.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    magic = tl.maximum(leading, 0.015625) * 1572864.0
    rounded = (ratio + magic) - magic
    magnitude = rounded.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    small = (magnitude.to(tl.float32, bitcast=True) * 512.0).to(tl.int32)
    code = tl.where(magnitude < (121 << 23), small, (magnitude >> 20) - (120 << 3))
    # Rounding lost the sign of zeros.
    code |= (v.to(tl.int32, bitcast=True) >> 24) & 0x80
    return tl.where(known, code, 0x7F).to(tl.uint8)


@no_type_check
@triton.jit
def _floats(from_row, row, rows, column, columns, stride, SOURCE: tl.constexpr):
    """float32 [rows, columns] of a panel, zeros beyond the edges."""
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    loaded = tl.load(from_row + column[None, :].to(tl.int64) * stride, mask=inside, other=0)
    if SOURCE == BFLOATS:
        loaded = (loaded.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return loaded


@no_type_check
@triton.jit
def _encode_e5m6(v):
    """E5M6 codes, int32, for |v| <= 65024."""
    bits = v.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    exponent = tl.maximum(magnitude >> 23, 113)
    # 1.5 * 2^(e + 17) has a last bit of 2^(e - 6), so that the addition rounds; it is exact, so
    # fusing it changes nothing.
    magic = ((exponent + 17) << 23).to(tl.float32, bitcast=True) * 1.5
    rounded = (magnitude.to(tl.float32, bitcast=True) + magic) - magic
    # Only subnormals use these; the minimum keeps the others within an int32.
    steps = (tl.minimum(rounded, 0.00006103515625) * 1048576.0).to(tl.int32)
    rounded = rounded.to(tl.int32, bitcast=True)
    code = tl.where(rounded < (113 << 23), steps, (rounded >> 17) - (112 << 6))
    return code | ((bits >> 20) & 0x800)


@no_type_check
@triton.jit
def _decode_e5m6(code):
    """The values of E5M6 codes, float32; infinities and NaN, which no backend makes, left out."""
    magnitude = code & 0x7FF
    lent = tl.where(magnitude < 64, 113 << 23, 112 << 23)
    value = ((magnitude << 17) + lent).to(tl.float32, bitcast=True)
    value -= tl.where(magnitude < 64, 0.00006103515625, 0.0)
    bits = value.to(tl.int32, bitcast=True) | ((code & 0x800) << 20)
    return bits.to(tl.float32, bitcast=True)

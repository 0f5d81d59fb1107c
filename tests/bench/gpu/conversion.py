"""The hardware's conversion of float32 to E4M3, over every float32 there is.

Ingot's kernels round by float arithmetic and pack through integers. Where the conversion gives the
same bits, it may take their place.
"""

from collections.abc import Iterator
from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8.format import E4M3_MAX
from tests.bench.gpu.rows import SKIPPED, Row, attempted
from tests.bench.gpu.setting import Setting

CHUNK = 2**27
"""Values at a time: 512 MiB of float32."""
BLOCK = 1024
BEYOND = 0x7E
"""The largest value's code, which saturation leaves for all that is larger."""


@no_type_check
@triton.jit
def convert(source, out, BLOCK: tl.constexpr):
    """E4M3 of float32, by the hardware's `cvt`."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(source + at).to(tl.float8e4nv))


def conversion_rows(setting: Setting) -> Iterator[Row]:
    """How many of all float32 come out with other bits, those to 448 and those beyond apart."""
    if not setting.on_cuda:
        yield Row("cvt", "triton", f"{SKIPPED}the conversion is the GPU's")
        return
    yield from attempted(setting, "cvt", "triton", _all)


def _all(setting: Setting) -> Iterator[Row]:
    within = beyond = nans = 0
    for first in range(-(2**31), 2**31, CHUNK):
        bits = torch.arange(first, first + CHUNK, dtype=torch.int64, device=setting.device)
        x = bits.to(torch.int32).view(torch.float32)
        del bits
        found = torch.empty_like(x, dtype=torch.float8_e4m3fn)
        convert[(CHUNK // BLOCK,)](x, found, BLOCK=BLOCK)
        counted = compared(x, found.view(torch.uint8))
        within, beyond, nans = (a + b for a, b in zip((within, beyond, nans), counted, strict=True))
    yield Row("cvt of every float32 to 448", "hardware", within, "differ", most=0)
    yield Row("cvt of every float32 beyond 448", "hardware", beyond, "are not 448")
    yield Row("cvt of every NaN", "hardware", nans, "are not NaN")


def compared(x: Tensor, code: Tensor) -> tuple[int, int, int]:
    """How many codes are not torch's, not the largest value's, and not NaN's, as they should be."""
    fits, nan = x.abs() <= E4M3_MAX, x.isnan()
    differ = code != x.to(torch.float8_e4m3fn).view(torch.uint8)
    largest = (code & 0x7F) == BEYOND
    return (
        int((differ & fits).sum()),
        int((~largest & ~fits & ~nan).sum()),
        int((((code & 0x7F) != 0x7F) & nan).sum()),
    )

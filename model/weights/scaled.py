"""Weights stored narrower than they are computed with: values times a scale for each block.

| layout | values | scales |
|---|---|---|
| FP8 of V3, V3.2 | E4M3 [R, C] | float32 [ceil(R / 128), ceil(C / 128)] |
| FP8 of V4 | E4M3 [R, C] | E8M0 [ceil(R / 128), ceil(C / 128)] |
| FP4 of V4's experts | int8 [R, H], two E2M1 codes each | E8M0 [R, ceil(C / 32)] |

A stored scale multiplies; blocks at the edge are cut short, not shifted. E8M0 is a power of two:
its byte is the exponent + 127.

Axes: R rows (outputs of a Linear), C columns (inputs), H = C / 2 bytes.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from configs.errors import ArtifactError
from model.fp8.backends import quantize
from model.fp8.format import TILE
from model.weights.table import ScaleType

FP4_TILE = (1, 32)
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""Values of the eight codes without the sign, which is the fourth bit."""
_SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def widen(name: str, values: Tensor, scales: Tensor, tile: tuple[int, int]) -> Float[Tensor, "R C"]:
    """The float32 weight that E4M3 values or packed E2M1 codes stand for.

    `tile` is the block of E4M3 values; FP4 has its own. ArtifactError names the scales if they are
    not one for each block, or not all finite.
    """
    if values.dim() != 2:
        raise ArtifactError(
            f"{name} has shape {list(values.shape)}, but only matrices are stored in blocks"
        )
    if values.dtype == torch.float8_e4m3fn:
        weight = values.float()
    else:
        weight, tile = unpack(values), FP4_TILE
    grid = tuple(-(-size // block) for size, block in zip(weight.shape, tile, strict=True))
    if tuple(scales.shape) != grid:
        raise ArtifactError(
            f"the scales of {name} have shape {list(scales.shape)}, but a weight of "
            f"{list(weight.shape)} in blocks of {tile[0]} x {tile[1]} has {list(grid)}"
        )
    factors = _as_float(name, scales)
    rows, columns = weight.shape
    spread = factors.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)
    return weight.mul_(spread[:, :columns])


def unpack(packed: Tensor) -> Float[Tensor, "R C"]:
    """Two E2M1 values from each byte [R, H]: the low bits are the even column."""
    codes_RH = packed.view(torch.uint8).int()
    codes_RC = torch.stack([codes_RH & 15, codes_RH >> 4], dim=-1).flatten(-2)
    values = torch.tensor([*E2M1, *(-value for value in E2M1)])
    return values[codes_RC]


def narrow(weight: Float[Tensor, "R C"], scales: ScaleType) -> tuple[Tensor, Tensor]:
    """E4M3 values and scales of a weight in blocks of 128 x 128."""
    quantized = quantize(weight, (TILE, TILE), power_of_two=scales != "float32")
    if scales == "e8m0":
        return quantized.values, quantized.scales.to(torch.float8_e8m0fnu)
    return quantized.values, quantized.scales


def _as_float(name: str, scales: Tensor) -> Float[Tensor, "..."]:
    """Float32 scales; whole bytes are E8M0 codes that another library wrote."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        factors = scales.view(torch.uint8).view(torch.float8_e8m0fnu).float()
    elif scales.dtype in _SCALE_TYPES:
        factors = scales.float()
    else:
        raise ArtifactError(
            f"the scales of {name} are stored as {scales.dtype}; expected float32 or E8M0"
        )
    if not factors.isfinite().all():
        raise ArtifactError(f"the scales of {name} are not all finite")
    return factors

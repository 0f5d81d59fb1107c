"""Weights stored narrower than they are computed with: values times a scale for each block.

| layout | values | scales | beside `X.weight` |
|---|---|---|---|
| FP8 of V3, V3.2 | E4M3 [R, C] | float32 [ceil(R / 128), ceil(C / 128)] | `X.weight_scale_inv` |
| FP8 of V4 | E4M3 [R, C] | float32 or E8M0 [ceil(R / 128), ceil(C / 128)] | `X.scale` |
| FP8 of a matrix | E4M3 [R, C] | float32 [], [1] | these, or `X.weight_scale` |
| FP4 of V4's experts | int8 [R, H], two E2M1 codes each | E8M0 [R, ceil(C / 32)] | `X.scale` |
| W8A8_DYNAMIC of ModelSlim | int8 [R, C] | float32 [R, 1] or [R] | `X.weight_scale` |
| W4A8_DYNAMIC | int8 [R / 2, C], two rows a byte | float32 [R, 1] or [R] | `X.weight_scale` |
| W8A8 | int8 [R, C] | float32 [R] / float32 [1] | `X.deq_scale` / `X.input_scale` |

A stored scale multiplies; blocks at the edge are cut short, not shifted. E8M0 is a power of two:
its byte is the exponent + 127. ModelSlim's scales of rows come with offsets in the same shape,
`X.weight_offset`, which are subtracted before. Both names of scales in blocks are read in every
family. Packed FP4 and integers are all bytes; the tensors beside them tell them apart, and those
that say how activations are quantised are passed over.

Axes: R rows (outputs of a Linear), C columns (inputs), H = C / 2 bytes.
"""

from collections.abc import Collection, Sequence

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
FP8, INT8, UINT8 = "F8_E4M3", "I8", "U8"
"""What safetensors calls the types of quantised values."""
READABLE = "float32, bfloat16, float16, FP8 (E4M3), packed FP4, and ModelSlim's W8A8 and W4A8"
"""Of each tensor, for messages."""
STATIC = ("deq_scale", "input_scale", "input_offset", "quant_bias")
"""Beside a weight whose activations have one scale; the first two say what the weight is."""
_SCALE_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def scales_of(name: str, kind: str, stored: Collection[str]) -> tuple[str, ...]:
    """Which of the names `stored` say what the weight `name` of the safetensors type `kind` means.

    `widen` or, of more than one, `widen_integers` takes them in this order. ArtifactError names
    those that are missing, or that cannot belong to one weight.
    """
    stem = f"{name.removesuffix('.weight')}."
    in_blocks = (f"{name}_scale_inv", f"{stem}scale")
    of_rows = (f"{name}_scale", f"{name}_offset")
    choices: list[tuple[str, ...]] = [(one,) for one in in_blocks]
    if kind == FP8:
        choices.append(of_rows[:1])
    if kind == INT8:
        packed = f"{stem}scale_bias"
        choices.append((*of_rows, packed) if packed in stored else of_rows)
        choices.append(tuple(f"{stem}{leaf}" for leaf in STATIC))
    there = {names: [one for one in names if one in stored] for names in choices}
    begun = [names for names, found in there.items() if found]
    if not begun:
        known = ", ".join(" with ".join(names) for names in choices)
        raise ArtifactError(
            f"{name} is stored as {kind}, but its scales are missing: there is none of {known}; "
            f"complete the files, or take weights in a form that is read: {READABLE}"
        )
    if len(begun) > 1:
        first, second = (there[names][0] for names in begun[:2])
        raise ArtifactError(
            f"{name} has both {first} and {second} beside it, which scale it in two ways; take "
            "away the one that does not belong to it"
        )
    if absent := [one for one in begun[0] if one not in stored]:
        raise ArtifactError(
            f"{absent[0]} is missing, but {name} is stored as {kind} with {there[begun[0]][0]}; "
            "complete the files"
        )
    return begun[0]


def widen(
    name: str, values: Tensor, scales: Tensor, tile: tuple[int, int] | None
) -> Float[Tensor, "R C"]:
    """The float32 weight that E4M3 values or packed E2M1 codes stand for.

    `tile` is the block of E4M3 values, none if it is the whole matrix; FP4 has its own. One scale
    without axes is the matrix's, whatever the block. ArtifactError names the scales if they are not
    one for each block, or not all finite.
    """
    _check_matrix(name, values)
    factors = _as_float(f"the scales of {name}", scales)
    if values.dtype == torch.float8_e4m3fn:
        weight = values.float()
        if tuple(factors.shape) in ((), (1,)):
            return weight.mul_(factors)
        tile = tile or (weight.shape[0], weight.shape[1])
    else:
        weight, tile = unpack(values), FP4_TILE
    grid = tuple(-(-size // block) for size, block in zip(weight.shape, tile, strict=True))
    if tuple(factors.shape) != grid:
        raise ArtifactError(
            f"the scales of {name} have shape {list(scales.shape)}, but a weight of "
            f"{list(weight.shape)} in blocks of {tile[0]} x {tile[1]} has {list(grid)}; correct "
            "quantization_config.weight_block_size, or take the scales that belong to the weight"
        )
    rows, columns = weight.shape
    spread = factors.repeat_interleave(tile[0], 0)[:rows].repeat_interleave(tile[1], 1)
    return weight.mul_(spread[:, :columns])


def widen_integers(
    name: str, values: Tensor, names: Sequence[str], beside: Sequence[Tensor]
) -> Float[Tensor, "R C"]:
    """The float32 weight that ModelSlim's integers stand for, row by row.

    `names` are those that `scales_of` gave, and `beside` their tensors: (values - offset) * scale
    of rows, of unpacked values where there is a `scale_bias`; or values * deq_scale / input_scale.
    ArtifactError names a tensor that is misshapen, or not finite.
    """
    _check_matrix(name, values)
    if len(names) == 3:
        values = torch.stack([(values << 4) >> 4, values >> 4], 1).flatten(0, 1)
    if names[0].endswith(STATIC[0]):
        rows = _column(name, values, names[0], beside[0])
        inputs = _as_float(f"the values of {names[1]}", beside[1])
        if inputs.numel() != 1 or float(inputs) == 0:
            raise ArtifactError(
                f"{names[1]} has shape {list(inputs.shape)} and values {inputs.tolist()[:2]}, but "
                f"{name} needs one scale that is not 0; take the one that belongs to the weight"
            )
        return values.float().mul_(rows / inputs)
    scales, offsets = (_column(name, values, names[at], beside[at]) for at in (0, 1))
    return values.float().sub_(offsets).mul_(scales)


def _column(name: str, values: Tensor, which: str, given: Tensor) -> Float[Tensor, "R 1"]:
    """One number for each row of `values`, as float32; `int64` holds the bits of float32."""
    rows = values.shape[0]
    if tuple(given.shape) not in ((rows, 1), (rows,)):
        raise ArtifactError(
            f"{which} has shape {list(given.shape)}, but {name} of {list(values.shape)} needs "
            f"one for each row, [{rows}, 1]; take the one that belongs to the weight"
        )
    if given.dtype == torch.int64 and which.endswith(STATIC[0]):
        given = given.to(torch.int32).view(torch.float32)
    if given.dtype not in _SCALE_TYPES:
        raise ArtifactError(
            f"{which} is stored as {given.dtype}, but float32 is expected; take the one that "
            "belongs to the weight"
        )
    return _as_float(f"the values of {which}", given).reshape(rows, 1)


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


def _check_matrix(name: str, values: Tensor) -> None:
    if values.dim() != 2:
        raise ArtifactError(
            f"{name} has shape {list(values.shape)}, but only matrices are stored with scales; "
            "take the files that belong together"
        )


def _as_float(which: str, scales: Tensor) -> Float[Tensor, "..."]:
    """Float32 scales; whole bytes are E8M0 codes that another library wrote."""
    if scales.dtype in (torch.uint8, torch.float8_e8m0fnu):
        factors = scales.view(torch.uint8).view(torch.float8_e8m0fnu).float()
    elif scales.dtype in _SCALE_TYPES:
        factors = scales.float()
    else:
        raise ArtifactError(
            f"{which} are stored as {scales.dtype}, but float32 or E8M0 is expected; take weights "
            "whose scales are"
        )
    if not factors.isfinite().all():
        raise ArtifactError(
            f"{which} are not all finite; the file is damaged, so take another copy"
        )
    return factors

"""Reading `quantization_config`: how many values of an FP8 weight share a scale.

Read is what transformers takes for its fine-grained FP8 (`FineGrainedFP8Config`), and what servers
do. Everything else in such a table says how to compute, or which modules are left alone; the
stored types of the tensors themselves say that here.

| `weight_block_size` | a scale for each |
|---|---|
| absent | block of 128 x 128; of 1 x 32 in `mxfp8` |
| [n, m] | block of n x m |
| n | block of n x n |
| null | matrix |
"""

from collections.abc import Mapping
from typing import Any

from configs.errors import ArtifactError
from configs.shape import FP8_BLOCK
from model.weights.fields import read_table

Tile = tuple[int, int]
_TILES: Mapping[str, Tile] = {"fp8": (FP8_BLOCK, FP8_BLOCK), "mxfp8": (1, 32)}
"""Schemes that are read, with the block that each means if it names none."""
_DECIDING: Mapping[str, tuple[str, ...]] = {
    "fmt": ("e4m3", "e4m3fn", "float8_e4m3fn"),
    "scale_fmt": ("float", "ue8m0"),
    "expert_dtype": ("fp8", "fp4"),
}
"""Fields that say what the stored bytes mean, and the values of each that are read."""
_SILENT = frozenset(
    {
        *("activation_scheme", "dequantize", "ignored_layers", "modules_to_convert"),
        *("modules_to_not_convert", "weight_block_size", *_DECIDING),
    }
)
"""What a table without a `quant_method` may hold and still be one of FP8."""
_TABLE = "quantization_config"
_REMEDY = (
    "let transformers widen the weights first (from_pretrained, dequantize, save_pretrained) and "
    "take the folder that it writes"
)


def read_tile(raw: Mapping[str, Any]) -> Tile | None:
    """The block of an FP8 weight that shares a scale; none if it is the whole matrix.

    ArtifactError names the field of a scheme that is not read.
    """
    scheme = read_table(raw, _TABLE)
    method = _method(scheme)
    for name, known in _DECIDING.items():
        value = scheme.get(name)
        if value is not None and str(value).lower() not in known:
            raise ArtifactError(
                f"config.json: {_TABLE}.{name} = {value!r}, but only {' and '.join(known)} are "
                f"read; {_REMEDY}"
            )
    if "weight_block_size" not in scheme:
        return _TILES[method]
    return _tile(scheme["weight_block_size"])


def _method(scheme: Mapping[str, Any]) -> str:
    """The scheme's name; a table that could be of FP8 alone need not have one."""
    for flag in ("load_in_4bit", "load_in_8bit"):
        if scheme.get(flag):
            raise ArtifactError(
                f"config.json: {_TABLE}.{flag} = {scheme[flag]!r}, which is bitsandbytes, but only "
                f"{' and '.join(_TILES)} are read; {_REMEDY}"
            )
    method = scheme.get("quant_method")
    if method is not None:
        if str(method).lower() not in _TILES:
            raise ArtifactError(
                f"config.json: {_TABLE}.quant_method = {method!r}, but only "
                f"{' and '.join(_TILES)} are read; {_REMEDY}"
            )
        return str(method).lower()
    if strange := sorted(scheme.keys() - _SILENT - {"quant_method"}):
        raise ArtifactError(
            f"config.json: {_TABLE} has {strange[0]} = {scheme[strange[0]]!r} and no quant_method; "
            f"add quant_method = 'fp8' if it is that, or else {_REMEDY}"
        )
    return "fp8"


def _tile(given: Any) -> Tile | None:
    if given is None:
        return None
    sizes = given if isinstance(given, list | tuple) else (given, given)
    if len(sizes) != 2 or not all(type(size) is int and size > 0 for size in sizes):
        raise ArtifactError(
            f"config.json: {_TABLE}.weight_block_size = {given!r}, expected two numbers, one, or "
            "null; give the block that shares a scale, rows first"
        )
    return sizes[0], sizes[1]

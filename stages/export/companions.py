"""What lies beside a quantised weight, by its scheme: the leaves of the names, and their shapes.

| scheme | beside `weight` of R outputs and C inputs |
|---|---|
| FP8 in blocks | `weight_scale_inv` or `scale` [ceil(R / 128), ceil(C / 128)] |
| FP4 in groups | `scale` [R, ceil(C / 32)] |
| W8A8_DYNAMIC | `weight_scale`, `weight_offset` [R, 1] |
| W4A8_DYNAMIC | the same, and `scale_bias` [R, 1] or [R, 16] |
| W8A8 | `deq_scale`, `quant_bias` [R], `input_scale`, `input_offset` [1] |
"""

from collections.abc import Callable, Mapping

from configs.shape import FP8_BLOCK
from stages.export.layouts import CHUNKS

Shape = tuple[int, ...]
_Shapes = Callable[[int, int], tuple[Shape, ...]]
_GROUP = 32


def _blocks(rows: int, columns: int) -> tuple[Shape, ...]:
    return ((-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK)),)


def _blocks_or_groups(rows: int, columns: int) -> tuple[Shape, ...]:
    return (*_blocks(rows, columns), (rows, -(-columns // _GROUP)))


def _column(rows: int, _: int) -> tuple[Shape, ...]:
    return ((rows, 1),)


def _chunks(rows: int, _: int) -> tuple[Shape, ...]:
    return (rows, 1), (rows, CHUNKS)


def _each(rows: int, _: int) -> tuple[Shape, ...]:
    return ((rows,),)


def _one(_: int, __: int) -> tuple[Shape, ...]:
    return ((1,),)


_ROWS: Mapping[str, _Shapes] = {"weight_scale": _column, "weight_offset": _column}
OF_INTEGERS: Mapping[str, Mapping[str, _Shapes]] = {
    "W8A8_DYNAMIC": _ROWS,
    "W4A8_DYNAMIC": {**_ROWS, "scale_bias": _chunks},
    "W8A8": {"deq_scale": _each, "quant_bias": _each, "input_scale": _one, "input_offset": _one},
}
"""By ModelSlim's types, those that 910B and 910C compute."""
SETS: tuple[Mapping[str, _Shapes], ...] = (
    {"weight_scale_inv": _blocks},
    {"scale": _blocks_or_groups},
    *OF_INTEGERS.values(),
)
"""One of these must lie beside a quantised weight, whole."""
BESIDE = frozenset(leaf for leaves in SETS for leaf in leaves)
"""Leaves that belong to a quantised weight and to no other module."""


def fault(found: Mapping[str, Shape], rows: int, columns: int) -> str | None:
    """What is wrong with the leaves `found` beside a weight of so many rows and columns."""
    whole = next((leaves for leaves in SETS if leaves.keys() == found.keys()), None)
    if whole is None:
        known = "; ".join(", ".join(leaves) for leaves in SETS)
        there = ", ".join(sorted(found)) or "nothing"
        return f"{there} lies beside it, which must be one of: {known}"
    for leaf, shapes in whole.items():
        wanted = shapes(rows, columns)
        if found[leaf] not in wanted:
            told = " or ".join(str(list(shape)) for shape in wanted)
            return f"{leaf} has shape {list(found[leaf])}, but must have {told}"
    return None

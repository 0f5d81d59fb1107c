"""Which layouts a model cannot have, by its sizes alone. Loads no torch: planning asks too."""

from collections.abc import Iterator

from configs.delivery import ExportConfig, Target
from configs.model import ModelConfig, V4Config

CHUNKS = 16
"""Parts of the inputs that `scale_bias` of a down projection is summed over: its columns are
divided over so many devices at most."""
PACKED_ROWS = 8
"""A server views outputs of packed int4, two a byte, as int32 (vllm_ascend methods/w4a8.py)."""
SMALLEST_TURN = 32
"""Channels that rotation spreads one over: as many as in ModelSlim's recipe for V4."""


def misfit(model: ModelConfig, config: ExportConfig, target: Target) -> str | None:
    """Why a bundle for `target` cannot be made as asked, with the remedy; none if it can."""
    return next(_misfits(model, config, target), None)


def turn_width(width: int) -> int:
    """Channels of a block that rotation turns: the largest power of two that divides `width`."""
    return width & -width


def _misfits(model: ModelConfig, config: ExportConfig, target: Target) -> Iterator[str]:
    inner, width = model.moe_intermediate_size, model.hidden_size
    is_v4 = isinstance(model, V4Config)
    sizes = f"moe_intermediate_size = {inner} and hidden_size = {width}"
    if target == "cuda":
        if "fp4" in config.variants and not is_v4:
            yield (
                f"export.variants asks for fp4, but the model is of family {model.family}: servers "
                "read experts in FP4 of V4 alone; leave fp4 out"
            )
        if "fp4" in config.variants and (inner % 2 or width % 2):
            yield (
                f"export.variants asks for fp4, but of this model {sizes}: two values share a "
                "byte; leave fp4 out, or train a model of even sizes"
            )
        if config.fp8_scales == "float32" and is_v4 and "fp8" in config.variants:
            yield (
                'export.fp8_scales = "float32", but V4 has powers of two for its scales, as its '
                'released models do; leave it out, or set "ue8m0"'
            )
        return
    if "w4a8" in config.variants and (inner % CHUNKS or width % PACKED_ROWS):
        yield (
            f"export.variants asks for w4a8, but of this model {sizes}: the first must be a "
            f"multiple of {CHUNKS} and the second of {PACKED_ROWS}; leave w4a8 out, or train a "
            "model of other sizes"
        )
    if config.rotate and {"w8a8", "w4a8"} & set(config.variants):
        if model.engram is not None:
            yield (
                "export.rotate = true, but the model has a memory (engram), which reads the "
                "residual streams too; leave rotate out"
            )
        if turn_width(width) < SMALLEST_TURN:
            yield (
                f"export.rotate = true, but hidden_size = {width}, of which {turn_width(width)} "
                f"channels at a time can be turned and {SMALLEST_TURN} are wanted; leave rotate "
                "out, or train a model of another width"
            )

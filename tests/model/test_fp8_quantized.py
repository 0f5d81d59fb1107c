"""Quantised tensors on their way through a backward pass."""

from functools import partial

import torch
from torch import Tensor

from model.fp8.cpu import cpu_backend
from model.fp8.groups import Groups
from model.fp8.quantized import (
    ACTIVATION,
    ALONG_TOKENS,
    BLOCK,
    Quantized,
    QuantizedE5M6,
    Saved,
    from_tensors,
    to_tensors,
)
from model.fp8.reference import Reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_what_is_saved_comes_back_without_its_float32_form() -> None:
    cpu = cpu_backend()[0]
    x, w = random(200, 300), random(3, 130, 300, seed=1)
    saved: list[Saved] = [
        cpu.quantize(x, ACTIVATION),
        cpu.quantize_e5m6(random(7, 133, seed=2)),
        cpu.quantize(x, ALONG_TOKENS, groups=Groups.of((70, 0, 130))),
        cpu.quantize(w, BLOCK),
    ]
    tensors, layouts = to_tensors(saved)
    assert len(tensors) == 2 * len(layouts) == 8
    for before, after in zip(saved, from_tensors(tensors, layouts), strict=True):
        assert type(after) is type(before)
        for one, other in zip(before.tensors, after.tensors, strict=True):
            assert one is other
        if isinstance(before, Quantized):
            assert isinstance(after, Quantized)
            assert before.float32 is not None
            assert after.float32 is None
            assert (after.tile, after.groups) == (before.tile, before.groups)
            read = Reference().dequantize(after)
            assert torch.equal(read, before.float32)
        else:
            assert isinstance(after, QuantizedE5M6)
            assert after.columns == before.columns == 133


def test_a_layout_keeps_no_tensor_alive() -> None:
    """Or what autograd frees after a backward pass would stay as long as its graph."""
    _, layouts = to_tensors([cpu_backend()[0].quantize(random(5, 8), ACTIVATION)])
    (layout,) = layouts
    assert isinstance(layout, partial)
    kept = {"tile": ACTIVATION, "groups": None, "padded": False}
    assert (layout.args, layout.keywords) == ((), kept)

"""Experts by offsets on the device, beside the experts one by one on the host in float64."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from model.dispatch import Dispatched
from model.grouped import swiglu_by_offsets
from model.swiglu import grouped_swiglu
from tests.bench.gpu.rows import Row, attempted
from tests.bench.gpu.setting import Setting

COUNTS = {
    "aligned": (64, 64, 128, 64),
    "ragged": (5, 130, 1, 77),
    "with empty groups": (0, 57, 0, 0, 3, 0),
    "all of one": (0, 60, 0),
}
CLOSE = {torch.float32: 1e-5, torch.bfloat16: 2**-6}
"""Of the largest value: sums of some hundred terms, or four roundings to 8 bits in a row."""
NAMES = ("results", "gradient of rows", "of gate and up", "of down", "of gates")

Compute = Callable[[Dispatched, Tensor, Tensor, float | None], Tensor]


def expert_rows(setting: Setting) -> Iterator[Row]:
    """Results and gradients in either type, for each way in which rows fall."""
    for dtype in CLOSE:
        by = f"grouped_mm, {str(dtype).removeprefix('torch.')}"
        for kind, counts in COUNTS.items():
            what = f"experts by offsets, {kind}"
            yield from attempted(setting, what, by, _beside_the_twin, what, by, counts, dtype)


def _beside_the_twin(
    setting: Setting, what: str, by: str, counts: tuple[int, ...], dtype: torch.dtype
) -> Iterator[Row]:
    width, inner = setting.pick((512, 256), (32, 16))
    leaves = _leaves(counts, width, inner, dtype)
    found = _run(swiglu_by_offsets, counts, [x.to(setting.device) for x in leaves])
    wanted = _run(grouped_swiglu, counts, [x.double() for x in leaves])
    gaps = {
        name: float((one.cpu().double() - other).abs().max() / other.abs().max().clamp_min(1e-30))
        for name, one, other in zip(NAMES, found, wanted, strict=True)
    }
    idle = [expert for expert, count in enumerate(counts) if count == 0]
    left = sum(bool(gradient[idle].any()) for gradient in found[2:4]) if idle else 0
    yield Row(what, by, max(gaps.values()), "of the largest", most=CLOSE[dtype], more=gaps)
    if idle:
        yield Row(f"{what}: gradients without rows", by, left, "are not zero", most=0)


def _leaves(counts: tuple[int, ...], width: int, inner: int, dtype: torch.dtype) -> list[Tensor]:
    """Rows, gate and up, down, gates, and the slope of the results; sums of size 1."""
    rows, experts = max(1, sum(counts) // 2), len(counts)
    shapes = [
        (rows, width),
        (experts, 2 * inner, width),
        (experts, width, inner),
        (sum(counts),),
        (rows, width),
    ]
    generator = torch.Generator().manual_seed(0)
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    return [
        (x / x.shape[-1] ** 0.5 if x.dim() == 3 else x).to(dtype).requires_grad_() for x in drawn
    ]


def _run(compute: Compute, counts: tuple[int, ...], leaves: list[Tensor]) -> list[Tensor]:
    *learnt, slope = (leaf.detach().requires_grad_() for leaf in leaves)
    x_RD, gate_up, down, gates_N = learnt
    generator = torch.Generator().manual_seed(1)
    rows_N = torch.randint(len(x_RD), (sum(counts),), generator=generator).to(x_RD.device)
    counts_E = torch.tensor(counts, device=x_RD.device)
    y_RD = compute(Dispatched(x_RD, rows_N, counts_E, gates_N), gate_up, down, None)
    return [y_RD.detach(), *torch.autograd.grad(y_RD, learnt, slope.detach())]

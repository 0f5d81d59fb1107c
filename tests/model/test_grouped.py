"""Grouped FP8 GEMMs against one FP8 Linear for each expert."""

import pytest
import torch
from torch import Tensor

from model.fp8.grouped import grouped_linear
from model.fp8.linear import Linear

COUNTS = [[4], [0, 5, 130, 0, 257, 1], [128, 128], [0, 0, 3], [0, 0]]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(
    x: Tensor, weight: Tensor, dy: Tensor, counts: list[int], halves: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) from a Linear of its own for each expert, and for each half of it."""
    ys, dxs, dws = [], [], []
    for expert, (part, part_dy) in enumerate(zip(x.split(counts), dy.split(counts), strict=True)):
        for half, half_dy in zip(
            weight[expert].chunk(halves), part_dy.chunk(halves, 1), strict=True
        ):
            linear = Linear(*reversed(half.shape), precision="fp8")
            linear.weight = torch.nn.Parameter(half.clone())
            leaf = part.clone().requires_grad_()
            if len(part):
                y = linear(leaf)
                y.backward(half_dy)
                ys.append(y.detach())
                dxs.append(leaf.grad)
                dws.append(linear.weight.grad)
            else:
                ys.append(part.new_zeros(0, len(half)))
                dxs.append(part)
                dws.append(torch.zeros_like(half))
    experts = range(0, len(counts) * halves, halves)
    y = torch.cat([torch.cat(ys[i : i + halves], 1) for i in experts])
    dx = torch.cat([torch.stack(dxs[i : i + halves]).sum(0) for i in experts])
    dw = torch.stack([torch.cat(dws[i : i + halves]) for i in experts])
    return y, dx, dw


@pytest.mark.parametrize("halves", [1, 2])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_expert_computes_as_if_alone(counts: list[int], halves: int) -> None:
    # 2 x 96 outputs: a block of 128 would straddle the halves if they were quantised as one.
    weight = random(len(counts), 192, 136).requires_grad_()
    with torch.no_grad():
        weight[:, :96] *= 50
    x = random(sum(counts), 136, seed=1).requires_grad_()
    dy = random(sum(counts), 192, seed=2)
    y = grouped_linear(x, weight, torch.tensor(counts), halves=halves)
    y.backward(dy)
    expected = one_by_one(x.detach(), weight.detach(), dy, counts, halves)
    for found, reference in zip((y.detach(), x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=2e-3)


def test_halves_that_differ_in_size_keep_their_own_scales() -> None:
    """Quantised as one, the small half would lose most of its bits."""
    weight = random(1, 16, 16)
    weight[:, :8] *= 1e6
    x, counts = random(4, 16, seed=1), torch.tensor([4])
    exact = (x @ weight[0].T)[:, 8:]
    apart = grouped_linear(x, weight, counts, halves=2)[:, 8:]
    as_one = grouped_linear(x, weight, counts, halves=1)[:, 8:]
    assert float((apart - exact).abs().max()) < 0.6
    assert float((as_one - exact).abs().max()) > 2

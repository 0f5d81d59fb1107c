"""Grouped FP8 GEMMs against one FP8 Linear for each expert."""

import pytest
import torch
from torch import Tensor

from configs.train import Fp8Config
from model.fp8.grouped import fp8_grouped_linear
from model.fp8.groups import Groups
from model.fp8.linear import Linear
from model.fp8.scheme import Fp8
from tests.memory import saved_tensors

COUNTS = [[4], [0, 5, 130, 0, 257, 1], [128, 128], [0, 0, 3], [0, 0]]
SCHEMES = {
    "cpu": Fp8("attention"),
    "reference": Fp8("attention", backend_name="reference"),
    "e5m6": Fp8("attention", saves_e5m6=True),
    "block": Fp8("attention", Fp8Config(gradient_scaling="block")),
    "fp4": Fp8("routed_experts", Fp8Config(fp4_experts=True)),
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def one_by_one(
    x: Tensor, weight: Tensor, dy: Tensor, counts: list[int], scheme: Fp8
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, dx, dw) from a Linear of its own for each expert."""
    ys, dxs, dws = [], [], []
    for one, part, part_dy in zip(weight, x.split(counts), dy.split(counts), strict=True):
        linear = Linear(one.shape[1], one.shape[0], scheme)
        linear.weight = torch.nn.Parameter(one.clone())
        leaf = part.clone().requires_grad_()
        y = linear(leaf)
        y.backward(part_dy)
        assert leaf.grad is not None
        assert linear.weight.grad is not None
        ys.append(y.detach())
        dxs.append(leaf.grad)
        dws.append(linear.weight.grad)
    return torch.cat(ys), torch.cat(dxs), torch.stack(dws)


@pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_expert_computes_as_if_alone(counts: list[int], scheme: Fp8) -> None:
    weight = random(len(counts), 192, 136)
    weight *= torch.logspace(-2, 2, len(counts))[:, None, None]
    weight.requires_grad_()
    x = random(sum(counts), 136, seed=1).requires_grad_()
    dy = random(sum(counts), 192, seed=2)
    y = fp8_grouped_linear(x, weight.flatten(0, 1), Groups.of(counts), scheme)
    y.backward(dy)
    expected = one_by_one(x.detach(), weight.detach(), dy, counts, scheme)
    for found, reference in zip((y.detach(), x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(found, reference, rtol=1e-4, atol=2e-3)


def test_experts_that_differ_in_size_keep_their_own_scales() -> None:
    """Quantised as one along the tokens, the small expert's rows would lose most of their bits."""
    x, dy = random(8, 16, seed=1), random(8, 16, seed=2)
    x[:4] *= 1e6
    weight = random(2, 16, 16).requires_grad_()
    fp8_grouped_linear(x, weight.flatten(0, 1), Groups.of([4, 4]), Fp8("routed_experts")).backward(
        dy
    )
    assert weight.grad is not None
    exact = dy[4:].T @ x[4:]
    assert float((weight.grad[1] - exact).norm() / exact.norm()) < 0.1
    together = random(1, 16, 16).requires_grad_()
    fp8_grouped_linear(x, together.flatten(0, 1), Groups.of([8]), Fp8("routed_experts")).backward(
        dy
    )
    assert together.grad is not None
    large = dy[:4].T @ x[:4]
    assert float((together.grad[0] - large - exact).norm() / exact.norm()) > 1


def test_without_gradients_nothing_is_saved() -> None:
    x, weight = random(7, 16), random(2, 8, 16).requires_grad_()
    with saved_tensors() as saved:
        with torch.no_grad():
            fp8_grouped_linear(x, weight.flatten(0, 1), Groups.of([3, 4]), Fp8("attention"))
        assert saved == []
        fp8_grouped_linear(x, weight.flatten(0, 1), Groups.of([3, 4]), Fp8("attention"))
    sizes = sorted((t.element_size(), t.numel()) for t in saved)
    assert sizes == [(1, 7 * 16), (1, 2 * 8 * 16), (4, 2), (4, 7)]

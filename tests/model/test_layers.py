"""Norm, feed-forward and initial values against their formulas."""

import torch

from model.layers import RMSNorm, SwiGLU, seeded_normal
from tests.references import swiglu


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    norm = RMSNorm(24, epsilon=0.1)
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(norm.weight, generator=generator)
    x = torch.randn(3, 5, 24, generator=generator)
    root = (x.double().square().mean(-1, keepdim=True) + 0.1).sqrt()
    expected = x.double() / root * norm.weight.double()
    torch.testing.assert_close(norm(x).double(), expected, rtol=1e-5, atol=1e-6)


def test_the_gradients_of_rms_norm_are_those_of_autograd() -> None:
    norm = RMSNorm(24, epsilon=0.1).double()
    generator = torch.Generator().manual_seed(0)
    torch.nn.init.normal_(norm.weight, generator=generator)
    # Means far from 0: a layer norm would take them away.
    x = torch.randn(3, 24, 5, generator=generator, dtype=torch.float64) + 2
    x = x.transpose(1, 2).requires_grad_()
    dy = torch.randn(3, 5, 24, generator=generator, dtype=torch.float64)
    root = (x.square().mean(-1, keepdim=True) + 0.1).sqrt()
    leaves = [x, norm.weight]
    expected = torch.autograd.grad(x / root * norm.weight, leaves, dy)
    torch.testing.assert_close(torch.autograd.grad(norm(x), leaves, dy), expected)
    with torch.no_grad():
        torch.testing.assert_close(norm(x), x / root * norm.weight)


def test_the_feed_forward_is_swiglu() -> None:
    block = SwiGLU(12, 20, None)
    generator = torch.Generator().manual_seed(0)
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    x = torch.randn(2, 3, 12, generator=generator)
    weights = [p.weight for p in (block.gate_proj, block.up_proj, block.down_proj)]
    torch.testing.assert_close(block(x), swiglu(x, *weights))


def test_initial_values_depend_on_seed_and_name_alone() -> None:
    first = seeded_normal((50, 80), 0.3, 7, "a", 1)
    seeded_normal((9,), 1.0, 7, "b")
    torch.manual_seed(99)
    assert torch.equal(seeded_normal((50, 80), 0.3, 7, "a", 1), first)
    others = [(8, "a", 1), (7, "a", 2), (7, "b", 1)]
    assert not any(torch.equal(seeded_normal((50, 80), 0.3, *name), first) for name in others)
    assert abs(float(first.std()) - 0.3) < 0.01
    assert abs(float(first.mean())) < 0.02

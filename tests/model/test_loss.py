"""The fused head and cross-entropy against torch's own, in float64."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import loss as module
from model.loss import UNSCORED, linear_cross_entropy
from tests.memory import largest_allocation, saved_tensors


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def expected(x: Tensor, head: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(x @ head.T, targets, reduction="sum", ignore_index=UNSCORED)


def draw_targets(rows: int, vocabulary: int) -> Tensor:
    """Every third row unscored."""
    generator = torch.Generator().manual_seed(7)
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    targets[::3] = UNSCORED
    return targets


@pytest.mark.parametrize("rows", [0, 1, 7, 8, 20])
def test_loss_and_gradients_are_those_of_cross_entropy(
    monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(module, "CHUNK_ROWS", 4)
    x, head, targets = normal(rows, 6, seed=0), normal(11, 6, seed=1), draw_targets(rows, 11)
    found, reference = linear_cross_entropy(x, head, targets), expected(x, head, targets)
    torch.testing.assert_close(found, reference)
    # What comes after the loss scales its gradients.
    grads = [torch.autograd.grad(3.5 * y, (x, head)) for y in (found, reference)]
    torch.testing.assert_close(*grads)


def test_float32_loses_no_more_than_rounding() -> None:
    x, head = (normal(*shape, seed=i) for i, shape in enumerate([(600, 64), (1000, 64)]))
    targets = draw_targets(600, 1000)
    reference = expected(x, head, targets)
    exact = torch.autograd.grad(reference, (x, head))
    narrow = [tensor.detach().float().requires_grad_() for tensor in (x, head)]
    found = linear_cross_entropy(narrow[0], narrow[1], targets)
    assert found.dtype == torch.float32
    # Losses are some hundreds of sums of 1000 terms: a few units in the last of 24 bits.
    torch.testing.assert_close(found.double(), reference, rtol=1e-6, atol=0)
    for slope, true in zip(torch.autograd.grad(found, narrow), exact, strict=True):
        assert float((slope - true).norm() / true.norm()) < 1e-6


def test_bfloat16_inputs_are_multiplied_and_summed_in_float32() -> None:
    x, head = (normal(*shape, seed=i) for i, shape in enumerate([(50, 32), (40, 32)]))
    rounded = [tensor.detach().bfloat16().requires_grad_() for tensor in (x, head)]
    targets = draw_targets(50, 40)
    found = linear_cross_entropy(rounded[0], rounded[1], targets)
    reference = expected(rounded[0].double(), rounded[1].double(), targets)
    torch.testing.assert_close(found.double(), reference, rtol=1e-6, atol=0)
    exact = torch.autograd.grad(reference, rounded)
    for slope, true in zip(torch.autograd.grad(found, rounded), exact, strict=True):
        assert slope.dtype == torch.bfloat16
        torch.testing.assert_close(slope, true)


def test_hopeless_targets_have_a_finite_loss() -> None:
    """A probability of 1e-400 is no float at all, but its logarithm is."""
    x = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    head = torch.tensor([[900.0], [0.0]], requires_grad=True)
    loss = linear_cross_entropy(x, head, torch.tensor([1, 0]))
    torch.testing.assert_close(loss, torch.tensor(1800.0))
    d_x, d_head = torch.autograd.grad(loss, (x, head))
    torch.testing.assert_close(d_x, torch.tensor([[900.0], [-900.0]]))
    torch.testing.assert_close(d_head, torch.tensor([[2.0], [-2.0]]))


def test_a_second_derivative_is_refused_rather_than_wrong() -> None:
    x, head, targets = normal(5, 6, seed=0), normal(11, 6, seed=1), draw_targets(5, 11)
    loss = linear_cross_entropy(x, head, targets)
    (slope,) = torch.autograd.grad(loss.square(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slope.sum().backward()


def test_no_logits_are_kept() -> None:
    x, head = normal(50, 6, seed=0), normal(40, 6, seed=1)
    with saved_tensors() as kept:
        linear_cross_entropy(x, head, draw_targets(50, 40))
    assert sorted(tuple(tensor.shape) for tensor in kept) == [(40, 6), (50, 6)]


def test_where_nothing_learns_no_gradient_is_taken() -> None:
    x, head, targets = normal(9, 60, seed=0), normal(400, 60, seed=1), draw_targets(9, 400)

    def largest() -> int:
        return largest_allocation(lambda: linear_cross_entropy(x, head, targets))

    assert largest() >= head.nbytes
    with torch.no_grad():
        assert largest() < head.nbytes / 2
        found = linear_cross_entropy(x, head, targets)
    torch.testing.assert_close(found, expected(x, head, targets).detach())

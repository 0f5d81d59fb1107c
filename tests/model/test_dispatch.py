"""The pieces that every dispatcher is made of, with gradients by plain indexing."""

import torch
from torch import Tensor

from model.dispatch import gather_copies, sort_by_expert, weigh


def grads_of(y: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((y * weights).sum(), leaves)


def test_sorting_is_stable_and_counts_every_copy() -> None:
    order_N, counts_E = sort_by_expert(torch.tensor([[3, 1], [1, 0], [3, 2], [1, 3]]), 5)
    assert order_N.tolist() == [3, 1, 2, 6, 5, 0, 4, 7]
    assert counts_E.tolist() == [1, 3, 1, 3, 0]


def test_gathered_copies_and_their_gradient_are_those_of_indexing() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 3, generator=generator, requires_grad=True)
    order_N = torch.randperm(10, generator=generator)
    found, expected = gather_copies(x, order_N, 2), x[order_N // 2]
    assert torch.equal(found, expected)
    torch.testing.assert_close(grads_of(found, x), grads_of(expected, x))


def test_results_are_summed_with_their_gates_wherever_they_lie() -> None:
    generator = torch.Generator().manual_seed(0)
    flat = torch.randn(6, 4, generator=generator, requires_grad=True)
    gates = torch.rand(3, 2, generator=generator, requires_grad=True)
    order_N = torch.randperm(6, generator=generator)
    expected = torch.stack(
        [flat[2 * t] * gates[t, 0] + flat[2 * t + 1] * gates[t, 1] for t in range(3)]
    )
    found = weigh(flat[order_N], gates, order_N)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(grads_of(found, flat, gates), grads_of(expected, flat, gates))

"""Rows sorted by expert, and sums of rows in a fixed order."""

import torch

from model.dispatch import LocalDispatcher, Routed, sort_by_expert
from model.rows import ByRow, _Take, add_rows, inverse, take_rows


def test_copies_of_one_expert_keep_their_order() -> None:
    order_N = sort_by_expert(torch.tensor([[3, 1], [1, 0], [3, 2], [1, 3]]))
    assert order_N.tolist() == [3, 1, 2, 6, 5, 0, 4, 7]


def test_rows_get_the_sum_of_their_visits_whether_none_one_or_many() -> None:
    rows_N = torch.tensor([2, 0, 2, 4, 2, 0])
    y_ND = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
    sums_RD = ByRow.of(rows_N, 6).sum(y_ND)
    wanted = torch.zeros(6, 3, dtype=torch.float64).index_add(0, rows_N, y_ND)
    torch.testing.assert_close(sums_RD, wanted)
    slope = torch.randn(6, 3, dtype=torch.float64)
    (found,) = torch.autograd.grad(sums_RD, y_ND, slope)
    assert torch.equal(found, slope[rows_N])


def test_what_a_dispatcher_knows_of_rows_is_what_sorting_finds() -> None:
    experts_TK = torch.rand(9, 8).topk(3).indices
    gates_TK = torch.rand(9, 3)
    counts_E = torch.bincount(experts_TK.flatten(), minlength=8)
    routed = Routed("model.layers.1", torch.randn(9, 4), experts_TK, gates_TK, counts_E)
    sent = LocalDispatcher(8).send(routed).rows()
    found, wanted = sent.by_row(), ByRow.of(sent.rows_N, 9)
    assert sent.home is found
    assert torch.equal(found.begin_R, wanted.begin_R)
    assert torch.equal(sent.rows_N[found.visit_N], sent.rows_N[wanted.visit_N])
    y_ND = torch.randn(27, 4)
    torch.testing.assert_close(found.sum(y_ND), wanted.sum(y_ND))


def test_the_inverse_of_a_permutation_undoes_it() -> None:
    order_N = torch.randperm(50)
    assert torch.equal(order_N[inverse(order_N)], torch.arange(50))


def taken_on_devices(x_LX: torch.Tensor, index_N: torch.Tensor) -> torch.Tensor:
    taken: torch.Tensor = _Take.apply(x_LX, index_N)  # type: ignore[no-untyped-call]
    return taken


def test_rows_taken_often_get_the_sum_of_their_slopes() -> None:
    """What devices do, beside what CPUs do."""
    x_LX = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index_N = torch.tensor([4, 0, 0, 2, 4, 4])
    slope_NX = torch.randn(6, 3, dtype=torch.float64)
    taken = take_rows(x_LX, index_N)
    found = taken_on_devices(x_LX, index_N)
    assert torch.equal(found, taken)
    (wanted,) = torch.autograd.grad(taken, x_LX, slope_NX)
    (slope,) = torch.autograd.grad(found, x_LX, slope_NX)
    torch.testing.assert_close(slope, wanted)
    sums_LX = torch.ones(5, 3, dtype=torch.float64)
    add_rows(sums_LX, index_N, slope_NX)
    torch.testing.assert_close(sums_LX, 1 + wanted)

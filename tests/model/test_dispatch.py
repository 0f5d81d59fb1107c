"""The sort that every dispatcher begins with."""

import torch

from model.dispatch import sort_by_expert


def test_sorting_is_stable_and_counts_every_copy() -> None:
    order_N, counts_E = sort_by_expert(torch.tensor([[3, 1], [1, 0], [3, 2], [1, 3]]), 5)
    assert order_N.tolist() == [3, 1, 2, 6, 5, 0, 4, 7]
    assert counts_E.tolist() == [1, 3, 1, 3, 0]

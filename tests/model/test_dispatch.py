"""The sort that every dispatcher begins with."""

import torch

from model.dispatch import sort_by_expert


def test_copies_of_one_expert_keep_their_order() -> None:
    order_N = sort_by_expert(torch.tensor([[3, 1], [1, 0], [3, 2], [1, 3]]))
    assert order_N.tolist() == [3, 1, 2, 6, 5, 0, 4, 7]

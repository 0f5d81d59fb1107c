"""Rotary positions against complex multiplication."""

import torch

from model.rope import rotary_table, rotate
from tests.references import rotate_as_complex


def test_pairs_turn_like_complex_numbers() -> None:
    x_SR = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    found = rotate(x_SR, rotary_table(12, 500.0, 40), torch.arange(40))
    expected = rotate_as_complex(x_SR, 500.0)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_scores_depend_on_the_distance_alone() -> None:
    generator = torch.Generator().manual_seed(1)
    q, k = torch.randn(8, generator=generator), torch.randn(8, generator=generator)
    table = rotary_table(8, 10000.0, 64)

    def score(query_position: int, key_position: int) -> float:
        turned = [
            rotate(x, table, torch.tensor(position))
            for x, position in ((q, query_position), (k, key_position))
        ]
        return float(turned[0] @ turned[1])

    assert abs(score(5, 2) - score(33, 30)) < 1e-5
    assert abs(score(5, 2) - score(5, 3)) > 1e-3


def test_rows_and_heads_may_have_positions_of_their_own() -> None:
    x_BSHR = torch.randn(2, 3, 4, 8, generator=torch.Generator().manual_seed(2))
    table = rotary_table(8, 10000.0, 16)
    positions_BS = torch.tensor([[0, 1, 2], [7, 8, 9]])
    found = rotate(x_BSHR, table, positions_BS.unsqueeze(-1))
    for b in range(2):
        for s in range(3):
            for h in range(4):
                alone = rotate(x_BSHR[b, s, h], table, positions_BS[b, s])
                torch.testing.assert_close(found[b, s, h], alone, rtol=0, atol=0)

"""Shared-entry attention against one query and head at a time, and its own gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.indexer import NONE
from model.multiquery import Sight, attend
from tests.references import attend_by_query


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def documents(*lengths: int) -> Tensor:
    return torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]


def chosen_blocks(rows: int, length: int, keep: int, sight: Sight) -> Tensor:
    """For each query, some of the blocks it may see in no particular order, then none."""
    generator = torch.Generator().manual_seed(5)
    seen = sight.blocks(0, length, torch.device("cpu")).expand(rows, -1, -1)
    chosen_BSK = torch.full((rows, length, keep), NONE)
    for row in range(rows):
        for t in range(length):
            blocks = seen[row, t].nonzero().squeeze(1)
            some = blocks[torch.randperm(len(blocks), generator=generator)][:keep]
            chosen_BSK[row, t, : len(some)] = some
    return chosen_BSK


def operands(length: int, ratio: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return (
        2 * normal(2, length, 3, 4),
        normal(2, length, 4, seed=1),
        normal(2, length // ratio, 4, seed=2),
        normal(3, seed=3),
    )


SIGHTS = [
    Sight(window=3, chunk=1),
    Sight(window=3, ratio=4, chunk=5),
    Sight(window=7, ratio=4, chunk=100),
    Sight(window=3, ratio=4, chunk=4, segments_BS=documents(6, 11, 2).expand(2, -1)),
]


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("pick", [None, 0, 100])
def test_attention_is_one_softmax_over_window_blocks_and_sink(
    sight: Sight, pick: int | None
) -> None:
    """`pick`: everything, or three chosen blocks that are gathered or masked."""
    q, kv, blocks, sinks = operands(19, sight.ratio)
    if sight.ratio == 1:
        blocks = blocks[:, :0]
    if pick is not None:
        chosen = chosen_blocks(2, 19, min(3, blocks.shape[1]), sight)
        sight = replace(sight, chosen_BSK=chosen, gather_factor=pick)
    out, mass = attend(q, kv, blocks, sinks, sight, mass=True)
    expected, expected_mass = attend_by_query(q, kv, blocks, sinks, sight)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-9)
    assert mass is not None
    if pick is None:
        torch.testing.assert_close(mass, expected_mass, rtol=1e-9, atol=1e-9)
    elif blocks.shape[1]:
        by_choice = expected_mass.gather(2, chosen.clamp_min(0)).masked_fill(chosen < 0, 0.0)
        torch.testing.assert_close(mass, by_choice, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("sight", SIGHTS)
@pytest.mark.parametrize("pick", [None, 0, 100])
def test_gradients_of_attention_are_those_of_finite_differences(
    sight: Sight, pick: int | None
) -> None:
    q, kv, blocks, sinks = operands(9, sight.ratio)
    if sight.segments_BS is not None:
        sight = replace(sight, segments_BS=sight.segments_BS[:, :9])
    if pick is not None:
        chosen = chosen_blocks(2, 9, min(2, blocks.shape[1]), sight)
        sight = replace(sight, chosen_BSK=chosen, gather_factor=pick)
    inputs = tuple(x.requires_grad_() for x in (q, kv, blocks, sinks))

    def attended(q: Tensor, kv: Tensor, blocks: Tensor, sinks: Tensor) -> Tensor:
        return attend(q, kv, blocks, sinks, sight)[0]

    # Along a random direction: every element alone would take minutes.
    assert torch.autograd.gradcheck(attended, inputs, eps=1e-6, atol=1e-6, fast_mode=True)


def test_a_high_sink_takes_the_weight_and_a_low_one_leaves_it() -> None:
    q, kv, blocks, _ = operands(8, 4)
    sight = Sight(window=4, ratio=4)
    none, _ = attend(q, kv, blocks, torch.full((3,), 60.0).double(), sight)
    everything, _ = attend(q, kv, blocks, torch.full((3,), -60.0).double(), sight)
    assert float(none.abs().max()) < 1e-15
    # With nothing but itself to see, the first token is all that its query reads.
    torch.testing.assert_close(everything[:, 0], kv[:, :1].expand(-1, 3, -1))

"""Chunked work on gathered entries against the same work on all of it at once."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from model import gathering
from model.gathering import over_chosen
from tests.memory import LargestTensor

QUERIES, ENTRIES, KEPT, WIDTH = 23, 11, 5, 6


def core(
    queries: Sequence[Tensor], gathered: Sequence[Tensor], valid: Tensor, shared: Sequence[Tensor]
) -> tuple[Tensor, ...]:
    """An attention head, and a number of each query that only the second tensor bears on."""
    scores = torch.einsum("qd,de,qke->qk", queries[0], shared[0], gathered[0])
    weights = scores.masked_fill(~valid, float("-inf")).softmax(-1)
    return torch.einsum("qk,qke->qe", weights, gathered[1]), queries[1].square().sum(-1)


def case() -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()

    chosen = torch.stack([torch.randperm(ENTRIES, generator=generator) for _ in range(QUERIES)])
    chosen = chosen[:, :KEPT].to(torch.int32)
    chosen[torch.rand(chosen.shape, generator=generator) < 0.3] = -1
    chosen[:, 0] = chosen[:, 0].clamp_min(0)
    return (
        chosen,
        [draw(ENTRIES, WIDTH), draw(ENTRIES, 2)],
        [draw(QUERIES, 4), draw(QUERIES, 3)],
        [draw(4, WIDTH)],
    )


@pytest.mark.parametrize("rows", [1, 4, 100])
def test_results_and_gradients_are_those_of_one_gathering(
    rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gathering, "CHUNK_VALUES", rows * KEPT * (WIDTH + 2))
    chosen, entries, queries, shared = case()
    leaves = [*entries, *queries, *shared]
    plain = core(queries, [e[chosen.clamp_min(0)] for e in entries], chosen >= 0, shared)
    found = over_chosen(core, chosen, entries=entries, queries=queries, shared=shared)
    torch.testing.assert_close(found, plain)
    weights = [torch.randn_like(y) for y in plain]
    for outputs in (plain, found):
        slopes = torch.autograd.grad(outputs, leaves, weights, retain_graph=True)
        if outputs is plain:
            expected = slopes
    torch.testing.assert_close(slopes, expected)


def test_what_is_gathered_at_a_time_is_bounded_either_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """No tensor outgrows a chunk, the inputs or the results, forwards or backwards."""
    monkeypatch.setattr(gathering, "CHUNK_VALUES", 2 * KEPT * (WIDTH + 2))
    chosen, entries, queries, shared = case()
    with LargestTensor() as made:
        outputs = over_chosen(core, chosen, entries=entries, queries=queries, shared=shared)
        torch.stack([y.sum() for y in outputs]).sum().backward()
    allowed = max(2 * KEPT * WIDTH, QUERIES * WIDTH, ENTRIES * WIDTH)
    assert made.values <= allowed < QUERIES * KEPT * WIDTH

"""Experts by offsets, beside the experts one by one."""

import pytest
import torch
from torch import Tensor

from model import grouped
from model.dispatch import Dispatched
from model.grouped import each_mm, each_outer, swiglu_by_offsets
from model.swiglu import grouped_swiglu
from tests.memory import saved_tensors

COUNTS = [[5, 3, 4], [0, 12, 0], [1, 0, 11], [0, 0, 0]]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def ends_of(counts: list[int]) -> Tensor:
    return torch.tensor(counts).cumsum(0).to(torch.int32)


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_products_are_those_of_each_expert(counts: list[int]) -> None:
    visits, experts = sum(counts), len(counts)
    x, y, w = normal(visits, 8, seed=0), normal(visits, 16, seed=1), normal(experts, 8, 16, seed=2)
    each = zip(x.split(counts), y.split(counts), w, strict=True)
    products, outers = zip(*((a @ m, a.T @ b) for a, b, m in each), strict=True)
    torch.testing.assert_close(each_mm(x, w, ends_of(counts)), torch.cat(products))
    torch.testing.assert_close(each_outer(x, y, ends_of(counts)), torch.stack(outers))


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("limit", [None, 0.5])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_results_and_gradients_are_those_of_the_twin(
    counts: list[int], limit: float | None, weighted: bool
) -> None:
    """float32 against float64: sums of at most 16 terms of size 1."""
    visits, experts, rows = sum(counts), len(counts), 7
    rows_N = torch.randint(rows - 1, (visits,), generator=torch.Generator().manual_seed(4))

    def run(dtype: torch.dtype, compute) -> list[Tensor]:  # type: ignore[no-untyped-def]
        shapes = [(rows, 8), (experts, 32, 8), (experts, 8, 16), (visits,)]
        leaves = [
            normal(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(shapes)
        ]
        x, gate_up, down, gates = leaves
        sent = Dispatched(x, rows_N, torch.tensor(counts), gates if weighted else None)
        y_RD = compute(sent, gate_up, down, limit)
        learnt = leaves if weighted else leaves[:3]
        return [y_RD, *torch.autograd.grad(y_RD, learnt, normal(rows, 8, seed=9, dtype=dtype))]

    found = run(torch.float32, swiglu_by_offsets)
    for part, wanted in zip(found, run(torch.float64, grouped_swiglu), strict=True):
        torch.testing.assert_close(part.double(), wanted, rtol=2e-5, atol=2e-5)


def test_nothing_is_kept_where_nothing_is_learnt() -> None:
    x, counts = normal(6, 8, seed=0), torch.tensor([4, 2])
    sent = Dispatched(x, torch.arange(6), counts, None)
    weights = normal(2, 32, 8, seed=1), normal(2, 8, 16, seed=2)
    with saved_tensors() as kept, torch.no_grad():
        y_RD = swiglu_by_offsets(sent, *weights, None)
    assert not kept
    torch.testing.assert_close(y_RD, grouped_swiglu(sent, *weights, None))


def test_widths_that_kernels_cannot_read_go_expert_by_expert() -> None:
    narrow, odd = torch.bfloat16, normal(2, 32, 12, seed=1, dtype=torch.bfloat16)
    assert not grouped._fits(odd, normal(2, 12, 16, seed=2, dtype=narrow))
    assert grouped._fits(odd[..., :8], normal(2, 8, 16, seed=2, dtype=narrow))
    assert grouped._fits(odd.float(), normal(2, 12, 16, seed=2))

"""SwiGLU's own derivatives against autograd's, in float64, dense and by expert."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from model import swiglu as module
from model.dispatch import Dispatched
from model.swiglu import activation, activation_backward, grouped_swiglu, swiglu
from tests.memory import largest_allocation, saved_tensors

LIMITS = [None, 0.7]
"""The second one holds about half of the values drawn here."""
COUNTS = [[5], [0, 4, 0, 7, 1], [0, 0, 3], [0, 0]]


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()


def by_autograd(x: Tensor, gate: Tensor, up: Tensor, down: Tensor, limit: float | None) -> Tensor:
    g, u = x @ gate.T, x @ up.T
    if limit is not None:
        g, u = g.clamp(max=limit), u.clamp(-limit, limit)
    return (g * torch.sigmoid(g) * u) @ down.T


def assert_same(
    found: Callable[[], Tensor], expected: Callable[[], Tensor], leaves: list[Tensor]
) -> None:
    y, reference = found(), expected()
    torch.testing.assert_close(y, reference)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(99), dtype=y.dtype)
    grads = [
        torch.autograd.grad(result, leaves, dy, allow_unused=True, materialize_grads=True)
        for result in (y, reference)
    ]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("weighted", [True, False])
def test_the_activation_and_its_slopes_are_the_formulas(
    weighted: bool, limit: float | None
) -> None:
    gate, up, dy = normal(6, 5, seed=0), normal(6, 5, seed=1), normal(6, 5, seed=2).detach()
    weights = normal(6, seed=3)
    pick_gate, pick_up = torch.eye(10, dtype=torch.float64).split(5)
    one = torch.eye(5, dtype=torch.float64)
    y = by_autograd(torch.cat([gate, up], 1), pick_gate, pick_up, one, limit)
    torch.testing.assert_close(activation(gate, up, limit), y)
    if weighted:
        y = weights[:, None] * y
    d_gate, d_up, d_weights = torch.autograd.grad(y, (gate, up, weights), dy, allow_unused=True)
    given = torch.cat([gate, up], 1).detach(), dy.clone()
    found = activation_backward(*given, limit, weights.detach() if weighted else None)
    torch.testing.assert_close(found.y_NI, y.detach())
    torch.testing.assert_close(found.d_inner_NJ, torch.cat([d_gate, d_up], 1))
    assert (found.d_weight_N is None) == (d_weights is None) == (not weighted)
    if weighted:
        torch.testing.assert_close(found.d_weight_N, d_weights)
    # What was given is as it was.
    assert torch.equal(given[0], torch.cat([gate, up], 1))
    assert torch.equal(given[1], dy)


@pytest.mark.parametrize("limit", LIMITS)
def test_the_dense_block_and_its_gradients_are_those_of_autograd(limit: float | None) -> None:
    x, down = normal(2, 3, 6, seed=0), normal(6, 5, seed=1)
    gate, up = normal(5, 6, seed=2), normal(5, 6, seed=3)
    assert_same(
        lambda: swiglu(x, gate, up, down, limit),
        lambda: by_autograd(x, gate, up, down, limit),
        [x, gate, up, down],
    )
    with torch.no_grad():
        torch.testing.assert_close(
            swiglu(x, gate, up, down, limit), by_autograd(x, gate, up, down, limit)
        )


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("group_rows", [1, 5, 2048])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_a_row_gets_the_sum_of_its_visits_by_gate(
    monkeypatch: pytest.MonkeyPatch,
    counts: list[int],
    group_rows: int,
    weighted: bool,
    limit: float | None,
) -> None:
    monkeypatch.setattr(module, "GROUP_ROWS", group_rows)
    visits, experts, rows = sum(counts), len(counts), 4
    x, gates = normal(rows, 6, seed=0), normal(visits, seed=1)
    gate_up, down = normal(experts, 10, 6, seed=2), normal(experts, 6, 5, seed=3)
    # Row 3 is never visited.
    generator = torch.Generator().manual_seed(4)
    rows_N = torch.randint(rows - 1, (visits,), generator=generator)
    sent = Dispatched(x, rows_N, torch.tensor(counts), gates if weighted else None)

    def expected() -> Tensor:
        sums = [torch.zeros(6, dtype=torch.float64) for _ in range(rows)]
        visited = [expert for expert, count in enumerate(counts) for _ in range(count)]
        for n, (row, expert) in enumerate(zip(rows_N.tolist(), visited, strict=True)):
            gate, up = gate_up[expert].chunk(2)
            y = by_autograd(x[row][None], gate, up, down[expert], limit)[0]
            sums[row] = sums[row] + (gates[n] * y if weighted else y)
        # An empty sum would have no gradient to compare.
        return torch.stack(sums) + 0 * x.sum()

    leaves = [x, gate_up, down, *([gates] if weighted else [])]
    assert_same(lambda: grouped_swiglu(sent, gate_up, down, limit), expected, leaves)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize(
    "counts", [*COUNTS, [9, 8, 12, 0], [64, 60], [65, 60], [40, 0, 0, 0]], ids=str
)
def test_without_gradients_few_visits_or_many_give_the_same(
    counts: list[int], limit: float | None, weighted: bool
) -> None:
    """Few visits go through one padded product, many through a product for each expert."""
    visits, experts = sum(counts), len(counts)
    x, gates = normal(9, 6, seed=0), normal(visits, seed=1)
    gate_up, down = normal(experts, 10, 6, seed=2), normal(experts, 6, 5, seed=3)
    rows_N = torch.randint(9, (visits,), generator=torch.Generator().manual_seed(4))
    sent = Dispatched(x, rows_N, torch.tensor(counts), gates if weighted else None)
    learning = grouped_swiglu(sent, gate_up, down, limit)
    with torch.no_grad():
        torch.testing.assert_close(grouped_swiglu(sent, gate_up, down, limit), learning.detach())


@pytest.mark.parametrize(
    ("counts", "padded"),
    [
        ([8, 7, 9, 8], True),
        ([64, 50], True),
        ([65, 50], False),  # So many that each expert's product is large enough alone.
        ([7, 7, 7, 7], False),  # So few that reading a matrix is all the work.
        ([9, 0, 0, 0], False),  # Three matrices would be read for nothing.
        ([0, 0], False),
    ],
    ids=str,
)
def test_products_are_padded_where_most_of_them_is_work(counts: list[int], padded: bool) -> None:
    assert module._are_few(counts) == padded


def test_reading_needs_room_for_one_group_of_visits_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GROUP_ROWS", 100)
    x = torch.randn(1000, 6)
    gate_up, down = torch.randn(20, 2 * 50, 6), torch.randn(20, 6, 50)
    sent = Dispatched(x, torch.arange(2000) % 1000, torch.tensor([100] * 20), None)

    def largest() -> int:
        return largest_allocation(lambda: grouped_swiglu(sent, gate_up, down, None))

    visits = 2000 * 2 * 50 * 4
    assert largest() >= visits
    with torch.no_grad():
        assert largest() < visits / 2


def test_training_keeps_the_input_and_one_product_for_each_visit() -> None:
    """Rows sorted by expert, activations and results are made again, not kept."""
    x, down = normal(40, 6, seed=0), normal(2, 6, 5, seed=2)
    gate_up = normal(2, 10, 6, seed=1)
    rows_N = torch.arange(80) % 40
    sent = Dispatched(x, rows_N, torch.tensor([30, 50]), None)
    with saved_tensors() as kept:
        grouped_swiglu(sent, gate_up, down, None)
    shapes = sorted(tuple(tensor.shape) for tensor in kept)
    assert shapes == sorted([(40, 6), (2, 10, 6), (2, 6, 5), (80,), (80, 10)])


@pytest.fixture
def threads() -> Iterator[None]:
    """Several, where tests else have one."""
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_two_runs_give_the_same_bits(threads: None) -> None:
    """Rows are added up in a fixed order, whatever the threads do."""
    x = normal(300, 64, seed=0, dtype=torch.float32)
    gate_up, down = (
        normal(8, 2 * 32, 64, seed=1, dtype=torch.float32),
        normal(8, 64, 32, seed=2, dtype=torch.float32),
    )
    experts_TK = torch.rand(300, 8, generator=torch.Generator().manual_seed(3)).topk(4).indices
    order_N = experts_TK.flatten().argsort(stable=True)
    counts_E = torch.bincount(experts_TK.flatten(), minlength=8)
    sent = Dispatched(x, order_N // 4, counts_E, None)
    runs = []
    for _ in range(3):
        y = grouped_swiglu(sent, gate_up, down, None)
        runs.append((y, *torch.autograd.grad(F.silu(y).sum(), (x, gate_up, down))))
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))

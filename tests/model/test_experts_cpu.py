"""Experts in one call of C, beside the twin in float64; on one thread or several."""

import inspect
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import experts_cpu as module
from model.compiled import compiled
from model.dispatch import Dispatched
from model.experts_cpu import FLAGS, SOURCE, Kernels, cpu_kernels, serves, swiglu_on_cpu
from model.grouped import experts_swiglu
from model.swiglu import grouped_swiglu
from tests.memory import saved_tensors

_MISSING = "no C compiler"
_WHY = compiled(SOURCE, *FLAGS[torch.float32])[1]
# A compiler that refuses what is written here is no reason to pass over it.
pytestmark = pytest.mark.skipif(_WHY.startswith(_MISSING), reason=_WHY)

COUNTS = [[5], [0, 4, 0, 7, 1], [0, 0, 3], [0, 0], [1, 257, 0, 16, 8, 33]]
"""Without visits, with one, with panels and blocks that are full and that are not."""
WIDTHS = [(6, 5), (48, 32), (300, 17), (33, 100)]
"""(D, I): within one vector, whole tiles, and beyond one part of the terms."""
ROWS = 9


@pytest.fixture
def threads() -> Iterator[None]:
    """As many as the test sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def leaves_of(counts: list[int], width: int, inner: int) -> list[Tensor]:
    """(x, gate_up, down, gates) such that results are of size 1."""
    experts = len(counts)
    return [
        normal(ROWS, width, seed=0),
        normal(experts, 2 * inner, width, seed=1) / width**0.5,
        normal(experts, width, inner, seed=2) / inner**0.5,
        normal(sum(counts), seed=3),
    ]


def run(
    leaves: list[Tensor],
    counts: list[int],
    *,
    limit: float | None = None,
    weighted: bool = True,
    dtype: torch.dtype = torch.float32,
) -> list[Tensor]:
    """The result and all gradients: by C in float32, else by the twin. Row 8 has no visit."""
    x, gate_up, down, gates = cast = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves]
    rows_N = torch.randint(ROWS - 1, (len(gates),), generator=torch.Generator().manual_seed(4))
    sent = Dispatched(x, rows_N, torch.tensor(counts), gates if weighted else None)
    compute = swiglu_on_cpu if dtype == torch.float32 else grouped_swiglu
    y = compute(sent, gate_up, down, limit)
    with torch.no_grad():
        again = compute(sent, gate_up, down, limit)
    if dtype == torch.float32:
        torch.testing.assert_close(again, y, rtol=0, atol=0, equal_nan=True)
    dy = normal(*y.shape, seed=5).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, cast if weighted else cast[:3], dy)]


def assert_same_bits(runs: list[list[Tensor]]) -> None:
    for one, other in pairwise(runs):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_what_is_compiled_is_used() -> None:
    made, why = cpu_kernels()
    assert made is not None, why


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize(("width", "inner"), WIDTHS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_results_and_gradients_are_those_of_the_twin_in_float64(
    counts: list[int], width: int, inner: int, limit: float | None, weighted: bool
) -> None:
    """Sums of up to 300 terms, whose roundings of 2^-24 of a term add up like a random walk."""
    leaves = leaves_of(counts, width, inner)
    found = run(leaves, counts, limit=limit, weighted=weighted)
    exact = run(leaves, counts, limit=limit, weighted=weighted, dtype=torch.float64)
    for part, wanted in zip(found, exact, strict=True):
        largest = float(wanted.abs().max()) if wanted.numel() else 0.0
        torch.testing.assert_close(part.double(), wanted, rtol=0, atol=4e-6 * largest)


@pytest.mark.parametrize("size", [1e-9, 1.0, 30.0, 200.0])
def test_the_activation_is_exact_from_end_to_end(size: float) -> None:
    """Gates of up to 800: both ends of the exponential."""
    counts = [40, 24]
    leaves = leaves_of(counts, 16, 16)
    leaves[0] *= size
    for part, wanted in zip(
        run(leaves, counts), run(leaves, counts, dtype=torch.float64), strict=True
    ):
        torch.testing.assert_close(
            part.double(), wanted, rtol=0, atol=4e-6 * float(wanted.abs().max())
        )


def assert_threads_change_no_bit(compute: Callable[[], list[Tensor]]) -> None:
    """Of `compute`, in a test that takes the fixture `threads`."""
    runs = []
    for number in (1, 2, 3, 8, 8):
        torch.set_num_threads(number)
        runs.append(compute())
    assert_same_bits(runs)


def test_any_number_of_threads_gives_the_same_bits(threads: None) -> None:
    counts = [30, 0, 200, 5, 64, 1, 7, 150]
    leaves = leaves_of(counts, 64, 48)
    assert_threads_change_no_bit(lambda: run(leaves, counts, limit=0.7))


def test_threads_of_its_own_give_the_same_bits(
    threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where torch has no OpenMP that could lend its threads."""
    counts = [30, 0, 200, 5]
    leaves, made = leaves_of(counts, 64, 48), cpu_kernels()[0]
    assert made is not None
    torch.set_num_threads(3)
    runs = [run(leaves, counts)]
    monkeypatch.setattr(made, "_parallel", None)
    assert_same_bits([*runs, run(leaves, counts)])


def assert_a_row_spoils_no_other(leaves: list[Tensor], compute: Callable[[], list[Tensor]]) -> None:
    """Where row 2 of x is not finite, in results and gradients of `leaves`."""
    clean = compute()
    leaves[0][2] = torch.nan
    spoilt = compute()
    others = [row for row in range(ROWS) if row != 2]
    for part in (0, 1):  # y and dx
        assert torch.equal(spoilt[part][others], clean[part][others])
        assert spoilt[part][2].isnan().all()
    assert all(part.isnan().any() for part in spoilt[2:])


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    counts = [20, 13]
    leaves = leaves_of(counts, 24, 16)
    assert_a_row_spoils_no_other(leaves, lambda: run(leaves, counts))


def test_operands_may_lie_in_any_way() -> None:
    counts = [3, 9]
    leaves = leaves_of(counts, 24, 16)
    turned = [leaf.T.contiguous().T for leaf in leaves[:1]]
    turned += [leaf.mT.contiguous().mT for leaf in leaves[1:3]]
    assert not any(leaf.is_contiguous() for leaf in turned)
    assert_same_bits([run(leaves, counts), run([*turned, leaves[3]], counts)])


def test_training_keeps_the_rows_and_gate_and_up_of_each_visit() -> None:
    x, gate_up, down, gates = (leaf.requires_grad_() for leaf in leaves_of([30, 50], 6, 5))
    sent = Dispatched(x, torch.arange(80) % ROWS, torch.tensor([30, 50]), gates)
    with saved_tensors() as kept:
        with torch.no_grad():
            experts_swiglu(sent, gate_up, down, None)
        assert kept == []
        experts_swiglu(sent, gate_up, down, None)
    made = cpu_kernels()[0]
    assert made is not None
    panels = -(-30 // made._wide) + -(-50 // made._wide)
    inner = (panels, 10, made._wide)
    others = [(ROWS, 6), (2, 10, 6), (2, 6, 5), (80,), (80,), (2,)]
    assert sorted(tuple(tensor.shape) for tensor in kept) == sorted([inner, *others])


def test_it_serves_two_types_with_an_expert_for_each_thread(threads: None) -> None:
    x, gate_up, down, gates = leaves_of([3, 4], 8, 8)
    rows_N, counts_E = torch.arange(7), torch.tensor([3, 4])

    def served(x: Tensor, gates: Tensor, gate_up: Tensor, down: Tensor) -> bool:
        return serves(Dispatched(x, rows_N, counts_E, gates), gate_up, down)

    torch.set_num_threads(2)
    assert served(x, gates, gate_up, down)
    assert not served(x.double(), gates.double(), gate_up.double(), down.double())
    assert not served(x.half(), gates.half(), gate_up.half(), down.half())
    assert not served(x.bfloat16(), gates, gate_up, down)
    assert not served(x.to("meta"), gates.to("meta"), gate_up.to("meta"), down.to("meta"))
    torch.set_num_threads(3)
    assert not served(x, gates, gate_up, down)


def test_a_layer_computes_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    original = Kernels._run

    def counted(self: Kernels, *given: object) -> None:
        calls.append(given)
        original(self, *given)  # type: ignore[arg-type]

    monkeypatch.setattr(Kernels, "_run", counted)
    x, gate_up, down, gates = (leaf.requires_grad_() for leaf in leaves_of([3, 4], 8, 8))
    sent = Dispatched(x, torch.arange(7), torch.tensor([3, 4]), gates)
    y = experts_swiglu(sent, gate_up, down, None)
    torch.testing.assert_close(y, grouped_swiglu(sent, gate_up, down, None))
    y.sum().backward()
    assert len(calls) == 2


def made_anew(dtype: torch.dtype = torch.float32) -> tuple[Kernels | None, str]:
    """What `cpu_kernels` makes; a process asks it once, tests here each for themselves."""
    made: tuple[Kernels | None, str] = inspect.unwrap(cpu_kernels)(dtype)
    return made


def test_without_a_compiler_torch_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "/nowhere/cc")
    missing = made_anew()
    assert missing == (None, "eager: no C compiler (/nowhere/cc); install one, as gcc")
    monkeypatch.setattr(module, "cpu_kernels", lambda dtype: missing)
    x, gate_up, down, gates = leaves_of([3, 4], 8, 8)
    sent = Dispatched(x, torch.arange(7), torch.tensor([3, 4]), gates)
    assert not serves(sent, gate_up, down)
    y, twin = (f(sent, gate_up, down, None) for f in (experts_swiglu, grouped_swiglu))
    assert torch.equal(y, twin)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("p = p * r + 5.0000001201e-1f;", "p = p * r + 5.1e-1f;"),
        ("t->rows + first, count, D);\n        Right dy", "t->rows, count, D);\n        Right dy"),
        ("sums[v] += d * y;", "sums[v] = d * y;"),
        ("d_up = pick(up > most, none, d_up);", ""),
        ("&columns_I, &d_down_out, done > 0)", "&columns_I, &d_down_out, 0)"),
        ("memset(d_down, 0, D * I * sizeof(float));", "memset(d_down, 65, D * I * sizeof(float));"),
    ],
    ids=lambda text: text[:24],
)
def test_a_library_that_computes_otherwise_is_not_used(
    right: str, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = SOURCE.read_text()
    assert right in source
    (tmp_path / "experts_cpu.c").write_text(source.replace(right, wrong))
    monkeypatch.setattr(module, "SOURCE", tmp_path / "experts_cpu.c")
    made, why = made_anew()
    assert made is None
    assert why.endswith("does not give the twin's results")


def test_the_first_who_asks_may_compute_without_gradients() -> None:
    """As a sampler does, in a process that has not asked before."""
    with torch.inference_mode():
        assert (inspect.unwrap(cpu_kernels)()[0] is None) == (cpu_kernels()[0] is None)

"""Experts in one call of C with operands in bfloat16, beside float64.

Processors without the units widen each word to float32, the sums being the same; what compilers
make for those that have them is read as assembler.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from model import experts_cpu as module
from model.dispatch import Dispatched
from model.experts_cpu import FLAGS, SOURCE, cpu_kernels, serves, swiglu_on_cpu
from model.grouped import experts_swiglu
from model.swiglu import activation, activation_backward, halves
from tests.model.test_experts_cpu import (
    COUNTS,
    ROWS,
    assert_a_row_spoils_no_other,
    assert_threads_change_no_bit,
    leaves_of,
    made_anew,
    normal,
    pytestmark,  # noqa: F401 - without a compiler both are skipped
    threads,  # noqa: F401 - a fixture
)

BF16 = torch.bfloat16

WIDTHS = [(6, 2), (48, 32), (600, 18), (34, 100)]
"""(D, I): within one vector, whole tiles, and beyond one part of the terms."""
STEP = 2.0**-7
"""Between two numbers of bfloat16, by the smaller one, at most."""


def rounded(counts: list[int], width: int, inner: int) -> list[Tensor]:
    return [leaf.to(BF16) for leaf in leaves_of(counts, width, inner)]


def visited(counts: list[int]) -> Tensor:
    """Row 8 has no visit."""
    return torch.randint(ROWS - 1, (sum(counts),), generator=torch.Generator().manual_seed(4))


def run(leaves: list[Tensor], counts: list[int], limit: float | None = None) -> list[Tensor]:
    """The result and all gradients, by C."""
    x, gate_up, down, gates = learnt = [leaf.detach().requires_grad_() for leaf in leaves]
    sent = Dispatched(x, visited(counts), torch.tensor(counts), gates)
    y = swiglu_on_cpu(sent, gate_up, down, limit)
    return [y.detach(), *torch.autograd.grad(y, learnt, normal(*y.shape, seed=5).to(BF16))]


def narrow(exact: Tensor) -> Tensor:
    """float64 of the nearest bfloat16."""
    return exact.to(BF16).double()


def slow(leaves: list[Tensor], counts: list[int], limit: float | None = None) -> list[Tensor]:
    """The same expert by expert in float64, with operands and results rounded where C does it."""
    x, gate_up, down, gates = (leaf.double() for leaf in leaves)
    dy, rows = normal(*x.shape, seed=5).to(BF16).double(), visited(counts)
    y, dx = torch.zeros_like(x), torch.zeros_like(x)
    d_gates, d_gate_up, d_down = (torch.zeros_like(one) for one in (gates, gate_up, down))
    first = 0
    for e, count in enumerate(counts):
        own = slice(first, first + count)
        first += count
        sent = x[rows[own]]
        inner = sent @ gate_up[e].T
        active = activation(*halves(inner), limit)
        weighted = narrow(active * gates[own, None])
        y.index_add_(0, rows[own], narrow(weighted @ down[e].T))
        slope = dy[rows[own]] @ down[e]
        d_gates[own] = (slope * active).sum(1)
        d_inner = narrow(activation_backward(inner, slope, limit, gates[own]).d_inner_NJ)
        dx.index_add_(0, rows[own], narrow(d_inner @ gate_up[e]))
        d_gate_up[e], d_down[e] = d_inner.T @ sent, dy[rows[own]].T @ weighted
    return [y, dx, d_gate_up, d_down, d_gates]


def test_what_is_compiled_is_used() -> None:
    made, why = cpu_kernels(BF16)
    assert made is not None, why


@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize(("width", "inner"), WIDTHS)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_results_and_gradients_are_those_of_the_slow_twin(
    counts: list[int], width: int, inner: int, limit: float | None
) -> None:
    """Sums in float32 are 2^-16 of a step apart: hardly any value is rounded the other way, and
    one that is moves what is made of it by a step of its own. Sums of visits (the result, dx) are
    torch's, which rounds up where two numbers are as near, as with few visits happens often."""
    leaves = rounded(counts, width, inner)
    found, wanted = run(leaves, counts, limit), slow(leaves, counts, limit)
    shares = 0.05, 0.05, 0.001, 0.001, 0.001  # or four values of a small result
    for part, exact, share in zip(found, wanted, shares, strict=True):
        assert part.dtype == BF16
        largest = float(exact.abs().max()) if exact.numel() else 0.0
        torch.testing.assert_close(part.double(), narrow(exact), rtol=0, atol=STEP * largest)
        assert (part != narrow(exact)).sum() <= max(4, share * part.numel())


def test_sums_are_float32() -> None:
    """10,000 visits of one row: summed in bfloat16, a gradient would stand still at 256 of them."""
    counts, leaves = [10_000], [torch.ones(1, 2), torch.ones(1, 4, 2), torch.ones(1, 2, 2)]
    x, gate_up, down = (leaf.to(BF16).requires_grad_() for leaf in leaves)
    rows_N = torch.zeros(10_000, dtype=torch.int64)
    sent = Dispatched(x, rows_N, torch.tensor(counts), None)
    swiglu_on_cpu(sent, gate_up, down, None).sum().backward()
    active = narrow(2 * 2 * torch.sigmoid(torch.tensor(2.0, dtype=torch.float64)))
    assert down.grad is not None
    assert torch.equal(down.grad.double(), narrow(1e4 * active).expand(1, 2, 2))


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_bits() -> None:
    counts = [30, 0, 201, 5, 64, 1, 7, 150]
    leaves = rounded(counts, 64, 48)
    assert_threads_change_no_bit(lambda: run(leaves, counts, 0.7))


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    counts = [21, 13]
    leaves = rounded(counts, 24, 16)
    assert_a_row_spoils_no_other(leaves, lambda: run(leaves, counts))


def test_it_serves_even_widths() -> None:
    def served(width: int, inner: int) -> bool:
        x, gate_up, down, gates = rounded([3] * 8, width, inner)
        sent = Dispatched(x, torch.arange(24) % ROWS, torch.tensor([3] * 8), gates)
        experts_swiglu(sent, gate_up, down, None)
        return serves(sent, gate_up, down)

    assert served(8, 6)
    assert not served(7, 6)
    assert not served(8, 5)


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("return sum + single(*a << 16)", "return sum; sum + single(*a << 16)"),
        ("low >> 16 | (high & 0xffff0000u)", "(low & 0xffff0000u) | high >> 16"),
        ("__builtin_convertvector(in >> 16", "__builtin_convertvector(in >> 15"),
        ("if (k + 1 < count) second", "if (k + 2 < count) second"),
        ("paired(to, in, in + n,", "paired(to, in, in,"),
        ("+ 0x7fffu +", "+ 0x27fffu +"),
    ],
    ids=lambda text: text[:24],
)
def test_a_library_that_computes_otherwise_is_not_used(
    right: str, wrong: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = SOURCE.read_text()
    assert right in source
    changed = tmp_path / "experts_cpu.c"
    # Without the units, whatever this processor has: what is changed is also what is compiled.
    changed.write_text(source.replace(right, wrong).replace("__AVX512BF16__", "NO_UNITS"))
    monkeypatch.setattr(module, "SOURCE", changed)
    made, why = made_anew(BF16)
    assert made is None
    assert why.endswith("does not give the twin's results")


def _knows_the_units() -> bool:
    """Whether gcc is there and compiles for processors that have them: anything, not this."""
    if shutil.which("gcc") is None:
        return False
    command = ["gcc", "-march=sapphirerapids", "-x", "c", "-S", "-o", os.devnull, os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


@pytest.mark.skipif(not _knows_the_units(), reason="no gcc that compiles for sapphirerapids")
def test_processors_with_the_units_multiply_two_terms_at_once() -> None:
    """The loop of whole tiles: 12 rows times 2 vectors of sums, which never leave the registers."""
    command = ["gcc", "-O3", "-march=sapphirerapids", "-fPIC", *FLAGS[BF16], "-S", "-o", "-"]
    done = subprocess.run([*command, str(SOURCE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    blocks = re.split(r"^\.\w+:", done.stdout, flags=re.M)
    loops = [block for block in blocks if block.count("vdpbf16ps") == 24]
    assert len(loops) == 2  # also of twice as many rows and one vector, for few columns
    assert all(not re.search(r"zmm\d+, .*\(%r[bs]p\)", loop) for loop in loops)
    assert all(not re.search(r"\(%r[bs]p\), %zmm", loop) for loop in loops)

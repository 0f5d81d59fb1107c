"""SwiGLU in FP8 against its formulas, expert by expert in float64, from a slow quantiser.

Axes: R rows, N visits, D width, I inner width, J = 2 I, E experts.
"""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from configs.train import Fp8Config
from model.dispatch import Dispatched
from model.fp8.experts import fp8_grouped_swiglu, fp8_swiglu
from model.fp8.fp4 import from_fp4, to_fp4
from model.fp8.scheme import Fp8
from model.swiglu import grouped_swiglu, swiglu
from tests.memory import saved_tensors
from tests.references import exact_by_tiles, quantize_by_tiles, relative_gap

SLOW = Fp8("routed_experts", backend_name="reference")
FAST = Fp8("routed_experts")
FP4 = Fp8("routed_experts", Fp8Config(fp4_experts=True), backend_name="reference")
WIDTH = 136
COUNTS = [[0, 5, 130, 0, 9], [3], [0, 0]]
INNER = [128, 96, 130]
"""Blocks of 128 never straddle gate and up of the first, and would with the others."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, *tile: int) -> Tensor:
    return exact_by_tiles(quantize_by_tiles(x.float(), (tile[0], tile[1])))


def rounded_weights(w: Tensor, scheme: Fp8) -> Tensor:
    return from_fp4(*to_fp4(w)).double() if scheme.config.fp4_experts else rounded(w, 128, 128)


def activated(gate: Tensor, up: Tensor, limit: float | None) -> Tensor:
    if limit is not None:
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return F.silu(gate) * up


@dataclass
class Case:
    """Everything that goes in, and the gradient of what comes out."""

    counts: list[int]
    inner: int
    limit: float | None
    weighted: bool

    def __post_init__(self) -> None:
        experts, visits, rows = len(self.counts), sum(self.counts), 40
        self.x = normal(rows, WIDTH, seed=0)
        # Row 39 is never visited; rows differ in size, as do gate and up.
        self.rows = torch.randint(39, (visits,), generator=torch.Generator().manual_seed(1))
        self.gates = torch.rand(visits, generator=torch.Generator().manual_seed(2))
        self.gate_up = normal(experts, 2 * self.inner, WIDTH, seed=3) / WIDTH**0.5
        self.gate_up[:, self.inner :] *= 50
        self.down = normal(experts, WIDTH, self.inner, seed=4)
        self.dy = normal(rows, WIDTH, seed=5) * torch.logspace(-4, 0, rows)[:, None]

    def leaves(self) -> list[Tensor]:
        chosen = [self.x, self.gate_up, self.down, *([self.gates] if self.weighted else [])]
        return [tensor.clone().requires_grad_() for tensor in chosen]

    def sent(self, x: Tensor, gates: Tensor | None) -> Dispatched:
        return Dispatched(x, self.rows, torch.tensor(self.counts), gates)

    def found(self, scheme: Fp8) -> list[Tensor]:
        """y and the gradients of x, gate and up, down and, if there are any, gates."""
        leaves = self.leaves()
        x, gate_up, down = leaves[:3]
        sent = self.sent(x, leaves[3] if self.weighted else None)
        y = fp8_grouped_swiglu(sent, gate_up, down, self.limit, scheme)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.dy)]

    def expected(self, scheme: Fp8) -> list[Tensor]:
        """The same by the formulas; products in float64, everything between them in float32."""
        y, dx = torch.zeros_like(self.x).double(), torch.zeros_like(self.x).double()
        d_gate_up = torch.zeros_like(self.gate_up).double()
        d_down, d_gates = torch.zeros_like(self.down).double(), []
        x8, dy8 = rounded(self.x, 1, 128), rounded(self.dy, 1, 128)
        parts = zip(self.rows.split(self.counts), self.gates.split(self.counts), strict=True)
        for e, (rows, weights) in enumerate(parts):
            if not len(rows):
                continue
            gate8, up8 = (rounded_weights(w, scheme) for w in self.gate_up[e].chunk(2))
            down8 = rounded_weights(self.down[e], scheme)
            scale = weights[:, None] if self.weighted else torch.ones(len(rows), 1)
            gate, up = (x8[rows] @ gate8.T).float(), (x8[rows] @ up8.T).float()
            inner = activated(gate, up, self.limit) * scale
            y.index_add_(0, rows, rounded(inner, 1, 128) @ down8.T)
            # What the backward pass sees is what was saved in FP8.
            gate, up = (rounded(part, 1, 128).float().requires_grad_() for part in (gate, up))
            inner = activated(gate, up, self.limit)
            d_inner = (dy8[rows] @ down8).float()
            d_gates.append((d_inner * inner.detach()).sum(1).double())
            d_gate, d_up = torch.autograd.grad(inner, (gate, up), d_inner * scale)
            along = rounded(inner.detach() * scale, 128, 1)
            d_down[e] = rounded(self.dy[rows], 128, 1).T @ along
            x_along = rounded(x8[rows], 128, 1)
            slopes = torch.cat([rounded(d_gate, 128, 1), rounded(d_up, 128, 1)], 1)
            d_gate_up[e] = slopes.T @ x_along
            part = rounded(d_gate, 1, 128) @ gate8 + rounded(d_up, 1, 128) @ up8
            dx.index_add_(0, rows, part)
        if not self.weighted:
            return [y, dx, d_gate_up, d_down]
        return [y, dx, d_gate_up, d_down, torch.cat(d_gates) if d_gates else self.gates.double()]


def assert_all_near(found: list[Tensor], expected: list[Tensor], gap: float) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert bool(one.isfinite().all())
        if other.any():
            assert relative_gap(one, other) < gap
        else:
            assert not one.any()


ROUNDING = 1e-6
"""Sums in another order move a value across a half way now and then, by a step of E4M3; all else
is float32's rounding. A rounding left out or put where none belongs makes 1e-4 and more."""


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("weighted", [True, False])
def test_experts_compute_their_formulas_in_fp8(
    counts: list[int], inner: int, weighted: bool
) -> None:
    case = Case(counts, inner, None, weighted)
    expected = case.expected(SLOW)
    assert_all_near(case.found(SLOW), expected, 1e-9)
    assert_all_near(case.found(FAST), expected, ROUNDING)


@pytest.mark.parametrize("weighted", [True, False])
def test_a_limit_holds_activations_and_stops_their_slopes(weighted: bool) -> None:
    case = Case(COUNTS[0], 96, 0.7, weighted)
    expected = case.expected(SLOW)
    assert_all_near(case.found(SLOW), expected, 1e-9)
    assert_all_near(case.found(FAST), expected, ROUNDING)
    free = Case(COUNTS[0], 96, None, weighted).expected(SLOW)
    assert all(relative_gap(a, b) > 1e-2 for a, b in zip(free, expected, strict=True))


@pytest.mark.parametrize("inner", [128, 96])
def test_experts_in_fp4_differ_in_their_weights_alone(inner: int) -> None:
    case = Case(COUNTS[0], inner, None, True)
    assert_all_near(case.found(FP4), case.expected(FP4), 1e-9)


def test_rounding_is_there_to_be_seen() -> None:
    """Or the tests above could not fail: unrounded, all results lie much further off."""
    case = Case(COUNTS[0], 128, None, True)
    leaves = case.leaves()
    x, gate_up, down, gates = leaves
    y = grouped_swiglu(case.sent(x, gates), gate_up, down, None)
    plain = [y, *torch.autograd.grad(y, leaves, case.dy)]
    for one, other in zip(plain, case.expected(SLOW), strict=True):
        assert 1e-4 < relative_gap(one, other) < 2e-2


def test_activations_are_made_again_from_what_was_saved() -> None:
    """With gate and up saved as they were, the gradient of down would be another."""
    case = Case([60], 128, None, True)
    gate, up = (
        (rounded(case.x, 1, 128)[case.rows] @ rounded(w, 128, 128).T).float()
        for w in case.gate_up[0].chunk(2)
    )
    along = rounded(activated(gate, up, None) * case.gates[:, None], 128, 1)
    from_unrounded = rounded(case.dy[case.rows], 128, 1).T @ along
    d_down = case.found(SLOW)[3]
    assert relative_gap(d_down, case.expected(SLOW)[3]) < 1e-9
    assert relative_gap(d_down[0], from_unrounded) > 1e-4


@pytest.mark.parametrize("limit", [None, 0.7])
@pytest.mark.parametrize("inner", [128, 96, 130])
def test_the_dense_block_is_one_expert_that_every_row_visits(
    inner: int, limit: float | None
) -> None:
    case = Case([40], inner, limit, weighted=False)
    case.rows = torch.arange(40)
    expected = case.expected(SLOW)
    for scheme, gap in ((SLOW, 1e-9), (FAST, ROUNDING)):
        x, gate_up, down = (tensor.clone().requires_grad_() for tensor in case.leaves())
        gate, up = gate_up[0].chunk(2)
        y = fp8_swiglu(x.view(4, 10, WIDTH), gate, up, down[0], limit, scheme)
        assert y.shape == (4, 10, WIDTH)
        found = torch.autograd.grad(y, (x, gate_up, down), case.dy.view(4, 10, WIDTH))
        assert_all_near([y.detach().flatten(0, 1), *found], expected, gap)


def test_a_gate_that_is_much_smaller_than_up_keeps_scales_of_its_own() -> None:
    """Quantised as one block, it would lose most of its bits; 2 x 8 rows lie within one of 128."""
    x, down = normal(30, 16, seed=0), normal(16, 8, seed=1)
    gate, up = normal(8, 16, seed=2), 1e6 * normal(8, 16, seed=3)
    exact = swiglu(x, gate, up, down, None)
    assert relative_gap(fp8_swiglu(x, gate, up, down, None, FAST), exact) < 1e-2
    as_one = rounded(torch.cat([gate, up]), 128, 128)[:8].float()
    assert relative_gap(swiglu(x, as_one, up, down, None), exact) > 1e-1


@pytest.mark.parametrize("inner", [256, 96])
def test_a_byte_a_value_is_saved_for_the_backward_pass(inner: int) -> None:
    case = Case(COUNTS[0], inner, None, True)
    x, gate_up, down, gates = case.leaves()
    with saved_tensors() as saved:
        with torch.no_grad():
            silent = fp8_grouped_swiglu(case.sent(x, gates), gate_up, down, None, FAST)
        assert saved == []
        assert torch.equal(
            fp8_grouped_swiglu(case.sent(x, gates), gate_up, down, None, FAST), silent
        )
    visits, experts = sum(case.counts), len(case.counts)
    values = sorted(t.numel() for t in saved if t.element_size() == 1)
    halves = [experts * 2 * inner * WIDTH] if inner == 256 else [experts * inner * WIDTH] * 2
    assert values == sorted([40 * WIDTH, visits * 2 * inner, experts * WIDTH * inner, *halves])
    # The rest are scales, one for 128 values at least, and each visit's row and gate.
    others = sum(t.numel() for t in saved if t.element_size() > 1)
    assert others < sum(values) / 40 + 2 * visits


@pytest.mark.parametrize(
    "config",
    [Fp8Config(gradient_scaling="block"), Fp8Config(scaling="tensor")],
    ids=["block", "tensor"],
)
def test_coarser_scaling_runs_too_and_shows_what_it_loses(config: Fp8Config) -> None:
    """Rows whose gradients are a millionth of their neighbours' have none left."""
    case = Case([390], 128, None, weighted=True)
    case.rows = torch.arange(390) % 39
    case.dy[::2] *= 1e-6
    leaves = case.leaves()
    x, gate_up, down, gates = leaves
    y = grouped_swiglu(case.sent(x, gates), gate_up, down, None)
    exact = torch.autograd.grad(y, leaves, case.dy)[0]
    coarse = Fp8("routed_experts", config)
    for scheme, lost in ((FAST, False), (coarse, True)):
        dx = case.found(scheme)[1]
        assert relative_gap(dx[1::2], exact[1::2]) < 1e-2
        assert (relative_gap(dx[:39:2], exact[:39:2]) > 0.5) == lost


def test_shapes_of_rows_without_visits_are_kept() -> None:
    case = Case([0, 0], 96, None, True)
    y, dx, *others = case.found(FAST)
    assert y.shape == dx.shape == case.x.shape
    assert not any(tensor.any() for tensor in (y, dx, *others))

"""FP4 weights against a loop over groups, and that E4M3 holds them to the last bit.

Axes: O outputs, I inputs, G groups of 32 inputs.
"""

import math

import pytest
import torch
from torch import Tensor

from configs.train import Fp8Config
from model.fp8.cpu import Cpu
from model.fp8.fp4 import as_e4m3, from_fp4, through_fp4, to_fp4
from model.fp8.grouped import fp8_grouped_linear
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, BLOCK, Quantized
from model.fp8.scheme import Fp8
from tests.references import exact_by_tiles, next_power_of_two, quantize_by_tiles, relative_gap

VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
SHAPES = [(1, 1), (3, 32), (130, 200), (257, 64), (128, 256)]
PLAIN = Fp8("routed_experts")
FP4 = Fp8("routed_experts", Fp8Config(fp4_experts=True))


def weights(*shape: int, seed: int = 0, spread: float = 0.0) -> Tensor:
    """Normal draws; groups of 32 differ by powers of two, of which `spread` is the deviation."""
    generator = torch.Generator().manual_seed(seed)
    groups = (*shape[:-1], math.ceil(shape[-1] / 32))
    exponents = (spread * torch.randn(groups, generator=generator)).round().int()
    x = torch.randn(shape, generator=generator)
    return torch.ldexp(x, exponents.repeat_interleave(32, -1)[..., : shape[-1]])


def by_groups(w_OI: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of a matrix, one group and one value after another."""
    outputs, inputs = w_OI.shape
    scales = torch.empty(outputs, math.ceil(inputs / 32))
    for o in range(outputs):
        for g in range(scales.shape[1]):
            amax = w_OI[o, 32 * g : 32 * (g + 1)].abs().max()
            scales[o, g] = next_power_of_two(max(float(amax / 6), 2.0**-120))
    codes = torch.empty(outputs, inputs, dtype=torch.uint8)
    raised = scales.clone()
    for o in range(outputs):
        for g in range(scales.shape[1]):
            block = scales[o // 128 * 128 : o // 128 * 128 + 128, g // 4 * 4 : g // 4 * 4 + 4]
            raised[o, g] = max(float(scales[o, g]), float(block.max()) * 2.0**-14)
        for i in range(inputs):
            magnitude = abs(float(w_OI[o, i])) / float(raised[o, i // 32])
            # Of two equally near, the one with the even code.
            code = min(range(8), key=lambda c: (abs(VALUES[c] - magnitude), c % 2))
            codes[o, i] = code + (8 if math.copysign(1, float(w_OI[o, i])) < 0 else 0)
    return codes, raised


@pytest.mark.parametrize("spread", [0.0, 8.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_groups_are_rounded_to_the_nearest_fp4(shape: tuple[int, int], spread: float) -> None:
    w = weights(*shape, spread=spread)
    w[0, 0] = 0
    for found, expected in zip(to_fp4(w), by_groups(w), strict=True):
        assert torch.equal(found, expected)


def test_powers_of_two_cover_the_largest_of_a_group() -> None:
    w = torch.zeros(3, 32)
    w[0, 0], w[1, 0], w[2, 0] = 6.0, torch.tensor(6.0).nextafter(torch.tensor(7.0)), -3.0
    _, scales = to_fp4(w)
    assert scales.flatten().tolist() == [1.0, 2.0, 0.5]


def assert_lossless(codes: Tensor, scales: Tensor) -> None:
    """Float64 holds both forms exactly."""
    values, blocks = as_e4m3(codes, scales)
    fp4 = torch.tensor([*VALUES, *(-v for v in VALUES)], dtype=torch.float64)[codes.long()]
    fp4 *= scales.double().repeat_interleave(32, -1)[..., : codes.shape[-1]]
    assert torch.equal(from_fp4(codes, scales).double(), fp4)
    assert torch.equal(exact_by_tiles(Quantized(values, blocks, BLOCK)), fp4)


@pytest.mark.parametrize("spread", [0.0, 2.0, 4.0, 12.0, 30.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_e4m3_holds_fp4_without_loss(shape: tuple[int, int], spread: float) -> None:
    for seed in range(5):
        w = weights(*shape, seed=seed, spread=spread)
        assert_lossless(*to_fp4(w))
        found = through_fp4(w)
        assert torch.equal(exact_by_tiles(found), from_fp4(*to_fp4(w)).double())
        assert found.values.float().abs().max() <= 6 * 2**6


def test_every_fp4_value_in_every_group_that_may_stand_beside_is_held() -> None:
    codes = torch.arange(16, dtype=torch.uint8).repeat(15, 2)
    scales = 2.0 ** torch.arange(0, -15, -1).unsqueeze(1)
    assert_lossless(codes, scales)
    # One power further down, half a step is lost.
    with pytest.raises(AssertionError):
        assert_lossless(codes, torch.where(scales == 2.0**-14, 2.0**-15, scales))


def test_groups_far_below_their_blocks_largest_are_raised() -> None:
    w = torch.ones(130, 160) * 6.0
    w[1, :32], w[2, :32], w[3, :32] = 6 * 2.0**-14, 6 * 2.0**-15, 6 * 2.0**-30
    w[129, :32] = w[1, 128:] = 6 * 2.0**-30
    codes, scales = to_fp4(w)
    assert scales[1:4, 0].tolist() == [2.0**-14] * 3
    assert from_fp4(codes, scales)[1:4, 0].tolist() == [6 * 2.0**-14, 6 * 2.0**-15, 0.0]
    # Another block has another largest, and alone nothing is raised.
    assert scales[129, 0] == 2.0**-14
    assert to_fp4(w[129:, :32])[1].item() == 2.0**-30
    assert scales[1, 4] == 2.0**-14
    assert_lossless(codes, scales)


@pytest.mark.parametrize("size", [0.0, 1e-45, 1e-36, 1e37])
def test_weights_of_any_size_are_finite_and_held(size: float) -> None:
    w = weights(40, 70) * size
    codes, scales = to_fp4(w)
    assert bool((scales >= 2.0**-120).all())
    assert_lossless(codes, scales)
    assert bool(from_fp4(codes, scales).isfinite().all())


def test_stacked_experts_are_rounded_one_by_one() -> None:
    w = weights(3, 130, 70, spread=6.0)
    codes, scales = to_fp4(w)
    values, blocks = as_e4m3(codes, scales)
    for e in range(3):
        alone = to_fp4(w[e])
        assert torch.equal(codes[e], alone[0])
        assert torch.equal(scales[e], alone[1])
        assert torch.equal(values[e].float(), as_e4m3(*alone)[0].float())
        assert torch.equal(blocks[e], as_e4m3(*alone)[1])


@pytest.mark.parametrize("culprit", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_not_hidden(culprit: float) -> None:
    w = weights(130, 64)
    w[3, 40] = culprit
    q = through_fp4(w)
    assert not bool(q.scales[0].isfinite().any())
    assert bool(q.scales[1].isfinite().all())
    assert not bool(exact_by_tiles(q)[3, 40].isfinite())


@pytest.mark.parametrize("name", ["auto", "reference", "eager"])
def test_experts_products_are_those_of_fp4_values(name: str) -> None:
    counts = [5, 0, 60]
    w, x = weights(3, 140, 200, spread=3.0), weights(65, 200, seed=1)
    if name == "eager":
        backend = Cpu(None)
        y = backend.grouped_matmul(
            backend.quantize(x, ACTIVATION), through_fp4(w).T, Groups.of(counts)
        )
    else:
        scheme = Fp8("routed_experts", FP4.config, "auto" if name == "auto" else "reference")
        y = fp8_grouped_linear(x, w.flatten(0, 1), Groups.of(counts), scheme)
    x8_exact = exact_by_tiles(quantize_by_tiles(x, (1, 128))).split(counts)
    parts = zip(y.split(counts), x8_exact, w, strict=True)
    for found, rows, matrix in parts:
        exact_w = from_fp4(*to_fp4(matrix)).double()
        bound = (200 + 8) * 2.0**-24 * (rows.abs() @ exact_w.abs().T)
        assert bool(((found.double() - rows @ exact_w.T).abs() <= bound).all())
        if len(rows):
            plain = exact_by_tiles(quantize_by_tiles(matrix, (128, 128)))
            assert bool(((found.double() - rows @ plain.T).abs() > bound).any())


def test_gradients_pass_to_the_master_weight_as_if_nothing_had_been_rounded() -> None:
    counts = [5, 60]
    x, dy = weights(65, 200, seed=1), weights(65, 140, seed=2)
    grads = []
    for scheme in (PLAIN, FP4):
        w = weights(2, 140, 200, spread=3.0).requires_grad_()
        leaf = x.clone().requires_grad_()
        fp8_grouped_linear(leaf, w.flatten(0, 1), Groups.of(counts), scheme).backward(dy)
        assert w.grad is not None
        assert leaf.grad is not None
        grads.append((w.grad, leaf.grad))
    (plain, plain_dx), (through, dx) = grads
    assert torch.equal(plain, through)
    assert bool((through != 0).all())
    # The input's gradient is of the rounded weights.
    assert relative_gap(dx, plain_dx) > 1e-4
    w8 = exact_by_tiles(through_fp4(weights(2, 140, 200, spread=3.0)[1]))
    expected = exact_by_tiles(quantize_by_tiles(dy, (1, 128)))[5:] @ w8
    torch.testing.assert_close(dx[5:].double(), expected, rtol=1e-4, atol=1e-3)


def test_a_master_weight_moves_by_less_than_a_step_of_fp4_and_arrives() -> None:
    """Steps that FP4 cannot see add up in the master weight until it can."""
    w = torch.full((32, 32), 1.0)
    w[..., 0] = 6.0  # holds the scale
    target = torch.full((32, 32), 1.5)
    target[..., 0] = 6.0
    w.requires_grad_()
    x = torch.eye(32)
    optimizer = torch.optim.SGD([w], lr=0.02)
    seen = []
    for _ in range(60):
        y = fp8_grouped_linear(x, w, Groups.of([32]), FP4)
        seen.append(float(y.detach()[5, 5]))
        optimizer.zero_grad()
        (0.5 * (y - target.T).square().sum()).backward()
        optimizer.step()
    assert seen[:10] == [1.0] * 10
    assert seen[-1] == 1.5


def test_only_routed_experts_are_rounded_to_fp4() -> None:
    w = weights(130, 200, spread=2.0)
    config = Fp8Config(fp4_experts=True)
    for part in ("attention", "shared_experts", "dense_ffn", "head"):
        assert torch.equal(
            exact_by_tiles(Fp8(part, config).weights(w)),
            exact_by_tiles(quantize_by_tiles(w, (128, 128))),
        )
    assert torch.equal(
        exact_by_tiles(Fp8("routed_experts", config).weights(w)), from_fp4(*to_fp4(w)).double()
    )
    x = weights(9, 200)
    one, other = FP4.activations(x), PLAIN.activations(x)
    assert torch.equal(one.values.float(), other.values.float())
    assert torch.equal(one.scales, other.scales)

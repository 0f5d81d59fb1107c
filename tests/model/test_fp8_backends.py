"""Every backend that runs anywhere: casts bit for bit, products within float32's order.

What they are compared with is `tests.references`: one tile after another, and float64.
"""

import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.errors import DataError, MachineError
from model.fp8.backends import (
    Backend,
    backend_for,
    choose,
    dequantize,
    grouped_matmul,
    grouped_outer,
    matmul,
    quantize,
)
from model.fp8.cpu import Cpu, cpu_backend
from model.fp8.format import E4M3_MAX, E5M6_MAX, from_e5m6, to_e5m6, unpack_e5m6
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized, Tile
from model.fp8.reference import Reference
from tests.references import (
    exact_by_tiles,
    flushed_share,
    next_power_of_two,
    quantize_by_tiles,
    relative_gap,
)

BACKENDS: dict[str, Backend] = {
    "reference": Reference(),
    "compiled": cpu_backend()[0],
    "eager": Cpu(None),
}
WHOLE: Tile = (2**62, 2**62)
TILES = [ACTIVATION, ALONG_TOKENS, BLOCK, WHOLE, (48, 40)]
SHAPES = [(1, 1), (128, 128), (3, 300), (300, 3), (129, 257), (64, 64)]
COUNTS = [[5], [128, 128], [0, 130, 0, 1, 127, 300, 0], [1] * 9, [0, 0, 256], [0, 0]]

every_backend = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
every_tile = pytest.mark.parametrize("tile", TILES, ids=["1x128", "128x1", "block", "whole", "odd"])
either_scale = pytest.mark.parametrize("power_of_two", [False, True], ids=["float32", "ue8m0"])


def random_matrix(shape: tuple[int, ...], seed: int = 0, spread: float = 4.0) -> Tensor:
    """Normal draws whose magnitudes differ by powers of two between entries."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return torch.ldexp(x, (spread * torch.randn(shape, generator=generator)).round().int())


def difficult_matrix() -> Tensor:
    """Tiles that are zero, tiny, huge, exactly at the edge, or hold subnormals of either format."""
    x = random_matrix((256, 256), seed=1)
    x[:128, :128] = 0
    x[128:, 128] = 0
    x[0, 128:] = 448.0
    x[1, 128:] = -448.0
    x[2, 128:] = 2.0**-149
    x[3, 128:] = E4M3_MAX * 2.0**-126  # the smallest scale that counts
    x[4, 128:] = E4M3_MAX * 2.0**-126 * (1 - 2.0**-24)  # just below it
    x[5, 128:] = 3e38
    x[6, 128:] = torch.logspace(-12, 2, 128)  # most of them subnormal after scaling
    x[7, 128:] = -0.0
    x[8, 128:] = 1e-45
    x[9, 128:190] = -0.0
    return x


def assert_same(found: Quantized, expected: Quantized) -> None:
    """The same bits, and in float32, where that is at hand, the same numbers."""
    assert found.values.dtype == torch.float8_e4m3fn
    assert found.values.shape == expected.values.shape
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert_same_floats(found.scales, expected.scales)
    assert found.tile == expected.tile
    counts = [None if q.groups is None else q.groups.on_host for q in (found, expected)]
    assert counts[0] == counts[1]
    if found.float32 is not None and found.float32.dim() == 2:
        float32 = exact_by_tiles(expected).float()
        assert torch.equal(found.float32.isnan(), float32.isnan())
        assert torch.equal(found.float32.nan_to_num(), float32.nan_to_num())


def assert_same_floats(found: Tensor, expected: Tensor) -> None:
    """The same bits, but that every NaN is as good as another."""
    assert found.dtype == expected.dtype == torch.float32
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    bits = [torch.where(x.isnan(), 0, x).contiguous().view(torch.int32) for x in (found, expected)]
    assert torch.equal(*bits)


def grouped_rows(counts: Sequence[int] | None) -> Groups | None:
    return None if counts is None else Groups.of(counts)


def assert_same_bits(
    backend: Backend,
    x: Tensor,
    tile: Tile,
    power_of_two: bool = False,
    counts: Sequence[int] | None = None,
) -> Quantized:
    found = backend.quantize(x, tile, power_of_two=power_of_two, groups=grouped_rows(counts))
    assert_same(found, quantize_by_tiles(x, tile, power_of_two, counts))
    # From bytes alone, as in a backward pass.
    stored = replace(found, float32=None)
    exact = exact_by_tiles(stored).float()
    assert torch.equal(backend.dequantize(stored).nan_to_num(), exact.nan_to_num())
    return found


# Casts


@every_backend
@every_tile
@either_scale
def test_every_tile_is_quantised_alone(backend: Backend, tile: Tile, power_of_two: bool) -> None:
    for shape in SHAPES:
        assert_same_bits(backend, random_matrix(shape), tile, power_of_two)


@every_backend
@every_tile
@either_scale
def test_zero_tiny_and_extreme_tiles_keep_their_promises(
    backend: Backend, tile: Tile, power_of_two: bool
) -> None:
    found = assert_same_bits(backend, difficult_matrix(), tile, power_of_two)
    assert bool(backend.dequantize(found).isfinite().all())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(sorted(BACKENDS)),
    rows=st.integers(1, 150),
    columns=st.integers(1, 150),
    exponent=st.integers(-149, 120),
    tile=st.sampled_from(TILES),
    power_of_two=st.booleans(),
)
def test_any_shape_and_magnitude_is_quantised_tile_by_tile(
    name: str, rows: int, columns: int, exponent: int, tile: Tile, power_of_two: bool
) -> None:
    x = random_matrix((rows, columns), seed=rows * 151 + columns, spread=1.0)
    x = torch.ldexp(x, torch.tensor(exponent)).clamp(-3e38, 3e38)
    assert_same_bits(BACKENDS[name], x, tile, power_of_two)


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    name=st.sampled_from(sorted(BACKENDS)),
    counts=st.lists(st.integers(0, 140), min_size=1, max_size=5),
    columns=st.integers(1, 140),
    tile=st.sampled_from(TILES),
    power_of_two=st.booleans(),
)
def test_with_counts_tiles_start_anew_with_each_expert(
    name: str, counts: list[int], columns: int, tile: Tile, power_of_two: bool
) -> None:
    x = random_matrix((sum(counts), columns), seed=columns)
    assert_same_bits(BACKENDS[name], x, tile, power_of_two, counts)


@every_backend
@pytest.mark.parametrize("tile", [ALONG_TOKENS, BLOCK], ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_segments_are_quantised_as_if_each_stood_alone(
    backend: Backend, counts: list[int], tile: Tile
) -> None:
    x = random_matrix((sum(counts), 20), seed=6)
    found = assert_same_bits(backend, x, tile, counts=counts)
    alone = [backend.dequantize(backend.quantize(part, tile)) for part in x.split(counts)]
    assert torch.equal(backend.dequantize(found), torch.cat(alone))


@every_backend
@every_tile
def test_stacked_matrices_are_quantised_one_by_one(backend: Backend, tile: Tile) -> None:
    x = random_matrix((2, 3, 130, 140))
    together = backend.quantize(x, tile)
    float32 = backend.dequantize(together)
    for i in range(2):
        for j in range(3):
            alone = quantize_by_tiles(x[i, j], tile)
            part = Quantized(together.values[i, j], together.scales[i, j], tile)
            assert_same(part, alone)
            assert torch.equal(float32[i, j], exact_by_tiles(alone).float())
            stored = replace(together, float32=None)
            assert torch.equal(backend.dequantize(stored), float32)


@every_backend
@every_tile
def test_a_stack_of_no_matrices_stays_one(backend: Backend, tile: Tile) -> None:
    q = backend.quantize(torch.zeros(0, 130, 140), tile)
    assert q.scales.shape == (0, -(-130 // tile[0]), -(-140 // tile[1]))
    assert backend.dequantize(q).shape == (0, 130, 140)


@every_backend
@every_tile
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types_and_views_are_quantised_as_the_float32_that_they_hold(
    backend: Backend, tile: Tile, dtype: torch.dtype
) -> None:
    x = random_matrix((140, 200), spread=2.0).to(dtype)
    assert_same_bits(backend, x, tile)
    assert_same_bits(backend, x.T, tile)
    assert_same_bits(backend, x[3::2, 5:190], tile)


@every_backend
@every_tile
@pytest.mark.parametrize("counts", [None, [0, 70, 130]], ids=str)
@pytest.mark.parametrize(
    ("source", "power_of_two"), [(ACTIVATION, False), (BLOCK, True)], ids=["1x128", "block"]
)
def test_what_is_quantised_is_read_back_and_quantised_again(
    backend: Backend, source: Tile, power_of_two: bool, counts: list[int] | None, tile: Tile
) -> None:
    x8 = backend.quantize(random_matrix((200, 260)), source)
    expected = quantize_by_tiles(exact_by_tiles(x8).float(), tile, power_of_two, counts)
    stored = replace(x8, float32=None)
    again, at_hand = (
        backend.quantize(q, tile, power_of_two=power_of_two, groups=grouped_rows(counts))
        for q in (stored, x8)
    )
    assert_same(again, expected)
    # The float32 form has lost the sign of zeros.
    assert torch.equal(at_hand.values.float(), expected.values.float())
    assert_same_floats(at_hand.scales, expected.scales)


@every_backend
def test_rows_that_are_picked_keep_their_values_and_scales(backend: Backend) -> None:
    x8 = backend.quantize(random_matrix((9, 200)), ACTIVATION)
    index = torch.tensor([4, 4, 0, 8])
    expected = exact_by_tiles(x8)[index].float()
    for q in (x8, replace(x8, float32=None)):
        assert torch.equal(backend.dequantize(q.rows(index)), expected)


@every_backend
@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40), (5, 0)], ids=str)
@every_tile
def test_a_batch_without_entries_is_quantised_to_nothing(
    backend: Backend, shape: tuple[int, ...], tile: Tile
) -> None:
    q = backend.quantize(torch.zeros(shape), tile)
    assert q.values.shape == shape
    heights = [math.ceil(size / side) for size, side in zip(shape[-2:], tile, strict=True)]
    assert q.scales.shape == (*shape[:-2], *heights)
    assert backend.dequantize(replace(q, float32=None)).shape == shape


@every_backend
@every_tile
@either_scale
@pytest.mark.parametrize("culprit", [torch.nan, torch.inf, -torch.inf])
def test_a_tile_that_is_not_finite_is_nan_throughout_and_its_neighbours_are_untouched(
    backend: Backend, culprit: float, tile: Tile, power_of_two: bool
) -> None:
    x = random_matrix((260, 270))
    before = backend.quantize(x, tile, power_of_two=power_of_two)
    x[130, 140] = culprit
    after = assert_same_bits(backend, x, tile, power_of_two)
    rows, columns = (
        slice(at // side * side, at // side * side + side)
        for at, side in zip((130, 140), tile, strict=True)
    )
    inside = torch.zeros(x.shape, dtype=torch.bool)
    inside[rows, columns] = True
    assert bool((after.values.view(torch.uint8)[inside] == 0x7F).all())
    assert bool(backend.dequantize(after)[inside].isnan().all())
    assert int(after.scales.isnan().sum()) == 1
    outside = [q.values.view(torch.uint8)[~inside] for q in (before, after)]
    assert torch.equal(*outside)
    assert torch.equal(after.scales[~after.scales.isnan()], before.scales[~after.scales.isnan()])


@every_backend
def test_power_of_two_scales_round_up_and_never_overflow(backend: Backend) -> None:
    x = random_matrix((40, 512), seed=2)
    exact = backend.quantize(x, ACTIVATION).scales
    rounded = backend.quantize(x, ACTIVATION, power_of_two=True)
    expected = [next_power_of_two(scale) for scale in exact.flatten().tolist()]
    assert rounded.scales.flatten().tolist() == expected
    assert bool(rounded.values.float().isfinite().all())
    x[:, ::128] = 448 * 2.0**-7  # exact powers of two stay as they are
    x = x.clamp(-448 * 2.0**-7, 448 * 2.0**-7)
    assert bool((backend.quantize(x, ACTIVATION, power_of_two=True).scales == 2.0**-7).all())


@every_backend
def test_errors_are_those_of_three_mantissa_bits(backend: Backend) -> None:
    """Facts of E4M3: relative error <= 2^-4 for normals, absolute <= scale * 2^-10 below."""
    x = random_matrix((64, 512), seed=4)
    q = backend.quantize(x, ACTIVATION)
    scale = q.scales.repeat_interleave(128, 1)
    error = (backend.dequantize(q) - x).abs()
    normal = (x / scale).abs() >= 2.0**-6
    assert bool((error[normal] <= x[normal].abs() * 2.0**-4 * (1 + 1e-6)).all())
    assert bool((error[~normal] <= scale[~normal] * 2.0**-10 * (1 + 1e-6)).all())
    plain = torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
    after = backend.dequantize(backend.quantize(plain, ACTIVATION))
    assert 1e-5 < relative_gap(plain, after) < 6e-4


@every_backend
def test_one_outlier_spoils_a_tensors_scale_but_only_its_own_tile(backend: Backend) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
    x[3, 130] = 1e4 * x.abs().max()
    elsewhere = torch.ones(x.shape, dtype=torch.bool)
    elsewhere[3, 128:256] = False

    def passes(tile: Tile) -> list[bool]:
        after = backend.dequantize(backend.quantize(x, tile))[elsewhere]
        before = x[elsewhere]
        return [relative_gap(before, after) < 1e-3, flushed_share(before, after) < 1e-3]

    assert passes(ACTIVATION) == [True, True]
    assert passes(WHOLE) == [False, False]


# Products


def sized(*shape: int, seed: int) -> Tensor:
    """Normal draws whose rows differ in size."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return x * torch.logspace(-3, 3, shape[-2])[:, None]


def violations(found: Tensor, left: Tensor, right: Tensor) -> int:
    """Of how many entries float32 sums of K exact products cannot have come so far off."""
    bound = (left.shape[-1] + 8) * 2.0**-24 * (left.abs() @ right.abs())
    assert found.dtype == torch.float32
    assert found.shape == bound.shape
    return int(((found.double() - left @ right).abs() > bound).sum())


def training_pairs(
    backend: Backend, tokens: int, inputs: int, outputs: int
) -> dict[str, tuple[Quantized, Quantized]]:
    """The operands of a Linear's three products."""
    x8 = backend.quantize(sized(tokens, inputs, seed=1), ACTIVATION)
    w8 = backend.quantize(sized(outputs, inputs, seed=2), BLOCK)
    dy = sized(tokens, outputs, seed=3)
    dy_tokens = backend.quantize(dy, ALONG_TOKENS)
    return {
        "forward": (x8, w8.T),
        "input gradient": (backend.quantize(dy, ACTIVATION), w8),
        "weight gradient": (dy_tokens.T, backend.quantize(x8, ALONG_TOKENS)),
    }


@every_backend
@pytest.mark.parametrize("shape", [(1, 16, 16), (40, 128, 256), (200, 130, 48), (129, 300, 129)])
@pytest.mark.parametrize("stored", [False, True])
def test_products_are_exact_but_for_the_order_of_additions(
    backend: Backend, shape: tuple[int, int, int], stored: bool
) -> None:
    for left, right in training_pairs(backend, *shape).values():
        exact = [exact_by_tiles(q) for q in (left, right)]
        if stored:
            left, right = replace(left, float32=None), replace(right, float32=None)
        assert violations(backend.matmul(left, right), exact[0], exact[1]) == 0


@every_backend
def test_the_bound_of_products_sees_a_wrong_scale_and_operands_that_were_not_rounded(
    backend: Backend,
) -> None:
    for name, (left, right) in training_pairs(backend, 200, 300, 140).items():
        exact = [exact_by_tiles(q) for q in (left, right)]
        scales = left.scales.clone()
        scales[-1, -1] *= 1 + 2.0**-8
        wrong = replace(left, scales=scales, float32=None)
        assert violations(backend.matmul(wrong, right), exact[0], exact[1]) > 0, name
    x, w = sized(200, 300, seed=1), sized(140, 300, seed=2)
    left, right = training_pairs(backend, 200, 300, 140)["forward"]
    exact = [exact_by_tiles(q) for q in (left, right)]
    assert violations(x @ w.T, exact[0], exact[1]) > 200 * 140 * 0.9


GROUPS = [[4], [0, 5, 130, 0, 257, 1], [0, 0, 3], [0, 0]]


@every_backend
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("counts", GROUPS, ids=str)
def test_grouped_products_are_each_experts_own(
    backend: Backend, counts: list[int], stored: bool
) -> None:
    rows, experts, groups = sum(counts), len(counts), Groups.of(counts)
    x8 = backend.quantize(sized(rows, 136, seed=1), ACTIVATION)
    w8 = backend.quantize(sized(experts, 192, 136, seed=2), BLOCK)
    dy8 = backend.quantize(sized(rows, 192, seed=3), ACTIVATION)
    x_tokens, dy_tokens = (
        backend.quantize(q, ALONG_TOKENS, groups=groups) for q in (x8, sized(rows, 192, seed=3))
    )
    weights = [
        exact_by_tiles(Quantized(values, scales, BLOCK))
        for values, scales in zip(w8.values, w8.scales, strict=True)
    ]
    exact = [exact_by_tiles(q).split(counts) for q in (x8, dy8, x_tokens, dy_tokens)]
    if stored:
        x8, w8, dy8, x_tokens, dy_tokens = (
            replace(q, float32=None) for q in (x8, w8, dy8, x_tokens, dy_tokens)
        )
    y = backend.grouped_matmul(x8, w8.T, groups)
    dx = backend.grouped_matmul(dy8, w8, groups)
    dw = backend.grouped_outer(dy_tokens, x_tokens, groups)
    assert (y.shape, dx.shape, dw.shape) == ((rows, 192), (rows, 136), (experts, 192, 136))
    parts = zip(y.split(counts), dx.split(counts), dw, weights, *exact, strict=True)
    for y_part, dx_part, dw_part, w, x, dy, x_along, dy_along in parts:
        assert violations(y_part, x, w.T) == 0
        assert violations(dx_part, dy, w) == 0
        assert violations(dw_part, dy_along.T, x_along) == 0
    for count, slope in zip(counts, dw, strict=True):
        assert bool(slope.any()) == (count > 0)


@every_backend
def test_counts_and_matrices_of_different_numbers_are_refused(backend: Backend) -> None:
    x8 = backend.quantize(sized(4, 8, seed=1), ACTIVATION)
    w8 = backend.quantize(sized(2, 8, 8, seed=2), BLOCK)
    with pytest.raises(DataError, match="3 counts of rows for 2 experts' matrices"):
        backend.grouped_matmul(x8, w8, Groups.of([1, 1, 2]))


# E5M6


@every_backend
@pytest.mark.parametrize("shape", [(1, 1), (5, 128), (7, 300), (3, 133), (0, 9)], ids=str)
def test_what_is_saved_in_e5m6_has_scales_that_are_powers_of_two(
    backend: Backend, shape: tuple[int, int]
) -> None:
    x = random_matrix(shape, spread=6.0)
    packed = backend.quantize_e5m6(x)
    assert packed.words.dtype == torch.int32
    assert packed.words.shape == (shape[0], 3 * math.ceil(shape[1] / 8))
    assert packed.scales.shape == (shape[0], math.ceil(shape[1] / 128))
    read = backend.dequantize_e5m6(packed)
    assert read.shape == x.shape
    for row, (line, words) in enumerate(zip(x, unpack_e5m6(packed.words), strict=True)):
        for j in range(packed.scales.shape[1]):
            part = line[128 * j : 128 * (j + 1)]
            scale = next_power_of_two(float(part.abs().max() / E5M6_MAX))
            assert float(packed.scales[row, j]) == scale
            codes = to_e5m6(part / scale)
            assert torch.equal(words[128 * j : 128 * j + len(part)], codes)
            assert torch.equal(read[row, 128 * j : 128 * (j + 1)], from_e5m6(codes) * scale)
        assert not words[shape[1] :].any()


@every_backend
def test_e5m6_keeps_zero_tiny_and_extreme_rows_and_marks_what_is_not_finite(
    backend: Backend,
) -> None:
    x = difficult_matrix()
    assert_same_floats(
        backend.dequantize_e5m6(backend.quantize_e5m6(x)),
        Reference().dequantize_e5m6(Reference().quantize_e5m6(x)),
    )
    assert torch.equal(backend.quantize_e5m6(x).words, Reference().quantize_e5m6(x).words)
    plain = random_matrix((4, 256), spread=1.0)
    for culprit in (torch.nan, torch.inf):
        broken = plain.clone()
        broken[2, 3] = culprit
        read = backend.dequantize_e5m6(backend.quantize_e5m6(broken))
        assert bool(read[2, :128].isnan().all())
        read[2, :128] = backend.dequantize_e5m6(backend.quantize_e5m6(plain))[2, :128]
        assert torch.equal(read, backend.dequantize_e5m6(backend.quantize_e5m6(plain)))


@every_backend
def test_e5m6_loses_a_hundredth_of_what_e4m3_does(backend: Backend) -> None:
    x = torch.randn(64, 512, generator=torch.Generator().manual_seed(5))
    gap = relative_gap(x, backend.dequantize_e5m6(backend.quantize_e5m6(x)))
    assert 1e-6 < gap < 2.0**-14 / 3
    assert gap < relative_gap(x, backend.dequantize(backend.quantize(x, ACTIVATION))) / 30


# Choosing one


def test_the_short_names_mean_the_backend_of_the_tensors_device() -> None:
    x, w = sized(6, 130, seed=1), sized(2, 40, 130, seed=2)
    x8, w8 = quantize(x), quantize(w, BLOCK)
    backend = backend_for(torch.device("cpu"))
    assert_same(x8, quantize_by_tiles(x, ACTIVATION))
    assert torch.equal(dequantize(x8), backend.dequantize(x8))
    one = Quantized(w8.values[0], w8.scales[0], BLOCK)
    assert torch.equal(matmul(x8, one.T), backend.matmul(x8, one.T))
    groups = Groups.of([2, 4])
    grouped = grouped_matmul(x8, w8.T, groups)
    assert torch.equal(grouped, backend.grouped_matmul(x8, w8.T, groups))
    along = backend.quantize(x, ALONG_TOKENS, groups=groups)
    outer = grouped_outer(along, along, groups)
    assert torch.equal(outer, backend.grouped_outer(along, along, groups))


def test_a_backend_is_chosen_by_device_and_says_why() -> None:
    cpu = torch.device("cpu")
    assert choose(cpu).backend is cpu_backend()[0]
    assert choose(cpu, "cpu").reason == cpu_backend()[1]
    assert isinstance(backend_for(cpu, "reference"), Reference)
    for wanted in ("cublas", "triton"):
        with pytest.raises(MachineError, match=wanted):
            choose(cpu, wanted)


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_is_one(name: str) -> None:
    assert isinstance(BACKENDS[name], Backend)

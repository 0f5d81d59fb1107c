"""Block-scaled E4M3 against torch's own cast, tile by tile, and rounding against statistics."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.fp8.format import (
    E4M3_MAX,
    SMALLEST_SCALE,
    dequantize,
    quantize,
    round_to_grid,
    round_trip,
    round_trip_segments,
)
from tests.references import quantize_by_tiles

TILES = [(1, 128), (128, 1), (128, 128)]
SHAPES = [(1, 1), (128, 128), (3, 300), (300, 3), (129, 257), (64, 64)]


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
    return x


def assert_same_bits(x: Tensor, tile: tuple[int, int], power_of_two: bool = False) -> None:
    found, expected = quantize(x, tile, power_of_two), quantize_by_tiles(x, tile, power_of_two)
    assert found.values.dtype == torch.float8_e4m3fn
    assert found.scales.dtype == torch.float32
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(found.scales.view(torch.int32), expected.scales.view(torch.int32))
    if not power_of_two:
        assert torch.equal(round_trip(x, tile), dequantize(found))


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_tile_is_quantised_alone(
    shape: tuple[int, int], tile: tuple[int, int], power_of_two: bool
) -> None:
    assert_same_bits(random_matrix(shape), tile, power_of_two)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES)
def test_zero_tiny_and_extreme_tiles_keep_their_promises(
    tile: tuple[int, int], power_of_two: bool
) -> None:
    x = difficult_matrix()
    assert_same_bits(x, tile, power_of_two)
    assert bool(torch.isfinite(dequantize(quantize(x, tile, power_of_two))).all())


@settings(max_examples=40, deadline=None, derandomize=True, database=None)
@given(
    rows=st.integers(1, 150),
    columns=st.integers(1, 150),
    exponent=st.integers(-140, 120),
    tile=st.sampled_from(TILES),
    power_of_two=st.booleans(),
)
def test_any_shape_and_magnitude_is_quantised_tile_by_tile(
    rows: int, columns: int, exponent: int, tile: tuple[int, int], power_of_two: bool
) -> None:
    x = random_matrix((rows, columns), seed=rows * 151 + columns, spread=1.0)
    assert_same_bits(torch.ldexp(x, torch.tensor(exponent)), tile, power_of_two)


@pytest.mark.parametrize("tile", TILES)
def test_stacked_matrices_are_quantised_one_by_one(tile: tuple[int, int]) -> None:
    x = random_matrix((2, 3, 130, 140))
    together = quantize(x, tile)
    for i in range(2):
        for j in range(3):
            alone = quantize(x[i, j], tile)
            assert torch.equal(together.values[i, j].float(), alone.values.float())
            assert torch.equal(together.scales[i, j], alone.scales)


@pytest.mark.parametrize("shape", [(0, 40), (2, 0, 40)])
@pytest.mark.parametrize("tile", TILES)
def test_a_batch_without_rows_is_quantised_to_nothing(
    shape: tuple[int, ...], tile: tuple[int, int]
) -> None:
    x = torch.zeros(shape)
    assert round_trip(x, tile).shape == shape
    assert dequantize(quantize(x, tile)).shape == shape


def test_power_of_two_scales_round_up_and_never_overflow() -> None:
    x = random_matrix((40, 512), seed=2)
    exact = quantize(x).scales
    rounded = quantize(x, power_of_two=True)
    mantissa, _ = torch.frexp(rounded.scales)
    assert bool((mantissa == 0.5).all())
    assert bool((exact <= rounded.scales).all())
    assert bool((rounded.scales < 2 * exact).all())
    assert bool(torch.isfinite(rounded.values.float()).all())
    x[:, ::128] = 448 * 2.0**-7  # exact powers of two stay as they are
    x = x.clamp(-448 * 2.0**-7, 448 * 2.0**-7)
    assert bool((quantize(x, power_of_two=True).scales == 2.0**-7).all())


def grid_points() -> Tensor:
    """Every finite E4M3 value >= 0, in order."""
    codes = torch.arange(0x7F, dtype=torch.uint8)
    return codes.view(torch.float8_e4m3fn).float()


def neighbours(v: Tensor) -> Tensor:
    """Each value with the float32 just below and just above it."""
    return torch.cat([v, *(v.nextafter(torch.full_like(v, to)) for to in (-torch.inf, torch.inf))])


def test_rounding_to_the_grid_is_torchs_cast() -> None:
    patterns = torch.arange(0, 0x43E00000 + 1, 997, dtype=torch.int32).view(torch.float32)
    grid = grid_points()
    ties = (grid[1:] + grid[:-1]) / 2
    v = torch.cat([patterns, neighbours(grid), neighbours(ties)])
    v = v[(v >= 0) & (v <= E4M3_MAX)]
    v = torch.cat([v, -v])
    assert v.numel() > 2_000_000
    assert torch.equal(round_to_grid(v), v.to(torch.float8_e4m3fn).float())


def test_the_grid_is_left_as_it_is() -> None:
    grid = torch.cat([grid_points(), -grid_points()])
    assert torch.equal(round_to_grid(grid), grid)
    x = dequantize(quantize(random_matrix((7, 256)), power_of_two=True))
    assert torch.equal(dequantize(quantize(x, power_of_two=True)), x)


def test_rounding_has_no_bias() -> None:
    """Errors up and down are as frequent as heads and tails: |z| < 5 of a binomial."""
    generator = torch.Generator().manual_seed(3)
    v = torch.rand(400_000, generator=generator) * 447 + 0.5
    error = round_to_grid(v).double() - v.double()
    up, total = int((error > 0).sum()), int((error != 0).sum())
    assert abs(up - total / 2) < 5 * math.sqrt(total) / 2
    # The errors' own mean vanishes too, not just their signs.
    assert abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(v.numel())


def test_errors_are_those_of_three_mantissa_bits() -> None:
    """Facts of E4M3: relative error <= 2^-4 for normals, absolute <= scale * 2^-10 below."""
    x = random_matrix((64, 512), seed=4)
    q = quantize(x)
    scale = q.scales.repeat_interleave(128, 1)
    error = (dequantize(q) - x).abs()
    normal = (x / scale).abs() >= 2.0**-6
    assert bool((error[normal] <= x[normal].abs() * 2.0**-4 * (1 + 1e-6)).all())
    assert bool((error[~normal] <= scale[~normal] * 2.0**-10 * (1 + 1e-6)).all())
    plain = torch.randn(64, 512, generator=torch.Generator().manual_seed(5)).double()
    after = dequantize(quantize(plain.float())).double()
    gap = 1 - 2 * (plain * after).sum() / (plain.square().sum() + after.square().sum())
    assert 1e-5 < float(gap) < 6e-4


@pytest.mark.parametrize(
    "counts", [[5], [128, 128], [0, 130, 0, 1, 127, 300, 0], [1] * 9, [0, 0, 256], [0, 0]]
)
def test_segments_are_quantised_as_if_each_stood_alone(counts: list[int]) -> None:
    x = random_matrix((sum(counts), 20), seed=6)
    found = round_trip_segments(x, torch.tensor(counts))
    alone = [round_trip(part, (128, 1)) for part in x.split(counts) if len(part)]
    assert torch.equal(found, torch.cat(alone) if alone else x)
    assert SMALLEST_SCALE > 0

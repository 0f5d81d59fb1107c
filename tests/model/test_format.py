"""Number formats against enumerations of all their codes, and rounding against statistics."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from model.fp8.format import (
    E2M1_MAX,
    E4M3_MAX,
    E5M6_MAX,
    SMALLEST_SCALE,
    from_e2m1,
    from_e5m6,
    from_e8m0,
    pack_e2m1,
    pack_e5m6,
    pack_e8m0,
    power_of_two_above,
    round_to_grid,
    to_e2m1,
    to_e5m6,
    to_e8m0,
    unpack_e2m1,
    unpack_e5m6,
    unpack_e8m0,
)
from tests.references import next_power_of_two

Rounding = Callable[[Tensor], Tensor]


def e4m3_values() -> list[float]:
    """Every finite magnitude by code: 4 bits of exponent from 2^-6 on, 3 of mantissa."""
    return [
        (code & 7) * 2.0**-9 if code < 8 else (8 + (code & 7)) * 2.0 ** ((code >> 3) - 10)
        for code in range(0x7F)
    ]


def e5m6_values() -> list[float]:
    """Every finite magnitude by code: 5 bits of exponent from 2^-14 on, 6 of mantissa."""
    return [
        (code & 63) * 2.0**-20 if code < 64 else (64 + (code & 63)) * 2.0 ** ((code >> 6) - 21)
        for code in range(0x7C0)
    ]


E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def nearest(v: Tensor, values: list[float]) -> Tensor:
    """The code of the nearest of `values` in float64, ties to the even code; for v >= 0."""
    grid, x = np.array(values), v.double().numpy()
    above = np.searchsorted(grid, x).clip(1, len(grid) - 1)
    low, high = x - grid[above - 1], grid[above] - x
    takes_above = (high < low) | ((high == low) & (above % 2 == 0))
    return torch.from_numpy(above - 1 + takes_above)


def critical(values: list[float]) -> Tensor:
    """The values, the half ways between them, and the float32 next to each on either side."""
    grid = torch.tensor(values)
    v = torch.cat([grid, (grid[1:] + grid[:-1]) / 2])
    v = torch.cat([v, *(v.nextafter(torch.tensor(to)) for to in (-torch.inf, torch.inf))])
    return v[(v >= 0) & (v <= values[-1])]


def magnitudes(largest: float, count: int = 200_000) -> Tensor:
    """Bit patterns of all sizes from 0 to `largest`."""
    top = int(torch.tensor(largest).view(torch.int32))
    return torch.arange(0, top + 1, top // count, dtype=torch.int32).view(torch.float32)


def test_the_largest_values_are_those_of_the_formats() -> None:
    assert e4m3_values()[-1] == E4M3_MAX
    assert e5m6_values()[-1] == E5M6_MAX
    assert E2M1_VALUES[-1] == E2M1_MAX
    assert math.frexp(SMALLEST_SCALE) == (0.5, -125)


# E4M3


def test_rounding_to_the_grid_is_torchs_cast_and_the_nearest_value() -> None:
    v = torch.cat([magnitudes(E4M3_MAX, 1_000_000), critical(e4m3_values())])
    both = torch.cat([v, -v])
    assert torch.equal(round_to_grid(both), both.to(torch.float8_e4m3fn).float())
    assert torch.equal(round_to_grid(v), torch.tensor(e4m3_values())[nearest(v, e4m3_values())])


def test_the_grid_is_left_as_it_is() -> None:
    grid = torch.tensor(e4m3_values())
    assert torch.equal(round_to_grid(grid), grid)
    assert torch.equal(round_to_grid(-grid), -grid)


# UE8M0


def test_powers_of_two_are_found_from_above() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.ldexp(
        torch.rand(4000, generator=generator) + 0.5,
        torch.randint(-125, 126, (4000,), generator=generator),
    )
    expected = torch.tensor([next_power_of_two(value) for value in x.tolist()])
    assert torch.equal(power_of_two_above(x), expected)
    exact = 2.0 ** torch.arange(-126, 128)
    assert torch.equal(power_of_two_above(exact), exact)
    above, below = exact[:-1].nextafter(exact[1:]), exact[1:].nextafter(exact[:-1])
    assert torch.equal(power_of_two_above(above), exact[1:])
    assert torch.equal(power_of_two_above(below), exact[1:])
    assert bool(power_of_two_above(torch.tensor([torch.nan])).isnan().all())


def test_ue8m0_is_the_exponent_alone() -> None:
    codes = torch.arange(255, dtype=torch.uint8)
    values = from_e8m0(codes)
    # 2^-127 is subnormal, and no scale is so small.
    assert values.double().tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert torch.equal(to_e8m0(values[1:]), codes[1:])
    not_a_number = torch.tensor([255], dtype=torch.uint8)
    assert bool(from_e8m0(not_a_number).isnan().all())
    assert torch.equal(to_e8m0(torch.tensor([torch.nan])), not_a_number)
    assert torch.equal(to_e8m0(values[1:]), values[1:].to(torch.float8_e8m0fnu).view(torch.uint8))


@pytest.mark.parametrize("count", [1, 3, 4, 9])
def test_four_ue8m0_codes_fill_an_integer_from_its_lowest_byte(count: int) -> None:
    codes = torch.randint(256, (3, count), generator=torch.Generator().manual_seed(1)).byte()
    packed = pack_e8m0(codes)
    assert packed.shape == (3, math.ceil(count / 4))
    assert packed.dtype == torch.int32
    for row, found in zip(codes.tolist(), packed.tolist(), strict=True):
        row += [127] * (-count % 4)
        words = [
            sum(code << 8 * i for i, code in enumerate(row[j : j + 4]))
            for j in range(0, len(row), 4)
        ]
        assert [word % 2**32 for word in found] == words
    assert torch.equal(unpack_e8m0(packed, count), codes)


# E5M6


def test_every_e5m6_code_stands_for_its_value_and_comes_back() -> None:
    values = e5m6_values()
    codes = torch.arange(4096, dtype=torch.int32)
    found = from_e5m6(codes)
    for sign, half in ((1, found[:2048]), (-1, found[2048:])):
        assert half[: len(values)].tolist() == [sign * value for value in values]
        assert float(half[0x7C0]) == sign * torch.inf
        assert bool(half[0x7C1:].isnan().all())
    numbers = codes[~found.isnan()]
    # With its sign, even of zero.
    assert torch.equal(to_e5m6(from_e5m6(numbers)), numbers)
    assert torch.equal(to_e5m6(torch.tensor([torch.nan])), torch.tensor([0x7E0]).int())


def test_e5m6_takes_the_nearest_value_and_ties_to_even() -> None:
    v = torch.cat([magnitudes(E5M6_MAX), critical(e5m6_values())])
    expected = nearest(v, e5m6_values()).int()
    assert torch.equal(to_e5m6(v), expected)
    assert torch.equal(to_e5m6(-v), expected | 0x800)
    # By way of float16 a value just above a tie would first become the tie.
    twice = v.half().float()
    assert bool((to_e5m6(twice) != expected).any())


def test_beyond_its_range_e5m6_is_infinite() -> None:
    v = torch.tensor([E5M6_MAX + 256, 7e4, 3e38, torch.inf])
    assert to_e5m6(v).tolist() == [0x7C0] * 4
    assert to_e5m6(-v).tolist() == [0xFC0] * 4


def test_eight_e5m6_codes_fill_three_words_from_the_lowest_bits() -> None:
    codes = torch.randint(4096, (5, 24), generator=torch.Generator().manual_seed(2)).int()
    codes[0], codes[1] = 0xFFF, 0x801
    packed = pack_e5m6(codes)
    assert packed.shape == (5, 9)
    assert packed.dtype == torch.int32
    for row, found in zip(codes.tolist(), packed.tolist(), strict=True):
        for group in range(3):
            bits = sum(code << 12 * i for i, code in enumerate(row[8 * group : 8 * group + 8]))
            words = [bits >> 32 * i & 0xFFFFFFFF for i in range(3)]
            assert [word % 2**32 for word in found[3 * group : 3 * group + 3]] == words
    assert torch.equal(unpack_e5m6(packed), codes)
    every = torch.arange(4096, dtype=torch.int32).view(8, 512).T.contiguous()
    assert torch.equal(unpack_e5m6(pack_e5m6(every)), every)


# E2M1


def test_every_e2m1_code_stands_for_its_value_and_comes_back() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    values = from_e2m1(codes)
    assert values.tolist() == E2M1_VALUES + [-value for value in E2M1_VALUES]
    assert torch.equal(to_e2m1(values), codes)


def test_e2m1_takes_the_nearest_value_and_ties_to_even() -> None:
    v = torch.cat([magnitudes(E2M1_MAX), critical(E2M1_VALUES)])
    expected = nearest(v, E2M1_VALUES).byte()
    assert torch.equal(to_e2m1(v), expected)
    assert torch.equal(to_e2m1(-v), expected | 8)
    ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
    assert from_e2m1(to_e2m1(torch.tensor(ties))).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert from_e2m1(to_e2m1(torch.tensor([7.0, -1e30, torch.inf]))).tolist() == [6, -6, 6]


def test_two_e2m1_codes_fill_a_byte_from_its_low_half() -> None:
    low, high = torch.meshgrid(torch.arange(16), torch.arange(16), indexing="ij")
    codes = torch.stack([low, high], -1).flatten(1).byte()
    packed = pack_e2m1(codes)
    assert packed.tolist() == [[a + 16 * b for b in range(16)] for a in range(16)]
    assert torch.equal(unpack_e2m1(packed), codes)


# Bias


def through_e5m6(v: Tensor) -> Tensor:
    return from_e5m6(to_e5m6(v))


def through_e2m1(v: Tensor) -> Tensor:
    return from_e2m1(to_e2m1(v))


FORMATS: dict[str, tuple[Rounding, int, range]] = {
    "e4m3": (round_to_grid, 3, range(-6, 8)),
    "e5m6": (through_e5m6, 6, range(-14, 15)),
    "e2m1": (through_e2m1, 1, range(2)),
}
"""How to round, bits of mantissa, and the exponents below whose last binade nothing is cut off."""


def draws(bits: int, exponents: range, ties: bool) -> tuple[Tensor, Tensor]:
    """(values, steps): positive ones of all binades; with `ties` every fourth is half way."""
    generator = torch.Generator().manual_seed(3)
    count = 200_000
    exponent = torch.randint(exponents.start, exponents.stop, (count,), generator=generator)
    if ties:
        fraction = torch.randint(4 << bits, (count,), generator=generator) / (4 << bits)
    else:
        fraction = torch.rand(count, generator=generator)
    return torch.ldexp(1 + fraction, exponent), torch.ldexp(torch.ones(count), exponent - bits)


def assert_unbiased(before: Tensor, after: Tensor, steps: Tensor) -> None:
    """Errors up and down are as frequent as heads and tails, and their mean vanishes: |z| < 5."""
    error = (after.double() - before.double()) / steps.double()
    up, total = int((error > 0).sum()), int((error != 0).sum())
    assert abs(up - total / 2) < 5 * math.sqrt(total) / 2, "signs"
    assert abs(float(error.mean())) < 5 * float(error.std()) / math.sqrt(len(error)), "mean"
    # Half a step at most: noise without bias would pass the rest.
    assert float(error.abs().max()) <= 0.5


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_rounding_has_no_bias(name: str, ties: bool) -> None:
    rounding, bits, exponents = FORMATS[name]
    v, steps = draws(bits, exponents, ties)
    assert_unbiased(v, rounding(v), steps)
    assert torch.equal(rounding(-v), -rounding(v))


@pytest.mark.parametrize("name", FORMATS)
def test_truncation_and_halves_that_go_up_are_seen_as_biased(name: str) -> None:
    _, bits, exponents = FORMATS[name]
    v, steps = draws(bits, exponents, ties=True)
    with pytest.raises(AssertionError, match="signs"):
        assert_unbiased(v, (v / steps).floor() * steps, steps)
    with pytest.raises(AssertionError, match="signs"):
        assert_unbiased(v, (v / steps + 0.5).floor() * steps, steps)
    # As many errors up as down, but those up are larger.
    even = (v / steps).round() * steps
    uneven = torch.where(even > v, v + (even - v) * 0.9, even)
    with pytest.raises(AssertionError, match="mean"):
        assert_unbiased(v, uneven, steps)

"""The Triton backend against the slow twin: casts bit for bit, products within float32's order.

Without a CUDA device the kernels run in Triton's interpreter, on one core and in numpy.
"""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from configs.errors import DataError
from model.fp8.backends import Backend
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized, QuantizedE5M6, Tile
from model.fp8.reference import Reference
from model.fp8.triton import INTERPRETED, Triton
from model.fp8.triton_layout import Matrix

DEVICE = "cpu" if INTERPRETED else "cuda"
TENSOR_CORE = 132 * 2.0**-13
"""What a block of 128 may lose on Hopper, as a part of the sum of magnitudes: four steps of 32
products and what was there before, each term cut to 14 bits of the largest. Not measured."""
TILES = [ACTIVATION, ALONG_TOKENS, BLOCK]
SHAPES = [(1, 1), (130, 300), (257, 129), (3, 200, 70)]
COUNTS = [(0, 5, 130, 0, 257, 1), (128, 16, 0, 144), (0, 0, 3)]

mine, slow = Triton(), Reference()
told = pytest.mark.parametrize("told", [True, False], ids=["told", "on-device"])
"""Whether the host knows how many rows each expert has."""


def grouped(counts: Sequence[int], told: bool) -> Groups:
    known = Groups.of(counts, torch.device(DEVICE))
    return known if told else Groups(known.counts_G, known.rows)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def hard(*shape: int) -> Tensor:
    """Rows of all magnitudes from 1e-44 to 1e38, and what is hard to round, here and there."""
    x = random(*shape)
    sizes = torch.logspace(-44, 37, shape[-2]).to(DEVICE)
    x = (x * sizes[:, None]).clamp(-3e38, 3e38)
    specials = [torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 448.0, -448.0, 1e-45, -1e-40]
    flat = x.view(-1)
    for index, special in enumerate(specials):
        flat[index * 523 % flat.numel()] = special
    x[..., shape[-2] // 2, :] = -0.0
    return x


def assert_same(found: Quantized, expected: Quantized) -> None:
    values = found.unpadded().values
    assert values.shape == expected.values.shape
    assert values.dtype == expected.values.dtype
    assert torch.equal(values.view(torch.uint8), expected.values.view(torch.uint8))
    assert_same_floats(found.scales, expected.scales)
    assert (found.tile, found.groups, found.float32) == (expected.tile, expected.groups, None)


def assert_same_floats(found: Tensor, expected: Tensor) -> None:
    """The same bits, but that every NaN is as good as another."""
    assert found.shape == expected.shape
    assert torch.equal(found.isnan(), expected.isnan())
    bits = [torch.where(x.isnan(), 0, x).contiguous().view(torch.int32) for x in (found, expected)]
    assert torch.equal(*bits)


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantisers_equal_the_slow_twin_bit_for_bit(
    shape: tuple[int, ...], tile: Tile, power_of_two: bool
) -> None:
    for x in (hard(*shape), random(*shape).bfloat16(), hard(*shape).bfloat16().mT):
        expected = slow.quantize(x, tile, power_of_two=power_of_two)
        found = mine.quantize(x, tile, power_of_two=power_of_two)
        assert_same(found, expected)
        assert_same_floats(mine.dequantize(found), slow.dequantize(expected))


@pytest.mark.parametrize("power_of_two", [False, True])
def test_every_value_between_two_codes_rounds_as_the_cast_does(power_of_two: bool) -> None:
    """All codes, all half ways between them, and the neighbours of those; scale 1."""
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    halves = (codes[1:] + codes[:-1]) / 2
    above, below = halves.nextafter(codes[1:]), halves.nextafter(codes[:-1])
    x = torch.cat([codes, halves, above, below])
    x = torch.nn.functional.pad(torch.cat([x, -x]), (0, -2 * len(x) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(x, (0, 1), value=448.0).to(DEVICE)
    expected = slow.quantize(x, ACTIVATION, power_of_two=power_of_two)
    assert expected.scales.eq(1).all()
    assert_same(mine.quantize(x, ACTIVATION, power_of_two=power_of_two), expected)


@pytest.mark.parametrize("tile", TILES, ids=str)
@told
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_tiles_start_anew_with_each_expert(counts: tuple[int, ...], tile: Tile, told: bool) -> None:
    x, groups = hard(sum(counts), 130), grouped(counts, told)
    found, expected = (backend.quantize(x, tile, groups=groups) for backend in (mine, slow))
    assert_same(found, expected)
    assert_same_floats(mine.dequantize(found), slow.dequantize(expected))
    # What there is no band for is there and means nothing.
    bands = sum(-(-count // tile[0]) for count in counts)
    assert bool((found.scales[bands:] == 1).all())
    assert len(found.scales) <= bands + (0 if told else len(counts))


@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_experts_are_padded_with_zeros_to_whole_tiles_of_tokens(counts: tuple[int, ...]) -> None:
    x, groups = hard(sum(counts), 130), grouped(counts, told=True)
    found = mine.quantize(x, ALONG_TOKENS, groups=groups)
    assert found.values.shape == (sum(-(-count // 128) for count in counts) * 128, 130)
    codes, first = found.values.view(torch.uint8), 0
    for count in counts:
        last = first + -(-count // 128) * 128
        assert not codes[first + count : last].any()
        first = last


@pytest.mark.parametrize("counts", [None, (0, 70, 130)], ids=str)
@pytest.mark.parametrize("tile", TILES, ids=str)
def test_what_is_quantised_is_read_back_and_quantised_again(
    tile: Tile, counts: tuple[int, ...] | None
) -> None:
    x8 = slow.quantize(hard(200, 260), ACTIVATION)
    again = slow.quantize(hard(200, 260), BLOCK)
    groups = None if counts is None else grouped(counts, told=False)
    for source in (x8, x8.rows(torch.arange(199, -1, -1, device=DEVICE)), again):
        assert_same(
            mine.quantize(source, tile, groups=groups, power_of_two=True),
            slow.quantize(source, tile, groups=groups, power_of_two=True),
        )


def test_values_for_the_weight_gradient_lie_along_the_tokens_wherever_they_can() -> None:
    assert mine.quantize(random(96, 10), ALONG_TOKENS).values.stride() == (1, 96)
    assert mine.quantize(random(97, 10), ALONG_TOKENS).values.stride() == (10, 1)
    groups = grouped((33, 64), told=True)
    assert mine.quantize(random(97, 10), ALONG_TOKENS, groups=groups).values.stride() == (1, 256)


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_weights_have_their_codes_by_column_too(shape: tuple[int, ...]) -> None:
    for w in (hard(*shape), random(*shape).bfloat16()):
        expected = slow.quantize(w, BLOCK)
        found = mine.quantize(w, BLOCK, by_column=True)
        assert_same(found, expected)
        assert found.by_column is not None
        codes = found.by_column.view(torch.uint8)
        assert torch.equal(codes, expected.values.view(torch.uint8))
        assert codes.mT.is_contiguous()
        # Each product reads the codes that lie along what it contracts.
        assert found.contracted(-2).data_ptr() == found.by_column.data_ptr()
        assert found.T.contracted(-2).data_ptr() == found.values.data_ptr()
    assert mine.quantize(random(4, 4), ACTIVATION, by_column=True).by_column is None


def test_tensors_without_entries_have_the_twins_shapes() -> None:
    for shape in ((0, 5), (5, 0), (2, 0, 5)):
        for tile in TILES:
            x = torch.zeros(shape, device=DEVICE)
            assert_same(mine.quantize(x, tile), slow.quantize(x, tile))
            assert mine.dequantize(mine.quantize(x, tile)).shape == shape


def quantised(
    *shape: int, tile: Tile, seed: int, groups: Groups | None = None, by_column: bool = False
) -> Quantized:
    """Values whose tiles differ in size, from the backend under test."""
    x = random(*shape, seed=seed)
    sizes = torch.logspace(-3, 3, shape[-2]).to(DEVICE)
    return mine.quantize(x * sizes[:, None], tile, groups=groups, by_column=by_column)


def assert_near(found: Tensor, exact: Tensor, magnitude: Tensor, contraction: int) -> None:
    """Within the order of float32 additions, and on tensor cores within what those keep."""
    bound = (contraction + 8) * 2.0**-24 + (0 if INTERPRETED else TENSOR_CORE)
    assert found.shape == exact.shape
    assert found.dtype == torch.float32
    assert bool(((found - exact).abs() <= bound * magnitude).all())


def magnitudes(q: Quantized) -> Quantized:
    """The same without signs."""
    bits = q.values.view(torch.uint8) & 0x7F
    values = bits.view(torch.float8_e4m3fn)
    return Quantized(values, q.scales, q.tile, q.groups, padded=q.padded)


def training_pairs(
    tokens: int, inputs: int, outputs: int
) -> dict[str, tuple[Quantized, Quantized]]:
    """The operands of a Linear's three products."""
    x8 = quantised(tokens, inputs, tile=ACTIVATION, seed=1)
    w8 = quantised(outputs, inputs, tile=BLOCK, seed=2, by_column=True)
    dy8 = quantised(tokens, outputs, tile=ACTIVATION, seed=3)
    dy_tokens8 = quantised(tokens, outputs, tile=ALONG_TOKENS, seed=3)
    x_tokens8 = mine.quantize(x8, ALONG_TOKENS)
    return {"forward": (x8, w8.T), "dgrad": (dy8, w8), "wgrad": (dy_tokens8.T, x_tokens8)}


@pytest.mark.parametrize("product", ["forward", "dgrad", "wgrad"])
@pytest.mark.parametrize("sizes", [(1, 16, 16), (129, 300, 130), (48, 128, 257)], ids=str)
def test_products_are_the_slow_twins_within_float32(
    sizes: tuple[int, int, int], product: str
) -> None:
    a, b = training_pairs(*sizes)[product]
    magnitude = slow.matmul(magnitudes(a), magnitudes(b))
    assert_near(mine.matmul(a, b), slow.matmul(a, b), magnitude, a.values.shape[1])


@pytest.mark.gpu
@pytest.mark.parametrize("product", ["forward", "dgrad", "wgrad"])
def test_products_of_many_blocks_are_the_slow_twins_within_what_tensor_cores_keep(
    product: str,
) -> None:
    a, b = training_pairs(1000, 1536, 1040)[product]
    magnitude = slow.matmul(magnitudes(a), magnitudes(b))
    assert_near(mine.matmul(a, b), slow.matmul(a, b), magnitude, a.values.shape[1])


def test_two_blocked_operands_multiply_too() -> None:
    a, b = quantised(140, 150, tile=BLOCK, seed=1), quantised(150, 20, tile=BLOCK, seed=2)
    magnitude = slow.matmul(magnitudes(a), magnitudes(b))
    assert_near(mine.matmul(a, b), slow.matmul(a, b), magnitude, 150)


@told
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_experts_rows_meet_its_own_matrix(
    counts: tuple[int, ...], transposed: bool, told: bool
) -> None:
    groups = grouped(counts, told)
    a = quantised(sum(counts), 136, tile=ACTIVATION, seed=1)
    shape = (len(counts), 150, 136) if transposed else (len(counts), 136, 150)
    b = quantised(*shape, tile=BLOCK, seed=2, by_column=True)
    b = b.T if transposed else b
    magnitude = slow.grouped_matmul(magnitudes(a), magnitudes(b), groups)
    exact = slow.grouped_matmul(a, b, groups)
    assert_near(mine.grouped_matmul(a, b, groups), exact, magnitude, 136)


def test_codes_by_column_give_the_same_bits_as_codes_by_row() -> None:
    counts = (0, 5, 130, 0, 257, 1)
    groups, a = grouped(counts, told=False), quantised(sum(counts), 136, tile=ACTIVATION, seed=1)
    both = quantised(len(counts), 136, 150, tile=BLOCK, seed=2, by_column=True)
    one = quantised(len(counts), 136, 150, tile=BLOCK, seed=2)
    assert torch.equal(mine.grouped_matmul(a, both, groups), mine.grouped_matmul(a, one, groups))


@told
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_weight_gradients_contract_each_experts_rows_alone(
    counts: tuple[int, ...], told: bool
) -> None:
    groups = grouped(counts, told)
    a = quantised(sum(counts), 140, tile=ALONG_TOKENS, seed=1, groups=groups)
    b = quantised(sum(counts), 30, tile=ALONG_TOKENS, seed=2, groups=groups)
    magnitude = slow.grouped_outer(magnitudes(a), magnitudes(b), groups)
    found = mine.grouped_outer(a, b, groups)
    assert_near(found, slow.grouped_outer(a, b, groups), magnitude, max(counts))
    assert not found[[count == 0 for count in counts]].any()


def test_products_without_rows_or_contraction_are_empty_or_zero() -> None:
    none = quantised(0, 16, tile=ACTIVATION, seed=0)
    b = quantised(16, 8, tile=BLOCK, seed=0)
    assert mine.matmul(none, b).shape == (0, 8)
    along = quantised(0, 16, tile=ALONG_TOKENS, seed=0)
    assert mine.matmul(along.T, along).equal(torch.zeros(16, 16, device=DEVICE))
    for told in (True, False):
        groups = grouped((0, 0), told)
        empty = mine.quantize(torch.zeros(0, 16, device=DEVICE), ALONG_TOKENS, groups=groups)
        assert not mine.grouped_outer(empty, empty, groups).any()


def test_a_tile_that_is_not_finite_spoils_only_what_it_meets() -> None:
    x = random(130, 256)
    x[3, 200] = torch.nan
    y = mine.matmul(mine.quantize(x, ACTIVATION), quantised(256, 20, tile=BLOCK, seed=1))
    assert y[3].isnan().all()
    assert y.isnan().sum() == 20


def test_activations_and_their_gradients_leave_as_bfloat16_where_asked() -> None:
    brief = Triton(torch.bfloat16)
    pairs = training_pairs(20, 130, 24)
    for name, (a, b) in pairs.items():
        found, full = brief.matmul(a, b), mine.matmul(a, b)
        assert found.dtype == (torch.float32 if name == "wgrad" else torch.bfloat16)
        assert torch.equal(found, full.to(found.dtype))


@pytest.mark.parametrize("shape", [(1, 1), (40, 300), (257, 129), (33, 8), (0, 8)], ids=str)
def test_twelve_bits_are_packed_and_read_as_the_twin_does(shape: tuple[int, int]) -> None:
    for x in (hard(*shape) if shape[0] else random(*shape), random(*shape).bfloat16()):
        found, expected = mine.quantize_e5m6(x), slow.quantize_e5m6(x)
        assert torch.equal(found.words, expected.words)
        assert_same_floats(found.scales, expected.scales)
        assert found.columns == expected.columns
        assert_same_floats(mine.dequantize_e5m6(found), slow.dequantize_e5m6(expected))


def test_twelve_bits_round_half_way_to_even() -> None:
    """Magnitudes around every half way of the finest steps and of the coarsest."""
    steps = torch.arange(256) / 4
    x = torch.cat([steps * 2.0**-20, 1 + steps / 64, (steps + 0.25) * -(2.0**-15)])
    x = torch.nn.functional.pad(x.view(-1, 64), (0, 1), value=65024.0).to(DEVICE)
    found, expected = mine.quantize_e5m6(x), slow.quantize_e5m6(x)
    assert expected.scales.eq(1).all()
    assert torch.equal(found.words, expected.words)
    assert_same_floats(
        mine.dequantize_e5m6(QuantizedE5M6(found.words, found.scales, 65)),
        slow.dequantize_e5m6(expected),
    )


def test_a_matrix_names_a_kernels_arguments_by_its_axes() -> None:
    codes, scales = torch.empty(2, 5, 7, dtype=torch.uint8).mT, torch.empty(2, 1, 3)
    found = Matrix(codes, scales).arguments("b", "ekn")
    assert found.pop("b") is codes
    assert found.pop("b_scales") is scales
    strides = {"b_e": 35, "b_k": 1, "b_n": 7, "b_scales_e": 3, "b_scales_k": 3, "b_scales_n": 1}
    assert found == strides
    with pytest.raises(ValueError, match="zip"):
        Matrix(codes, scales).arguments("a", "mk")


def test_it_is_a_backend() -> None:
    assert isinstance(mine, Backend)
    assert mine.name == "triton"


def test_what_cannot_be_computed_is_refused_with_dims_and_a_remedy() -> None:
    x8, w8 = quantised(8, 16, tile=ACTIVATION, seed=0), quantised(8, 16, tile=BLOCK, seed=0)
    halves, thirds = grouped((4, 4), told=True), grouped((8, 0, 0), told=True)
    uneven = grouped((3, 5), told=True)
    along = quantised(8, 16, tile=ALONG_TOKENS, seed=0, groups=uneven)
    stack = quantised(2, 16, 16, tile=BLOCK, seed=0)
    with pytest.raises(DataError, match=r"tiles of \(1, 64\); choose one of"):
        mine.quantize(x8, (1, 64))
    with pytest.raises(DataError, match=r"7 rows in all, for a tensor of shape \(8, 16\)"):
        mine.quantize(x8, ALONG_TOKENS, groups=grouped((3, 4), told=False))
    with pytest.raises(DataError, match=r"7 rows in all, for a tensor of shape \(8, 16\)"):
        mine.grouped_matmul(x8, stack, grouped((3, 4), told=False))
    with pytest.raises(DataError, match=r"\[8, 16\].* times \[8, 16\].*contracted dims differ"):
        mine.matmul(x8, w8)
    with pytest.raises(DataError, match="tiles must be 128 wide along the contraction"):
        mine.matmul(x8, quantised(16, 8, tile=ACTIVATION, seed=0))
    with pytest.raises(DataError, match="use grouped_matmul for stacks"):
        mine.matmul(x8, stack)
    with pytest.raises(DataError, match="3 counts of rows for 2 experts' matrices"):
        mine.grouped_matmul(x8, stack, thirds)
    with pytest.raises(DataError, match=r"share scales with other experts'.*\(1, 128\)"):
        mine.grouped_matmul(w8, stack, halves)
    with pytest.raises(DataError, match=r"start anew after \(3, 5\) rows.*after \(4, 4\)"):
        mine.grouped_outer(along, along, halves)
    with pytest.raises(DataError, match=r"both need tiles \(128, 1\) of the same groups"):
        mine.grouped_outer(x8, along, uneven)
    with pytest.raises(DataError, match=r"start anew after \(3, 5\) rows"):
        mine.matmul(quantised(4, 8, tile=ACTIVATION, seed=0), along)
    with pytest.raises(DataError, match="flatten it to 2 dims"):
        mine.quantize_e5m6(random(2, 3, 4))
    with pytest.raises(DataError, match="products cannot be stored as"):
        Triton(torch.float16)

"""Layouts for cuBLAS, read back from memory as cuBLAS would, against exact products."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from configs.errors import DataError, MachineError
from model.fp8 import cublas
from model.fp8.backends import Backend
from model.fp8.cublas import Cublas, Operand, aligned, lacking, operand
from model.fp8.groups import Groups
from model.fp8.quantized import ACTIVATION, ALONG_TOKENS, BLOCK, Quantized, Tile
from model.fp8.reference import Reference

REFERENCE = Reference()
WHOLE: Tile = (2**62, 2**62)
SHAPES = [(16, 128, 128), (32, 256, 768), (5, 130, 200), (129, 640, 48), (1, 16, 16), (300, 1, 3)]
"""Rows, contraction, columns: whole tiles, 5 and 6 blocks along K (not of 4), ragged ones."""
COUNTS = [(128, 0, 256), (3, 140, 0, 57), (16, 32), (0, 0), (1,)]


def random(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Numbers whose tiles differ a hundredfold, so that a scale read amiss shows."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator)
    rows = torch.logspace(-2, 2, shape[-2]).unsqueeze(1)
    columns = torch.logspace(-2, 2, shape[-1])
    return (x * rows * columns).to(device)


def memory(tensor: Tensor, count: int) -> Tensor:
    """The `count` elements that lie at and after the tensor's address."""
    return torch.as_strided(tensor, (count,), (1,), tensor.storage_offset())


def simulated(left: Operand, right: Operand, dtype: torch.dtype, out: Tensor | None) -> Tensor:
    """The product as cuBLAS's manual describes it: from addresses and leading dims alone."""
    sides = []
    for side in (left, right):
        rows, columns = side.values.shape
        assert columns % 128 == 0 and rows % 16 == 0 and side.values.stride(1) == 1
        lead, blocks = side.values.stride(0), columns // 128
        assert lead % 16 == 0 and side.values.storage_offset() % 16 == 0
        count = (rows - 1) * lead + columns
        values = memory(side.values.view(torch.uint8), count).view(torch.float8_e4m3fn).double()
        row, column = torch.arange(rows)[:, None], torch.arange(columns)
        if side.blocks:
            lead_of_scales = -(-blocks // 4) * 4
            places = row // 128 * lead_of_scales + column // 128
            scales = memory(side.scales, -(-rows // 128) * lead_of_scales)
        else:
            places = row + column // 128 * rows
            scales = memory(side.scales, rows * blocks)
            assert side.scales.storage_offset() % 4 == 0, "cuBLAS wants scales at 16 bytes"
        sides.append(values[row * lead + column] * scales[places].double())
    assert not (left.blocks and right.blocks), "no such pair"
    checked_by_torch(left, right, dtype)
    made = (sides[0] @ sides[1].T).to(dtype)
    if out is None:
        return made
    assert out.is_contiguous() and out.dtype == dtype
    return out.copy_(made)


def checked_by_torch(left: Operand, right: Operand, dtype: torch.dtype) -> None:
    """torch's own checks of layouts, on tensors of the same strides that hold nothing."""
    with FakeTensorMode():
        sides = []
        for side in (left, right):
            sides += [
                torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device="cuda")
                for t in (side.values, side.scales)
            ]
        recipes = [
            F.ScalingType.BlockWise128x128 if side.blocks else F.ScalingType.BlockWise1x128
            for side in (left, right)
        ]
        a, scales_a, b, scales_b = sides
        made = F.scaled_mm(a, b.mT, scales_a, recipes[0], scales_b, recipes[1], output_dtype=dtype)
    assert made.shape == (left.values.shape[0], right.values.shape[0]) and made.dtype == dtype


@pytest.fixture
def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Operand, Operand]]]:
    """`multiply` by simulation; what it was given."""
    seen: list[tuple[Operand, Operand]] = []

    def multiply(
        left: Operand, right: Operand, dtype: torch.dtype, out: Tensor | None = None
    ) -> Tensor:
        seen.append((left, right))
        return simulated(left, right, dtype, out)

    monkeypatch.setattr(cublas, "multiply", multiply)
    yield seen


def near(found: Tensor, expected: Tensor) -> None:
    """Equal but for the one rounding to the result's type."""
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=2**-7, atol=0)
    if found.dtype == torch.float32:
        torch.testing.assert_close(found, expected, rtol=2**-22, atol=0)


def products(backend: Cublas | Reference, rows: int, inner: int, columns: int) -> list[Tensor]:
    """A Linear's output, input gradient and weight gradient, and that with blocks of gradients."""
    x, w, dy = random(rows, inner), random(columns, inner, seed=1), random(rows, columns, seed=2)
    w8 = REFERENCE.quantize(w, BLOCK)
    x_tokens = REFERENCE.quantize(x, ALONG_TOKENS)
    return [
        backend.matmul(REFERENCE.quantize(x, ACTIVATION), w8.T),
        backend.matmul(REFERENCE.quantize(dy, ACTIVATION), w8),
        backend.matmul(REFERENCE.quantize(dy, BLOCK), w8),
        backend.matmul(REFERENCE.quantize(dy, ALONG_TOKENS).T, x_tokens),
        backend.matmul(REFERENCE.quantize(dy, BLOCK).T, x_tokens),
        backend.matmul(REFERENCE.quantize(x, WHOLE), REFERENCE.quantize(w, WHOLE).T),
    ]


@pytest.mark.parametrize("shape", SHAPES)
def test_products_read_from_the_layouts_are_the_references(
    simulation: list[tuple[Operand, Operand]], shape: tuple[int, int, int]
) -> None:
    found = products(Cublas(REFERENCE), *shape)
    for one, other in zip(found, products(REFERENCE, *shape), strict=True):
        near(one, other)
    assert [one.dtype for one in found] == [torch.bfloat16] * 3 + [torch.float32] * 2 + [
        torch.bfloat16
    ]
    assert [(left.blocks, right.blocks) for left, right in simulation] == [
        (False, True),
        (False, True),
        (False, True),
        (False, False),
        (True, False),
        (False, False),
    ]


def grouped(
    backend: Cublas | Reference, counts: tuple[int, ...], tiles: tuple[Tile, Tile]
) -> list[Tensor]:
    """Experts' outputs, input gradients and weight gradients, for `tiles` of the gradient."""
    rows, inner, columns, groups = sum(counts), 200, 48, Groups.of(counts)
    x, dy = random(rows, inner), random(rows, columns, seed=2)
    w8 = REFERENCE.quantize(random(len(counts), columns, inner, seed=1), BLOCK)
    across, along = tiles
    x_tokens = REFERENCE.quantize(x, WHOLE if along == WHOLE else ALONG_TOKENS, groups=groups)
    return [
        backend.grouped_matmul(REFERENCE.quantize(x, ACTIVATION), w8.T, groups),
        backend.grouped_matmul(REFERENCE.quantize(dy, across), w8, groups),
        backend.grouped_outer(REFERENCE.quantize(dy, along, groups=groups), x_tokens, groups),
    ]


@pytest.mark.parametrize("counts", COUNTS)
@pytest.mark.parametrize(
    "tiles", [(ACTIVATION, ALONG_TOKENS), (BLOCK, BLOCK), (WHOLE, WHOLE)], ids=str
)
@pytest.mark.usefixtures("simulation")
def test_grouped_products_are_the_references(
    counts: tuple[int, ...], tiles: tuple[Tile, Tile]
) -> None:
    if sum(counts) == 0 and tiles[0] == WHOLE:
        pytest.skip("no rows have no largest magnitude")
    found, expected = (grouped(one, counts, tiles) for one in (Cublas(REFERENCE), REFERENCE))
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        near(one, other)
    assert [one.dtype for one in found] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_experts_whose_rows_the_host_does_not_know_go_to_other_kernels(
    simulation: list[tuple[Operand, Operand]],
) -> None:
    """Without such kernels the host asks, and the products are the same."""
    known = Groups.of((3, 140, 0, 57))
    unknown = Groups(known.counts_G, known.rows)
    x8 = REFERENCE.quantize(random(200, 128), ACTIVATION)
    w8 = REFERENCE.quantize(random(4, 128, 128, seed=1), BLOCK)
    along = REFERENCE.quantize(random(200, 128), ALONG_TOKENS, groups=unknown)
    both = Cublas(REFERENCE, grouped=REFERENCE)
    exact = REFERENCE.grouped_matmul(x8, w8.T, unknown)
    assert torch.equal(both.grouped_matmul(x8, w8.T, unknown), exact)
    outer = REFERENCE.grouped_outer(along, along, unknown)
    assert torch.equal(both.grouped_outer(along, along, unknown), outer)
    assert simulation == []
    near(both.grouped_matmul(x8, w8.T, known), exact)
    assert len(simulation) == 3
    near(Cublas(REFERENCE).grouped_outer(along, along, unknown), outer)
    assert len(simulation) == 6


def test_an_output_dtype_is_kept_but_for_weight_gradients(
    simulation: list[tuple[Operand, Operand]],
) -> None:
    found = products(Cublas(REFERENCE, torch.float32), 16, 128, 128)
    assert {one.dtype for one in found} == {torch.float32}


def test_what_fits_is_not_copied() -> None:
    x8 = REFERENCE.quantize(random(32, 512), ACTIVATION)
    w8 = REFERENCE.quantize(random(256, 512), BLOCK)
    tokens8 = REFERENCE.quantize(random(256, 64), ALONG_TOKENS)
    for q in (x8, w8):
        assert operand(q).values.data_ptr() == q.values.data_ptr()
    assert operand(w8).scales.data_ptr() == w8.scales.data_ptr()
    # A column of tiles along tokens is a column of scales along rows, once transposed.
    assert operand(tokens8.T).scales.data_ptr() == tokens8.scales.data_ptr()
    assert operand(tokens8.T).values.data_ptr() != tokens8.values.data_ptr()
    # Neither does what begins, or whose rows begin, elsewhere than at 16 bytes.
    for values in (x8.values[:, 8:392], random(16, 392).to(torch.float8_e4m3fn)[:, :384]):
        made = aligned(values, *values.shape)
        assert made.is_contiguous() and torch.equal(made.float(), values.float())


def test_padding_is_zeros_of_scale_one() -> None:
    made = operand(REFERENCE.quantize(random(5, 130), ACTIVATION))
    assert made.values.shape == (16, 256) and made.scales.stride() == (1, 16)
    assert not made.values[5:].float().any() and not made.values[:, 130:].float().any()
    assert (made.scales[5:] == 1).all()
    made = operand(REFERENCE.quantize(random(130, 640), BLOCK))
    assert made.values.shape == (256, 640)
    assert made.scales.shape == (8, 2) and made.scales.stride() == (1, 8)
    assert (made.scales[5:] == 1).all()


def test_no_rows_and_no_contraction_give_zeros_and_ask_nobody() -> None:
    backend = Cublas(REFERENCE)
    for rows, inner in ((0, 128), (16, 0)):
        a = Quantized(torch.empty(rows, inner).to(torch.float8_e4m3fn), torch.ones(0, 0), (1, 128))
        b = Quantized(torch.empty(inner, 32).to(torch.float8_e4m3fn), torch.ones(0, 0), BLOCK)
        assert torch.equal(backend.matmul(a, b), torch.zeros(rows, 32, dtype=torch.bfloat16))


def test_values_on_a_cpu_are_refused() -> None:
    with pytest.raises(MachineError, match="on cpu"):
        products(Cublas(REFERENCE), 16, 128, 128)


def test_what_cannot_be_multiplied_is_named() -> None:
    backend = Cublas(REFERENCE)
    a = REFERENCE.quantize(random(16, 128), ACTIVATION)
    stack = REFERENCE.quantize(random(2, 32, 128), BLOCK).T
    along = REFERENCE.quantize(random(16, 128), ALONG_TOKENS)
    with pytest.raises(DataError, match="128 columns of a meet 16 rows of b"):
        backend.matmul(a, along)
    with pytest.raises(DataError, match="tiles of 128 x 1 change"):
        backend.matmul(along, along.T)
    with pytest.raises(DataError, match="3 counts of rows for 2"):
        backend.grouped_matmul(a, stack, Groups.of((4, 4, 8)))
    with pytest.raises(DataError, match="add up to 15 of 16 rows"):
        backend.grouped_matmul(a, stack, Groups.of((7, 8)))
    with pytest.raises(DataError, match="quantise with the groups"):
        backend.grouped_outer(along, along, Groups.of((8, 8)))
    with pytest.raises(DataError, match="tiles of 1 x 128 change scale"):
        backend.grouped_outer(a, a, Groups.of((8, 8)))
    with pytest.raises(DataError, match="no values"):
        operand(Quantized(a.values[:0], a.scales, ACTIVATION))


def test_casts_are_the_quantizers_and_values_always_there() -> None:
    backend: Backend = Cublas(REFERENCE)
    assert isinstance(backend, Backend) and backend.name == "cublas"
    x = random(130, 200)
    found, expected = backend.quantize(x, BLOCK, saved=False), REFERENCE.quantize(x, BLOCK)
    assert torch.equal(found.values.view(torch.uint8), expected.values.view(torch.uint8))
    assert torch.equal(backend.dequantize(found), REFERENCE.dequantize(expected))
    assert torch.equal(
        backend.dequantize_e5m6(backend.quantize_e5m6(x)),
        REFERENCE.dequantize_e5m6(REFERENCE.quantize_e5m6(x)),
    )


def test_torch_refuses_scales_by_rows() -> None:
    left = operand(REFERENCE.quantize(random(16, 512), ACTIVATION))
    right = operand(REFERENCE.quantize(random(128, 512), BLOCK))
    checked_by_torch(left, right, torch.bfloat16)
    wrong = Operand(left.values, left.scales.contiguous(), blocks=False)
    with pytest.raises(RuntimeError, match="scale a must have shape"):
        checked_by_torch(wrong, right, torch.bfloat16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"cuda": None}, "built without CUDA"),
        ({"cuda": "12.8"}, "CUDA 12.8"),
        ({"present": False}, "finds no CUDA device"),
        ({"capability": (10, 0)}, "capability 10.0"),
        ({}, None),
    ],
)
def test_what_a_machine_lacks_is_said(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, object], said: str | None
) -> None:
    machine = {"cuda": "12.9", "present": True, "capability": (9, 0)} | change
    monkeypatch.setattr(torch.version, "cuda", machine["cuda"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: machine["present"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: machine["capability"])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    found = lacking(torch.device("cuda"))
    assert found is None if said is None else said in str(found)
    assert "not on cpu" in str(lacking(torch.device("cpu")))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_products_on_a_device_are_within_their_bound(shape: tuple[int, int, int]) -> None:
    """|found - exact| <= 2^-10 |A| |B| + 2^-8 |exact|, the latter for a result in bfloat16.

    Tensor cores keep about 14 bits of a sum (DeepSeek-V3, section 3.3.2) over at most 128 columns.
    """
    why = lacking(torch.device("cuda"))
    if why:
        pytest.skip(why)
    rows, inner, columns = shape
    x, w = random(rows, inner, device="cuda"), random(columns, inner, seed=1, device="cuda")
    dy = random(rows, columns, seed=2, device="cuda")
    w8 = REFERENCE.quantize(w, BLOCK)
    pairs = [
        (REFERENCE.quantize(x, ACTIVATION), w8.T),
        (REFERENCE.quantize(dy, ACTIVATION), w8),
        (REFERENCE.quantize(dy, ALONG_TOKENS).T, REFERENCE.quantize(x, ALONG_TOKENS)),
        (REFERENCE.quantize(dy, BLOCK).T, REFERENCE.quantize(x, ALONG_TOKENS)),
    ]
    for a, b in pairs:
        within(Cublas(REFERENCE).matmul(a, b), *float32_operands(a, b))


@pytest.mark.gpu
@pytest.mark.parametrize("counts", [counts for counts in COUNTS if sum(counts)])
def test_grouped_products_on_a_device_are_within_their_bound(counts: tuple[int, ...]) -> None:
    """Each expert as above."""
    why = lacking(torch.device("cuda"))
    if why:
        pytest.skip(why)
    rows, backend = sum(counts), Cublas(REFERENCE)
    x, dy = random(rows, 200, device="cuda"), random(rows, 48, seed=2, device="cuda")
    w8 = REFERENCE.quantize(random(len(counts), 48, 200, seed=1, device="cuda"), BLOCK)
    x8, groups = REFERENCE.quantize(x, ACTIVATION), Groups.of(counts, x.device)
    dy_tokens, x_tokens = (REFERENCE.quantize(t, ALONG_TOKENS, groups=groups) for t in (dy, x))
    y = backend.grouped_matmul(x8, w8.T, groups).split(list(counts))
    dw = backend.grouped_outer(dy_tokens, x_tokens, groups)
    float32_x, float32_w = REFERENCE.dequantize(x8).split(list(counts)), REFERENCE.dequantize(w8)
    float32_dy = REFERENCE.dequantize(dy_tokens).split(list(counts))
    float32_tokens = REFERENCE.dequantize(x_tokens).split(list(counts))
    for expert in range(len(counts)):
        within(y[expert], float32_x[expert], float32_w[expert].mT)
        within(dw[expert], float32_dy[expert].mT, float32_tokens[expert])


def float32_operands(a: Quantized, b: Quantized) -> tuple[Tensor, Tensor]:
    return REFERENCE.dequantize(a), REFERENCE.dequantize(b)


def within(found: Tensor, a: Tensor, b: Tensor) -> None:
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    rounding = 2**-8 if found.dtype == torch.bfloat16 else 2**-22
    assert ((found.double() - exact).abs() <= 2**-10 * size + rounding * exact.abs()).all()

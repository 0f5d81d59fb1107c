"""The arithmetic and the rows of the benchmark's FP8 products, without a GPU."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.fp8 import cublas
from model.fp8.backends import Backend
from model.fp8.cublas import Cublas, Operand
from model.fp8.groups import Groups
from model.fp8.quantized import Quantized
from model.fp8.reference import Reference
from tests.bench.gpu import products as bench
from tests.bench.gpu import shapes
from tests.bench.gpu.setting import Setting
from tests.bench.gpu.shapes import Product, Shape

LINEAR = Shape("a Linear", 256, 128, 384)
EXPERTS = Shape("experts", 512, 256, 128, 2)
HERE = Setting(torch.device("cpu"), short=True)


def test_work_and_bytes_are_counted() -> None:
    assert shapes.flops(LINEAR) == 2 * 256 * 128 * 384
    # Values, results, a scale for each row and 128 columns, and three blocks of weights.
    weights = 128 * 384
    assert shapes.bytes_moved(LINEAR, "forward") == (
        256 * 128 + weights + 2 * 256 * 384 + 4 * (256 * 1 + 3)
    )
    assert shapes.bytes_moved(LINEAR, "input gradient") == (
        256 * 384 + weights + 2 * 256 * 128 + 4 * (256 * 3 + 3)
    )
    assert shapes.bytes_moved(LINEAR, "weight gradient") == (
        256 * (128 + 384) + 4 * 2 * (128 + 384) + 4 * weights
    )
    assert shapes.flops(EXPERTS) == 2 * 512 * 256 * 128
    assert shapes.bytes_moved(EXPERTS, "forward") == (
        512 * 256 + 2 * 128 * 256 + 2 * 512 * 128 + 4 * (512 * 2 + 2 * 2)
    )
    assert shapes.bytes_moved(EXPERTS, "weight gradient") == (
        512 * (256 + 128) + 4 * (2 + 2) * (256 + 128) + 4 * 2 * 256 * 128
    )


def test_the_floor_is_the_longer_of_copy_and_arithmetic() -> None:
    assert shapes.floor_seconds(100, 50.0, 1.0) == 2.0
    assert shapes.floor_seconds(100, 50.0, 3.0) == 3.0
    assert shapes.floor_seconds(100, "no peak", 3.0) == "no peak"
    assert shapes.floor_seconds(100, 50.0, "no copy") == "no copy"


def test_ratios_of_made_up_timings_are_right() -> None:
    seconds: dict[str, float | str] = {
        **dict.fromkeys(shapes.VARIANTS, 2e-3),
        "bf16": 4e-3,
        "torch alone": 1e-3,
        "triton, product": "failed: no compiler",
    }
    product = Product(LINEAR, "forward", seconds, {"cublas": 0.25}, 0.5e-3)
    # At this peak the arithmetic takes 0.8 ms in FP8, more than the copy's 0.5 ms.
    peak_fp8 = shapes.flops(LINEAR) / 0.8e-3
    found = {row.by: row for row in bench.product_rows(product, peak_fp8)}
    assert list(found) == shapes.VARIANTS
    bf16, alone, casts = (found[by] for by in ("bf16", "torch alone", "cublas, with casts"))
    assert (bf16.figure, bf16.ratio, set(bf16.more)) == (4.0, 1.0, {"TFLOP/s"})
    assert alone.ratio == 4.0 and alone.more["floor / time"] == pytest.approx(0.8)
    assert casts.ratio == 2.0 and casts.more["floor / time"] == pytest.approx(0.4)
    assert casts.more["error / bound"] == 0.25
    assert casts.more["TFLOP/s"] == pytest.approx(shapes.flops(LINEAR) / 2e-3 / 1e12)
    broken = found["triton, product"]
    assert (broken.figure, broken.ratio, dict(broken.more)) == ("failed: no compiler", "", {})


def simulated(
    left: Operand, right: Operand, dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """What `scaled_mm` would give, from scales spelt out again."""
    sides = []
    for side in (left, right):
        rows, inner = side.values.shape
        scales = side.scales.mT.repeat_interleave(128, 0)[:rows] if side.blocks else side.scales
        sides.append(side.values.float() * scales.repeat_interleave(128, 1)[:, :inner])
    made = (sides[0] @ sides[1].T).to(dtype)
    return made if out is None else out.copy_(made)


@pytest.mark.parametrize("shape", [LINEAR, EXPERTS], ids=lambda shape: shape.name)
@pytest.mark.parametrize("which", shapes.PASSES)
def test_all_variants_of_a_product_run_and_a_wrong_one_is_told(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, which: shapes.Pass
) -> None:
    class Wrong(Reference):
        def matmul(self, a: Quantized, b: Quantized) -> Tensor:
            return 1.1 * super().matmul(a, b)

        def grouped_matmul(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
            return 1.1 * super().grouped_matmul(a, b, groups)

        def grouped_outer(self, a: Quantized, b: Quantized, groups: Groups) -> Tensor:
            return 1.1 * super().grouped_outer(a, b, groups)

    backends: dict[str, Backend] = {"cublas": Cublas(Reference()), "triton": Wrong()}
    monkeypatch.setattr(bench, "backend_for", lambda _, name: backends[name])
    monkeypatch.setattr(bench, "lacking", lambda _: None)
    monkeypatch.setattr(bench, "multiply", simulated)
    monkeypatch.setattr(cublas, "multiply", simulated)

    setting = replace(HERE)

    def clock(run: Callable[[], object]) -> float:
        run()
        return 1.0

    monkeypatch.setitem(setting.__dict__, "clock", clock)
    found = bench.measure_product(shape, which, setting)
    good = ("copy", "bf16", "torch alone", "cublas, product", "cublas, with casts")
    assert {name: found.seconds[name] for name in good} == dict.fromkeys(good, 1.0)
    assert str(found.seconds["triton, product"]).startswith("failed: wrong")
    assert 0 < float(found.errors["cublas"]) <= 1 < float(found.errors["triton"])


def test_a_backend_that_is_not_there_is_no_fault() -> None:
    found = bench.measure_product(LINEAR, "forward", HERE)
    rows = {row.by: row for row in bench.product_rows(found, 1e12)}
    assert isinstance(rows["bf16"].figure, float)
    absent = [row for by, row in rows.items() if by != "bf16"]
    assert len(absent) == len(shapes.VARIANTS) - 1
    assert all(str(row.figure).startswith("not measured: ") for row in absent)
    assert not any(row.is_fault for row in rows.values())

"""The arithmetic and the table of the FP8 benchmark, with made-up timings and without a GPU."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from configs.model import V3Config
from configs.train import Precision
from model.fp8 import cublas, scheme
from model.fp8.backends import Backend
from model.fp8.cublas import Cublas, Operand
from model.fp8.groups import Groups
from model.fp8.quantized import Quantized
from model.fp8.reference import Reference
from model.transformer import Transformer
from tests.bench import fp8_on_gpu as bench
from tests.bench import fp8_table as tables
from tests.bench.fp8_table import Product, Shape, Step

LINEAR = Shape("a Linear", 256, 128, 384)
EXPERTS = Shape("experts", 512, 256, 128, 2)


def columns(line: str) -> list[str]:
    return [one.strip() for one in line.strip("|").split("|")]


def test_a_machine_without_a_gpu_gets_the_table_and_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(bench, "no_device", lambda: "made to have none")
    assert bench.main(["--out", str(tmp_path / "table.md")]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "table.md").read_text()
    said, _, head, _, *rows = printed.splitlines()
    assert said == "Nothing was measured: made to have none."
    assert len(rows) == 1 + len(tables.SHAPES) * 3 * len(tables.VARIANTS) + 2 + 4
    for line in rows:
        cells = columns(line)
        assert len(cells) == len(columns(head))
        assert set(cells[3:]) <= {"not measured", ""} and "not measured" in cells[3:]


def test_why_there_is_no_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in bench.no_device()
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in bench.no_device()


def test_work_and_bytes_are_counted() -> None:
    assert tables.flops(LINEAR) == 2 * 256 * 128 * 384
    # Values, results, a scale for each row and 128 columns, and three blocks of weights.
    weights = 128 * 384
    assert tables.bytes_moved(LINEAR, "forward") == (
        256 * 128 + weights + 2 * 256 * 384 + 4 * (256 * 1 + 3)
    )
    assert tables.bytes_moved(LINEAR, "input gradient") == (
        256 * 384 + weights + 2 * 256 * 128 + 4 * (256 * 3 + 3)
    )
    assert tables.bytes_moved(LINEAR, "weight gradient") == (
        256 * (128 + 384) + 4 * 2 * (128 + 384) + 4 * weights
    )
    assert tables.flops(EXPERTS) == 2 * 512 * 256 * 128
    assert tables.bytes_moved(EXPERTS, "forward") == (
        512 * 256 + 2 * 128 * 256 + 2 * 512 * 128 + 4 * (512 * 2 + 2 * 2)
    )
    assert tables.bytes_moved(EXPERTS, "weight gradient") == (
        512 * (256 + 128) + 4 * (2 + 2) * (256 + 128) + 4 * 2 * 256 * 128
    )


def test_the_floor_is_the_longer_of_copy_and_arithmetic() -> None:
    assert tables.floor_seconds(100, 50.0, 1.0) == 2.0
    assert tables.floor_seconds(100, 50.0, 3.0) == 3.0
    assert tables.floor_seconds(100, "no peak", 3.0) == "no peak"
    assert tables.floor_seconds(100, 50.0, "no copy") == "no copy"


def test_ratios_of_made_up_timings_are_right() -> None:
    seconds: dict[str, tables.Figure] = {
        **dict.fromkeys(tables.VARIANTS, 2e-3),
        "bf16": 4e-3,
        "torch alone": 1e-3,
        "triton, product": "no compiler | here\nor there",
    }
    product = Product(LINEAR, "forward", seconds, {"cublas": 0.25}, 0.5e-3)
    steps = [Step("bf16", 0.4, 4 * 2**30, 2.0 * 2**30), Step("fp8", 0.2, 3.0 * 2**30, "lost")]
    work = float(tables.flops(LINEAR))
    # At this peak the arithmetic takes 0.8 ms in FP8, more than the copy's 0.5 ms.
    lines = list(tables.table([product], steps, 1e12, work / 1.6e-3))
    found = {tuple(cells[:3]): cells[3:] for cells in map(columns, lines[2:])}
    key = LINEAR.name, "forward"
    assert found[*key, "bf16"][0] == "4.000" and found[*key, "bf16"][2:] == ["1.00", "", ""]
    assert found[*key, "torch alone"][2:] == ["4.00", "0.80", ""]
    assert found[*key, "cublas, with casts"][2:] == ["2.00", "0.40", "0.2500"]
    assert found[*key, "triton, product"][0] == "not measured: no compiler / here or there"
    assert found[*key, "triton, with casts"][2:] == ["2.00", "0.40", "not measured"]
    assert found["1B MoE", "training step", "bf16"][:3] == ["400.0", "2", "1.00"]
    assert found["1B MoE", "training step", "fp8"][:3] == ["200.0", "5", "2.00"]
    assert found["1B MoE", "forward's peak, GiB", "fp8"][:3] == ["3.00", "", "1.33"]
    assert found["1B MoE", "saved for backward, GiB", "fp8"][0] == "not measured: lost"


def test_rates_are_teraflops() -> None:
    shape = Shape("a product of 2 GFLOP", 1000, 1000, 1000)
    product = Product(shape, "forward", dict.fromkeys(tables.VARIANTS, 1e-5), {}, 0.0)
    assert {columns(line)[4] for line in tables.product_rows(product, 1e15)} == {"200"}


def test_what_fails_leaves_the_others_their_medians() -> None:
    calls: list[str] = []

    def late() -> None:
        calls.append("late")
        if calls.count("late") > bench.WARM_UP + 1:
            raise RuntimeError("broke\nin the second round")

    def never() -> None:
        raise NotImplementedError("not on this device")

    ticks = iter([1.0, 9.0, 3.0])

    def clock(run: Callable[[], object]) -> float:
        run()
        return 5.0 if run is late else next(ticks)

    found = bench.interleaved(
        {"well": lambda: None, "late": late, "never": never, "absent": "no such backend"}, clock, 3
    )
    assert found == {
        "well": 3.0,
        "late": "failed: broke",
        "never": "failed: not on this device",
        "absent": "no such backend",
    }


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
@pytest.mark.parametrize("which", tables.PASSES)
def test_all_variants_of_a_product_run_and_a_wrong_one_is_told(
    monkeypatch: pytest.MonkeyPatch, shape: Shape, which: tables.Pass
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
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)

    def clock(run: Callable[[], object]) -> float:
        run()
        return 1.0

    found = bench.measure_product(shape, which, torch.device("cpu"), clock)
    good = ("copy", "bf16", "torch alone", "cublas, product", "cublas, with casts")
    assert {name: found.seconds[name] for name in good} == dict.fromkeys(good, 1.0)
    assert str(found.seconds["triton, product"]).startswith("failed: wrong")
    assert 0 < float(found.errors["cublas"]) <= 1 < float(found.errors["triton"])


def test_the_model_has_a_billion_parameters_of_which_a_token_meets_some() -> None:
    with torch.device("meta"):
        model = Transformer(bench.MODEL)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 0.9e9 < total < 1.1e9
    layers = bench.MODEL.num_hidden_layers - bench.MODEL.first_k_dense_replace
    idle = layers * 3 * 1024 * 512 * (48 - 8) + 32768 * 1024
    assert bench.active_parameters(model, 48, 8) == total - idle


def test_a_table_with_a_failed_cell_ends_in_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "report", lambda: iter(["| a | 1.0 |", "| b | failed: no room |"]))
    assert bench.main([]) == 1
    assert "no room" in capsys.readouterr().out
    monkeypatch.setattr(bench, "report", lambda: iter(["| a | 1.0 |"]))
    assert bench.main([]) == 0


def test_a_step_that_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no room")

    monkeypatch.setattr(bench, "Transformer", refuse)
    monkeypatch.setattr(bench, "build_trainer", refuse)
    assert bench.training_step("fp8", torch.device("cpu")) == Step("fp8", *["failed: no room"] * 3)


@pytest.mark.parametrize("precision", ["high", "fp8"])
def test_a_small_step_runs_to_its_end(
    monkeypatch: pytest.MonkeyPatch, precision: Precision
) -> None:
    small = {"vocab_size": 64, "hidden_size": 128, "num_hidden_layers": 2, "q_lora_rank": 64}
    experts = {"intermediate_size": 128, "moe_intermediate_size": 128, "n_routed_experts": 16}
    config = bench.MODEL.model_dump() | small | experts
    monkeypatch.setattr(bench, "MODEL", V3Config.model_validate(config))
    monkeypatch.setattr(bench, "STEP_SHAPE", (2, 16))
    for name, value in (("memory_allocated", 7), ("max_memory_allocated", 9)):
        monkeypatch.setattr(torch.cuda, name, lambda _, value=value: value)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    # A CPU's products are float32, which a model in bfloat16 has no use for.
    monkeypatch.setattr(cublas, "multiply", simulated)
    monkeypatch.setattr(scheme, "backend_for", lambda *_: Cublas(Reference()))
    step = bench.training_step(precision, torch.device("cpu"))
    assert float(step.seconds) > 0 and (step.peak_bytes, step.saved_bytes) == (2.0, 0.0)

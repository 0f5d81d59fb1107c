"""The program that measures on a GPU, as far as it can be seen without one."""

import json
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]

from cluster.checkpoint import load_shards
from configs.errors import ArtifactError, MachineError
from model.transformer import Transformer
from tests.bench import on_gpu
from tests.bench.gpu import conversion, models, profile, repeats, setting, waits
from tests.bench.gpu.rows import FAILED, Row, as_json, attempted, cell, from_json, line, ratio, why
from tests.bench.gpu.setting import Setting, interleaved
from tests.bench.on_gpu import Part, apart
from tests.losses import part_of

HERE = Setting(torch.device("cpu"), short=True)
ELSEWHERE = Setting(torch.device("cuda"))
"""What nothing may be computed on here."""


def test_a_machine_without_a_gpu_gets_the_reason_in_every_part(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(on_gpu, "no_device", lambda: "made to have none")
    assert on_gpu.main(["--out", str(tmp_path / "told.json")]) == 0
    printed = capsys.readouterr().out
    assert printed.count("not measured: made to have none") == len(on_gpu.PARTS)
    told = json.loads((tmp_path / "told.json").read_text())
    assert [part["name"] for part in told["parts"]] == [part.name for part in on_gpu.PARTS]
    assert told["faults"] == 0


def test_all_parts_together_take_less_than_ten_minutes() -> None:
    """With what it takes to begin."""
    assert sum(part.seconds for part in on_gpu.PARTS) <= on_gpu.LIMIT_SECONDS <= 580


def test_why_there_is_no_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "built without CUDA" in setting.no_device()
    monkeypatch.setattr(torch.version, "cuda", "12.9")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in setting.no_device()


def breaks(setting: Setting) -> Iterator[Row]:
    yield Row("a first", "somebody", 1.0)
    raise RuntimeError("no | room\nand more")


def test_what_fails_leaves_the_others_and_ends_in_exit_code_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fine(setting: Setting) -> Iterator[Row]:
        yield from attempted(setting, "a second", "somebody", breaks)
        yield Row("a third", "somebody", 0.5, "of 1", most=1)

    monkeypatch.setattr(on_gpu, "PARTS", (Part("one", breaks, 1), Part("two", fine, 1)))
    assert on_gpu.main(["--short", "--out", str(tmp_path / "told.json")]) == 1
    rows = capsys.readouterr().out.splitlines()
    columns = rows[2].count("|")
    assert all(row.count("|") == columns for row in rows[2:])
    assert sum("failed: no / room" in row for row in rows) == 2
    assert "| two | a third | somebody | 0.5 | of 1 |  |  |  |" in rows
    assert json.loads((tmp_path / "told.json").read_text())["faults"] == 2
    monkeypatch.setattr(on_gpu, "PARTS", (Part("two", lambda _: iter([]), 1),))
    assert on_gpu.main(["--short"]) == 0


def test_a_figure_above_what_it_may_be_is_a_fault() -> None:
    good, bad = Row("x", "y", 1, most=1), Row("x", "y", 2.0, "apples", most=1)
    assert not good.is_fault and bad.is_fault
    assert Row("x", "y", float("nan"), most=1).is_fault
    assert not Row("x", "y", "not measured: no time left", most=1).is_fault
    assert "| 2, above 1 | apples |" in line("part", bad)
    assert from_json(json.loads(json.dumps(as_json(bad)))) == bad


def test_figures_are_short() -> None:
    figures = [0.0, 12.0, 1234567.8, 4321.5, 12.3456, 0.00123456, -0.5]
    shown = ["0", "12", "1,234,568", "4,322", "12.35", "0.00123", "-0.5"]
    assert [cell(one) for one in figures] == shown
    assert ratio(1.0, "failed: x") == "" and ratio(3.0, 2.0) == 1.5


def test_a_reason_names_the_line_of_the_project() -> None:
    assert why(MachineError("no room\nand more")) == f"{FAILED}no room"
    with pytest.raises(ArtifactError) as broken:
        load_shards(Path("no such folder"))
    assert " at cluster/checkpoint.py:" in why(broken.value)


def test_nothing_is_begun_without_time() -> None:
    late = replace(HERE, until=time.monotonic() - 1)
    (row,) = attempted(late, "x", "y", breaks)
    assert row.figure == "not measured: no time left"


def test_what_fails_later_leaves_the_others_their_medians(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls: list[str] = []

    def late() -> None:
        calls.append("late")
        if calls.count("late") > 2:
            raise RuntimeError("broke\nin the second round")

    def never() -> None:
        raise NotImplementedError("not on this device")

    ticks, here = iter([1.0, 9.0, 3.0]), replace(HERE)

    def clock(run: Any) -> float:
        run()
        return 5.0 if run is late else next(ticks)

    monkeypatch.setitem(here.__dict__, "clock", clock)
    variants: dict[str, Any] = {
        "well": lambda: None,
        "late": late,
        "never": never,
        "absent": "no such backend",
    }
    assert interleaved(variants, here, why, 3) == {
        "well": 3.0,
        "late": "failed: broke",
        "never": "failed: not on this device",
        "absent": "no such backend",
    }


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    """Let a part's process run this."""
    monkeypatch.setattr(on_gpu, "COMMAND", (sys.executable, "-c", text))
    monkeypatch.setattr(on_gpu, "LAST_SECONDS", 0.0)
    monkeypatch.setattr(on_gpu, "ENDING_SECONDS", 0.2)


PART = Part("card", breaks, 1)
TOLD = f"print('row ' + {json.dumps(as_json(Row('x', 'y', 1.0)))!r}, flush=True)"


def test_a_process_that_never_ends_is_ended_with_what_it_started(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    child = tmp_path / "pid"
    program(
        monkeypatch,
        f"import subprocess, time; {TOLD}\n"
        "one = subprocess.Popen(['sleep', '60'])\n"
        f"open({str(child)!r}, 'w').write(str(one.pid)); time.sleep(60)",
    )
    begin = time.monotonic()
    first, last = apart(PART, begin + 3)
    assert first == Row("x", "y", 1.0)
    assert last.figure == "failed: its time was over before it was done"
    assert time.monotonic() - begin < 20
    # It may take a moment to die, and whoever adopts it another to clear it away.
    state, deadline = Path(f"/proc/{child.read_text()}/stat"), time.monotonic() + 10
    while (alive := _is_alive(state)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive


def _is_alive(state: Path) -> bool:
    try:
        return state.read_text().split()[2] != "Z"
    except OSError:
        return False


def test_a_process_that_is_done_is_waited_for_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, f"import time; {TOLD}; print('done', flush=True); time.sleep(60)")
    begin = time.monotonic()
    assert list(apart(PART, begin + 50)) == [Row("x", "y", 1.0)]
    assert time.monotonic() - begin < 30


def test_a_process_that_dies_says_its_last_words(monkeypatch: pytest.MonkeyPatch) -> None:
    program(monkeypatch, f"import sys; {TOLD}; sys.exit('lost the device')")
    first, last = apart(PART, time.monotonic() + 50)
    assert (first.figure, last.figure) == (1.0, "failed: ended with exit code 1: lost the device")
    program(monkeypatch, "")
    (row,) = apart(PART, time.monotonic() - 1)
    assert row.figure == "not measured: no time left"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, which a part would use")
def test_a_part_runs_in_its_own_process() -> None:
    """To where it asks for the device."""
    (row,) = apart(on_gpu.PARTS[0], time.monotonic() + 100)
    assert str(row.figure).startswith("failed: ended with exit code 1: ")
    assert "CUDA" in str(row.figure)


def test_time_at_work_counts_what_overlaps_once() -> None:
    def event(name: str, begin: float, end: float, **other: Any) -> SimpleNamespace:
        span = SimpleNamespace(start=begin, end=end, elapsed_us=lambda: end - begin)
        kinds = {"device_type": DeviceType.CUDA, "is_user_annotation": False}
        return SimpleNamespace(name=name, time_range=span, **(kinds | other))

    work = profile.summary(
        [
            event("a", 0, 10),
            event("b", 5, 12),
            event("b", 20, 26),
            event("inside b", 21, 23),
            event("step", 0, 100, is_user_annotation=True),
            event("aten::mm", 0, 50, device_type=DeviceType.CPU),
        ]
    )
    assert work.launches == 4
    assert work.busy_seconds == pytest.approx(18e-6)
    assert list(work.by_name) == ["b", "a", "inside b"]
    assert work.by_name["b"] == pytest.approx(13e-6)
    assert profile.work_of(HERE, lambda: torch.ones(2) + 1).launches == 0


class Reader:
    """Waits for a device that is not there, as CUDA's mode has it."""

    mode: Any = "default"

    def read(self) -> None:
        if self.mode == "error":
            raise RuntimeError(waits.MESSAGE)
        if self.mode == "warn":
            warnings.warn(waits.MESSAGE, stacklevel=1)


def test_waits_are_counted_by_place_and_refused_but_where_they_are_allowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = Reader()
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: reader.mode)
    monkeypatch.setattr(
        torch.cuda, "set_sync_debug_mode", lambda mode: setattr(reader, "mode", mode)
    )
    with waits.counted(ELSEWHERE) as found:
        reader.read()
        reader.read()
        warnings.warn("something else", stacklevel=1)
    assert list(found.values()) == [2]
    assert str(next(iter(found))).startswith("tests/bench/test_on_gpu.py:")
    with pytest.raises(RuntimeError, match=waits.MESSAGE), waits.refused(ELSEWHERE):
        reader.read()
    with waits.refused(ELSEWHERE, (reader, "read")):
        reader.read()
        assert reader.mode == "error"
    assert reader.mode == "default"


def test_a_tokens_arithmetic_is_that_of_what_it_meets() -> None:
    config = models.ONE_BILLION
    with torch.device("meta"):
        model = Transformer(config)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert 0.9e9 < total < 1.1e9
    idle = 11 * 3 * 1024 * 512 * (48 - 8) + 32768 * 1024
    active = models.active_parameters(model, config)
    assert active == total - idle
    # Each of 12 layers' 16 heads has queries of 96 and values of 64, and half of 2,048 keys.
    assert models.token_flops(config, 2048) == 6 * active + 6 * 12 * 16 * (96 + 64) * 1024


@pytest.mark.parametrize("config", [models.ONE_BILLION, models.SLICE], ids=["1B", "slice"])
def test_a_step_of_each_model_has_all_its_gradients(config: Any) -> None:
    """On no device at all: shapes and types alone."""
    numerics, _ = models.numerics_of("bf16", torch.device("meta"))
    with torch.device("meta"):
        model = Transformer(config, precision=numerics).train()
    batch, loss = models.batch_of(config, (1, 64), documents=1)
    there = {"tokens": batch["tokens"].to("meta")}
    part_of(loss, model, there, loss.counts(batch))[0].backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in model.parameters())


def test_codes_of_the_hardware_are_judged() -> None:
    x = torch.tensor([0.0, 1.0, -448.0, 500.0, -torch.inf, torch.nan, 0.3])
    code = x.to(torch.float8_e4m3fn).view(torch.uint8)
    code[3], code[4] = 0x7E, 0xFE
    assert conversion.compared(x, code) == (0, 0, 0)
    code[6] += 1
    code[3] = 0x7F
    code[5] = 0x7E
    assert conversion.compared(x, code) == (1, 1, 1)


def test_a_training_that_does_not_repeat_is_told() -> None:
    one = repeats._Run([1.0, 2.0, 3.0], {"w": torch.zeros(2), "b": torch.ones(1)})
    assert not repeats._compared("x", "bf16", one, one, begin=0).is_fault
    other = repeats._Run([2.5, 3.0], {"w": torch.tensor([0.0, -1e-30]), "b": torch.ones(1)})
    row = repeats._compared("x", "bf16", one, other, begin=1)
    assert (row.figure, row.note) == (2.0, "first in step 1")
    assert row.is_fault

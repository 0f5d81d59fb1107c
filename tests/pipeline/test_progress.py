"""The line that a user watches, and the table at the end."""

import io
import re
import threading
import time

import pytest
from rich.console import Console

from configs.parallel import StoreConfig
from pipeline import progress
from pipeline.progress import Display, Line
from pipeline.records import INTERRUPTED, Blocked, Built, Failed, Invocation, Run
from tests.pipeline.fakes import World


def test_a_line_shows_steps_rate_time_left_and_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    line = Line("pretrain")
    line.start(steps=400, unit="step")
    line.log({"loss": 5.0}, step=1)
    clock[0] += 10
    figures = {"loss": 2.31, "tokens_per_second": 3900, "grad_norm": 1.0, "mfu": 0.12345}
    line.log(figures, step=41)
    assert line.text() == (
        "pretrain 41/400 steps, 4/s, 01:29 left, tokens per second 3,900, MFU 12.3 %, loss 2.31"
    )


def test_a_resumed_line_does_not_count_its_past_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    line = Line("pretrain")
    line.start(steps=300, unit="step")
    line.log({}, step=200)
    clock[0] += 5
    line.log({}, step=210)
    assert "2/s, 00:45 left" in line.text()


def test_neither_start_up_nor_silence_counts_as_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    line = Line("pretrain")
    line.start(steps=300, unit="step")
    for step in range(1, 201):
        line.log({}, step=step)  # Those of the run before.
    clock[0] += 20
    line.log({}, step=201)
    assert "/s" not in line.text()
    clock[0] += 5
    line.log({}, step=211)
    assert line.text() == "pretrain 211/300 steps, 2/s, 00:44 left"
    clock[0] += 29
    assert line.text() == "pretrain 211/300 steps, 2/s, 00:15 left"
    clock[0] += 31
    assert line.text() == "pretrain 211/300 steps, 2/s, no step for 01:00"


def test_a_log_gets_one_line_per_interval(
    monkeypatch: pytest.MonkeyPatch, store_config: StoreConfig
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.2)
    out = io.StringIO()
    display = Display(Console(file=out, width=120))
    World(store_config).run(listeners=(display,), train={"seconds": 0.7})
    lines = out.getvalue().splitlines()
    assert 2 <= sum(line.startswith("train 3/3 steps") for line in lines) <= 4
    assert any(line.startswith("train built in") for line in lines)


def test_a_terminal_gets_a_live_line(store_config: StoreConfig) -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=120, force_terminal=True))
    World(store_config).run(listeners=(display,), train={"seconds": 0.7})
    assert "train 3/3 steps" in out.getvalue()


def displayed(world: World, console: Console) -> None:
    """Two nodes that are built at the same time, one for longer than the other, with notes."""
    display, graph = Display(console), world.graph()
    one, other = display.begin(graph["pack.cuda"], {}), display.begin(graph["pack.ascend"], {})
    one.start(steps=4, unit="step")
    one.log({"loss": 1.5}, step=1)
    one.note("both run")
    time.sleep(0.5)
    display.end(graph["judge"], Blocked("train"), None)
    display.end(graph["pack.cuda"], Failed("it broke", 1.0), None)
    time.sleep(0.5)
    other.note("alone now")
    display.end(graph["pack.ascend"], Failed("it broke too", 2.0), None)


def test_a_terminal_shows_a_line_for_each_node_that_runs(store_config: StoreConfig) -> None:
    out = io.StringIO()
    console = Console(file=out, width=120, height=30, force_terminal=True)
    before = threading.active_count()
    displayed(World(store_config), console)
    told = out.getvalue()
    both = re.search(r"pack.cuda 1/4 steps, loss 1.5 *\r?\n.*pack.ascend 00:00", told)
    assert both is not None
    # Once the one has ended its line is gone, and the other's goes on.
    after = told[told.index("pack.cuda failed") :]
    assert "pack.cuda 1/4" not in after
    assert re.search(r"pack.ascend 00:0", after)
    assert threading.active_count() == before


def test_a_log_tells_of_each_node_and_whose_a_note_is(
    monkeypatch: pytest.MonkeyPatch, store_config: StoreConfig
) -> None:
    monkeypatch.setattr(progress, "LOG_SECONDS", 0.2)
    out = io.StringIO()
    displayed(World(store_config), Console(file=out, width=120))
    lines = out.getvalue().splitlines()
    assert 1 <= lines.count("pack.cuda 1/4 steps, loss 1.5") <= 3
    begun = ["pack.cuda begins", "pack.ascend begins"]
    assert [line for line in lines if line.endswith(" begins")] == begun
    assert lines[2] == "pack.cuda: both run"
    broke = lines.index("pack.cuda failed after 1.0 s: it broke")
    assert lines.index("judge blocked by train") < broke
    # The second while both run, and alone.
    for part in (lines[:broke], lines[broke:]):
        assert any(line.startswith("pack.ascend 00:0") for line in part)
    assert lines[-2:] == ["alone now", "pack.ascend failed after 2.0 s: it broke too"]


def test_the_table_has_a_row_for_every_outcome() -> None:
    out = io.StringIO()
    outcomes: dict[str, Built | Failed | Blocked] = {
        "data": Built("artifacts/a/b/g1", "f", "c", 2.5, {"train_tokens": 12000.0}, "a" * 32),
        "train": Failed("it broke", 1.0),
        "judge": Blocked("train"),
    }
    run = Run("id", "tiny", Invocation("tiny"), {}, 0.0, "/store", {}, outcomes=outcomes)
    links = {"data": f"http://host/#/experiments/1/runs/{'a' * 32}"}
    Display(Console(file=out, width=120)).table(run, links)
    rows = [[cell.strip() for cell in line.split("│")] for line in out.getvalue().splitlines()]
    assert ["", "data", "built", "2.5", "train tokens 12,000", "aaaaaaaa", ""] in rows
    assert ["", "train", "failed", "1.0", "it broke", "", ""] in rows
    assert ["", "judge", "blocked", "", "needs train", "", ""] in rows


@pytest.mark.parametrize("terminal", [True, False])
def test_a_log_spells_out_each_page_unbroken_and_a_terminal_links_to_it(terminal: bool) -> None:
    out = io.StringIO()
    outcomes = {"data": Built("artifacts/a/b/g1", "f", "c", 2.5, {}, "a" * 32)}
    run = Run("id", "tiny", Invocation("tiny"), {}, 0.0, "/store", {}, outcomes=outcomes)
    url = f"http://{'long' * 30}/#/experiments/1/runs/{'a' * 32}"
    console = Console(file=out, width=80, force_terminal=terminal)
    Display(console).table(run, {"data": url})
    assert (f"data: {url}\n" in out.getvalue()) is not terminal
    assert (f";{url}\x1b" in out.getvalue()) is terminal


def test_a_node_that_the_user_stopped_did_not_fail() -> None:
    out = io.StringIO()
    display = Display(Console(file=out, width=200))
    outcomes = {"train": Failed(INTERRUPTED, 2.0), "judge": Failed("no", 1.0)}
    run = Run("id", "tiny", Invocation("tiny"), {}, 0.0, "/store", {}, outcomes=outcomes)
    display.table(run, {})
    rows = [line.split("│")[1:3] for line in out.getvalue().splitlines() if line.startswith("│")]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["train", "stopped"],
        ["judge", "failed"],
    ]
    assert INTERRUPTED not in out.getvalue()

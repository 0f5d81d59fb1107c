"""What the user sees while the line runs: a live line for each node, or log lines at intervals."""

import threading
import time
from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from pipeline.figures import shortened, show_figure, show_figures, show_number, spoken
from pipeline.graph import Node
from pipeline.records import Blocked, Built, Failed, Reused, Run
from pipeline.store import Committed
from stages.steps import scalars

LOG_SECONDS = 10.0
_LOG_COLUMNS = 120
_LIVE_SECONDS = 0.25
_FIGURES = ("tokens_per_second", "mfu", "reward", "loss")
_COLOURS = {
    "built": "green",
    "reused": "cyan",
    "failed": "red",
    "blocked": "yellow",
    "stopped": "yellow",
}


_SILENT_SECONDS, _SILENT_STEPS = 30.0, 5
"""For so long, and for the time of so many steps, none may be done before that is said."""
_PAST_SECONDS = 1.0
"""How long after the first step others may arrive that were done by an earlier run."""


def make_console(*, stderr: bool = False) -> Console:
    """The terminal, or a log of a fixed width; on stderr where stdout is for machines."""
    console = Console(stderr=stderr)
    return console if console.is_terminal else Console(stderr=stderr, width=_LOG_COLUMNS)


class Line:
    """Progress of one node: steps done of how many, rate, time left, the latest key figures."""

    def __init__(self, name: str) -> None:
        """A line that has heard of no step yet."""
        self.name = name
        self._started = self._first_time = self._heard = self._last_time = time.monotonic()
        self._is_past = False
        self._steps, self._unit = 0, "step"
        self._first = self._step = 0
        self._figures: dict[str, float] = {}

    def start(self, *, steps: int, unit: str) -> None:
        """How many steps there are."""
        self._steps, self._unit = steps, unit

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """One more step is done."""
        now = time.monotonic()
        if self._step == 0:
            self._heard = now
        if now - self._heard < _PAST_SECONDS:
            # A resumed build reports its past at once: the rate is measured after it, and not while
            # workers start, from the first step of its own on.
            self._is_past = self._step > 0
            self._first, self._first_time = step, now
        elif self._is_past:
            self._is_past = False
            self._first, self._first_time = step, now
        self._step, self._last_time = step, now
        found = scalars(metrics)
        self._figures = {name: found[name] for name in _FIGURES if name in found}

    def text(self) -> str:
        """The line as it stands: `pretrain 120/400 steps, 3.2/s, 1:28 left, loss 2.31`."""
        if not self._step:
            steps = f"0/{self._steps} {self._units()}, starting, " if self._steps else ""
            return f"{self.name} {steps}{_clock(time.monotonic() - self._started)}"
        parts = [f"{self.name} {self._step}/{self._steps} {self._units()}"]
        elapsed, done = self._last_time - self._first_time, self._step - self._first
        silent = time.monotonic() - self._last_time
        if done > 0 and elapsed > 0:
            rate = done / elapsed
            parts.append(f"{show_number(rate)}/s")
            if silent < max(_SILENT_SECONDS, _SILENT_STEPS / rate):
                left = max(0, self._steps - self._step) / rate
                parts.append(f"{_clock(max(0.0, left - silent))} left")
            else:
                parts.append(f"no {self._unit.removesuffix('s')} for {_clock(silent)}")
        if self._figures:
            parts.append(show_figures(self._figures))
        return ", ".join(parts)

    def _units(self) -> str:
        return self._unit if self._unit.endswith("s") else f"{self._unit}s"


class Display:
    """A listener that speaks to the terminal, or to a log when there is none."""

    def __init__(self, console: Console) -> None:
        """Write to `console`; its being a terminal decides between live lines and log lines."""
        self.console = console
        self.lines: Mapping[str, Line] = {}
        """By node that is being built. Replaced, never changed: another thread shows them."""
        self._idle = threading.Event()
        self._thread: threading.Thread | None = None

    def begin(self, node: Node, inputs: Mapping[str, Committed]) -> "NodeDisplay":
        """Start the line of a node."""
        line = Line(node.name)
        self.lines = {**self.lines, node.name: line}
        if not self.console.is_terminal:
            # Seconds may pass before a line says more, and a minute where workers start.
            self.note(f"{node.name} begins")
        if self._thread is None:
            self._idle = threading.Event()
            target = self._live if self.console.is_terminal else self._log
            self._thread = threading.Thread(target=target, args=(self._idle,), daemon=True)
            self._thread.start()
        return NodeDisplay(line, self)

    def end(
        self, node: Node, outcome: Built | Reused | Failed | Blocked, made: Committed | None
    ) -> None:
        """Replace the line by what became of the node."""
        self.lines = {name: line for name, line in self.lines.items() if name != node.name}
        if self._thread is not None and not self.lines:
            self._idle.set()
            self._thread.join()
            self._thread = None
        self.console.print(Text(f"{node.name} {_tell(outcome)}"), soft_wrap=True)

    def note(self, message: str) -> None:
        """One line above the live ones."""
        self.console.print(Text(message), soft_wrap=True)

    def __rich__(self) -> Group:
        """The live lines, as they stand whenever they are drawn."""
        texts = [line.text() for line in self.lines.values()]
        return Group(*(Text(text, no_wrap=True, overflow="ellipsis") for text in texts))

    def _live(self, idle: threading.Event) -> None:
        with Live(self, console=self.console, transient=True, auto_refresh=False) as live:
            while not idle.wait(_LIVE_SECONDS):
                live.refresh()

    def _log(self, idle: threading.Event) -> None:
        while not idle.wait(LOG_SECONDS):
            for line in self.lines.values():
                self.note(line.text())

    def table(self, run: Run, links: Mapping[str, str]) -> None:
        """One row a node: outcome, seconds, key figure, and where MLflow shows it."""
        table = Table(title=Text(f"{run.recipe} {run.id}"), title_justify="left")
        for heading in ("node", "outcome", "seconds", "key figure", "MLflow"):
            table.add_column(heading, justify="right" if heading == "seconds" else "left")
        for name, outcome in run.outcomes.items():
            word = _word(outcome)
            seconds = "" if isinstance(outcome, Blocked) else f"{outcome.seconds:.1f}"
            url = links.get(name, "")
            link = Text(url.rpartition("/")[2][:8], f"link {url}" if url else "")
            table.add_row(
                Text(name), Text(word, _COLOURS[word]), seconds, Text(_figure(outcome)), link
            )
        self.console.print(table)
        if not self.console.is_terminal:
            # A log keeps no hyperlinks, so the pages are spelt out, unbroken.
            for name, url in links.items():
                self.console.print(Text(f"{name}: {url}"), soft_wrap=True)

    def across_seeds(self, run: Run) -> None:
        """One row a figure: mean, spread and each seed's value; nothing for a run of one seed."""
        if not run.across_seeds:
            return
        title = "mean over seeds, and spread: the standard deviation (n - 1)"
        table = Table(title=title, title_justify="left")
        for heading in ("node", "figure", "mean", "spread", "seeds", "by seed"):
            right = heading in ("mean", "spread", "seeds")
            table.add_column(heading, justify="right" if right else "left", no_wrap=right)
        asked = len(run.invocation.seeds)
        for one in run.across_seeds:
            found = len(one.values)
            cells = (
                one.node,
                spoken(one.figure),
                show_figure(one.figure, one.mean),
                "" if one.spread is None else show_figure(one.figure, one.spread),
                str(found) if found == asked else f"{found} of {asked}",
                ", ".join(f"{s}: {show_figure(one.figure, v)}" for s, v in one.values.items()),
            )
            # As text: a name may look like markup.
            table.add_row(*map(Text, cells))
        self.console.print(table)


class NodeDisplay:
    """The tracker of one node's line."""

    def __init__(self, line: Line, display: Display) -> None:
        """Steps go to `line`, notes to `display`."""
        self._line, self._display = line, display

    def start(self, *, steps: int, unit: str) -> None:
        """How many steps follow."""
        self._line.start(steps=steps, unit=unit)

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """One more step."""
        self._line.log(metrics, step=step)

    def note(self, message: str) -> None:
        """One line above the live ones, which says whose it is where there are several."""
        alone = len(self._display.lines) == 1
        self._display.note(message if alone else f"{self._line.name}: {message}")

    def tag(self, name: str, value: str) -> None:
        """How a build was made is for its record; what a user should know comes as a note."""


def _word(outcome: Built | Reused | Failed | Blocked) -> str:
    return "stopped" if isinstance(outcome, Failed) and outcome.was_stopped else outcome.outcome


def _tell(outcome: Built | Reused | Failed | Blocked) -> str:
    match outcome:
        case Built():
            return f"built in {outcome.seconds:.1f} s: {show_figures(outcome.figures)}"
        case Reused():
            return f"reused: {show_figures(outcome.figures)}"
        case Failed():
            if outcome.was_stopped:
                return f"stopped after {outcome.seconds:.1f} s"
            return f"failed after {outcome.seconds:.1f} s: {outcome.error}"
        case Blocked():
            return f"blocked by {outcome.by}" + (f", {outcome.reason}" if outcome.reason else "")


def _figure(outcome: Built | Reused | Failed | Blocked) -> str:
    match outcome:
        case Built() | Reused():
            return show_figures(outcome.figures)
        case Failed():
            return "" if outcome.was_stopped else shortened(outcome.error)
        case Blocked():
            return f"needs {outcome.by}"


def _clock(seconds: float) -> str:
    return time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(seconds))

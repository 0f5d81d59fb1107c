"""The step log as one process of post-training writes it."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stages.contract import Workspace
from stages.telemetry import MetricsFile


@dataclass(frozen=True, slots=True)
class News:
    """What a line of the log says besides figures."""

    tags: Mapping[str, str] = field(default_factory=dict)
    """Facts of how the workers compute."""
    notes: Sequence[str] = ()
    """What the user should be told."""

    def record(self) -> dict[str, Any]:
        """As the step log has it, without what is empty."""
        told = {"notes": list(self.notes), "tags": dict(self.tags)}
        return {name: value for name, value in told.items() if value}


class Journal:
    """One line a step, each written only while the lease holds.

    The first line of a process also says how its workers compute.
    """

    def __init__(self, work: Workspace, *, resume_step: int) -> None:
        """The log of a process that continues after `resume_step`."""
        self._lease = work.lease
        self._log = MetricsFile(work.beside(), resume_step=resume_step)
        self._news = News()

    def announce(self, news: Mapping[str, Any]) -> None:
        """What the next line says besides its figures: `tags` and `notes`, if there are any."""
        self._news = News(**news)

    def records(self) -> list[dict[str, Any]]:
        """All lines so far."""
        return self._log.records()

    def write(self, figures: Mapping[str, Any], *, step: int, notes: Sequence[str] = ()) -> None:
        """Add the line of one step; LeaseLost, and no line, if another builder took over."""
        told = News(self._news.tags, [*self._news.notes, *notes])
        self._lease.check()
        self._log.append({**figures, **told.record()}, step=step)
        self._news = News()


class Stopwatch:
    """Seconds that the parts of a step took."""

    def __init__(self) -> None:
        """Start."""
        self._last = time.perf_counter()
        self.seconds: dict[str, float] = {}

    def lap(self, name: str) -> None:
        """Give the time since the last lap a name."""
        now = time.perf_counter()
        self.seconds[name], self._last = now - self._last, now

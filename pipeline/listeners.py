"""Who hears of a run: the terminal, MLflow. One that fails is left out, and the run goes on."""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol, runtime_checkable

from pipeline.graph import Node
from pipeline.records import Blocked, Built, Failed, Reused
from pipeline.store import Committed
from stages.contract import Tracker


@runtime_checkable
class Listener(Protocol):
    """Someone who is told what happens to each node."""

    def begin(self, node: Node, inputs: Mapping[str, Committed]) -> Tracker:
        """A node starts to build; its steps go to the tracker."""

    def end(
        self, node: Node, outcome: Built | Reused | Failed | Blocked, made: Committed | None
    ) -> None:
        """What became of a node, and its artifact if there is one."""

    def note(self, message: str) -> None:
        """Something the user should know, in one line."""


class Audience:
    """All listeners of a run as one, told by one thread at a time.

    A listener that raises, itself or by one of its trackers, is named on stderr and told nothing
    more.
    """

    def __init__(self, listeners: Sequence[Listener]) -> None:
        """Speak to `listeners`, in this order."""
        self._listeners = tuple(listeners)
        self._speaking = threading.RLock()

    def begin(self, node: Node, inputs: Mapping[str, Committed]) -> "Chorus":
        """A node starts to build; its steps go to a tracker of each listener."""
        members: list[tuple[Listener, Tracker]] = []

        def begin(listener: Listener) -> None:
            members.append((listener, listener.begin(node, inputs)))

        for one in self._listeners:
            self.tell(one, partial(begin, one))
        return Chorus(self, members)

    def end(
        self, node: Node, outcome: Built | Reused | Failed | Blocked, made: Committed | None
    ) -> None:
        """What became of a node, and its artifact if there is one."""
        for one in self._listeners:
            self.tell(one, partial(one.end, node, outcome, made))

    def note(self, message: str) -> None:
        """Something the user should know, in one line."""
        for one in self._listeners:
            self.tell(one, partial(one.note, message))

    def tell(self, listener: Listener, call: Callable[[], None]) -> None:
        """Tell one listener something, unless it was left out before."""
        with self._speaking:
            if not any(one is listener for one in self._listeners):
                return
            try:
                call()
            except Exception as error:
                # Whatever a listener stumbles over is none of the run's business.
                self._listeners = tuple(one for one in self._listeners if one is not listener)
                _warn(listener, error)


@dataclass(frozen=True, slots=True)
class Chorus:
    """The tracker of one node, which passes everything on to those of the listeners."""

    audience: Audience
    members: Sequence[tuple[Listener, Tracker]]

    def start(self, *, steps: int, unit: str) -> None:
        """Announce how many steps follow."""
        self._tell(lambda tracker: tracker.start(steps=steps, unit=unit))

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Record one step."""
        self._tell(lambda tracker: tracker.log(metrics, step=step))

    def note(self, message: str) -> None:
        """Tell the user one thing."""
        self._tell(lambda tracker: tracker.note(message))

    def tag(self, name: str, value: str) -> None:
        """Mark the build."""
        self._tell(lambda tracker: tracker.tag(name, value))

    def _tell(self, call: Callable[[Tracker], None]) -> None:
        for listener, tracker in self.members:
            self.audience.tell(listener, partial(call, tracker))


def _warn(listener: Listener, error: Exception) -> None:
    why = (str(error).splitlines() or [""])[0]
    # Where nobody reads stderr any more, the run goes on as well.
    with suppress(OSError, ValueError):
        print(
            f"ingot: warning: the listener {type(listener).__name__} failed "
            f"({type(error).__name__}: {why}) and is told nothing more; the run goes on",
            file=sys.stderr,
        )

"""Tells somebody who does not watch that a run ended, failed or stalled.

A thread of its own does all the telling, so that nothing here holds up the run or fails it. Whoever
cannot be told is named once to the user.
"""

import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from configs.notify import NotifyConfig
from pipeline.channels import Channel
from pipeline.graph import Node
from pipeline.messages import Message, Teller
from pipeline.records import Blocked, Built, Failed, Reused, Run
from pipeline.store import Committed

_LONGEST_WAIT_SECONDS = 3600.0
"""Python's own waits are bounded; after so long a look at the clock does no harm."""
_SPARE_SECONDS = 2.0
"""What a channel may take beyond its time, to kill a program and to read its last words."""
_OWED = 3
"""Messages that a run waits for when it is left: of a stall, that it goes on, and of the end."""


class Notifier:
    """A listener that tells channels of a run; as a context, it tells how that was left.

    Leaving it waits until all is told, as long as three messages may take and no longer.
    """

    def __init__(
        self,
        config: NotifyConfig | None,
        channels: Sequence[Channel],
        run: Run,
        *,
        command: str,
        say: Callable[[str], None],
    ) -> None:
        """Tell `channels` of what `config` asks for; `command` repeats `run`.

        Without a config there are no channels, and nobody is told anything.
        """
        self._on = frozenset(() if config is None else config.on)
        self._stall_seconds = 0.0 if config is None else config.stall_seconds
        self._timeout_seconds = 0.0 if config is None else config.timeout_seconds
        self._channels, self._run, self._say = tuple(channels), run, say
        self._teller = Teller(command, socket.gethostname())
        self._failed: set[str] = set()
        self._messages: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        """Around what the run's threads and this one's own both change, which follows."""
        self._began = self._heard = time.monotonic()
        self._steps: Mapping[str, int | None] = {}
        self._stalled = self._told = False
        self._thread = threading.Thread(target=self._work, daemon=True, name="notify")

    def __enter__(self) -> Self:
        """Watch for stalls from now on."""
        if self._channels:
            self._heard = time.monotonic()
            self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Tell of an error that ended the run, and wait until all is told."""
        # Whoever does not want to wait presses Ctrl-C, which the run has no more to do with.
        with suppress(KeyboardInterrupt):
            if error is not None and not self._told:
                self._tell(self._teller.broke, error)
            self._messages.put(None)
            if self._channels:
                limit = _OWED * len(self._channels) * (self._timeout_seconds + _SPARE_SECONDS)
                self._thread.join(limit)
                if self._thread.is_alive():
                    self._warn("notify", f"was still busy after {limit:g} s")

    def begin(self, node: Node, inputs: Mapping[str, Committed]) -> "_Steps":
        """A node gets on."""
        self._gets_on(node.name, {node.name: None})
        return _Steps(self, node.name)

    def end(
        self, node: Node, outcome: Built | Reused | Failed | Blocked, made: Committed | None
    ) -> None:
        """A node is done with."""
        self._run = self._run.with_outcome(node.name, outcome)
        if not (isinstance(outcome, Failed) and outcome.was_stopped):
            self._gets_on(node.name, {})

    def note(self, message: str) -> None:
        """Notes are for those who watch."""

    def step(self, node: str, step: int) -> None:
        """A node has done a step."""
        self._gets_on(node, {node: step})

    def finish(self, run: Run) -> None:
        """The run is over, and this is its record."""
        self._told, self._run = True, run
        self._tell(self._teller.ended)

    def _gets_on(self, node: str, at: Mapping[str, int | None]) -> None:
        with self._lock:
            self._heard = time.monotonic()
            self._steps = {**{n: s for n, s in self._steps.items() if n != node}, **at}
            had_stalled, self._stalled = self._stalled, False
        if had_stalled:
            self._tell(self._teller.goes_on, node)

    def _tell(self, word: Callable[..., Message], *told: object) -> None:
        """Have the run, as far as it has come, put into words and told."""
        try:
            message = word(self._run, time.monotonic() - self._began, *told)
        except Exception as error:
            # What a plugin calls a figure may be none. The run is not to stumble over that.
            self._warn("notify", f"has no words for the run ({type(error).__name__}: {error})")
            return
        if message.event in self._on:
            self._messages.put(message)

    # What follows runs on the notifier's own thread.

    def _work(self) -> None:
        while (message := self._next()) is not None:
            for channel in self._channels:
                self._send(channel, message)

    def _next(self) -> Message | None:
        """The next message; none once the run was left. Meanwhile, look for a stall."""
        while True:
            with suppress(queue.Empty):
                return self._messages.get(timeout=self._patience_seconds())
            self._look_for_stall()

    def _patience_seconds(self) -> float:
        """How long to wait for a message before it is time to look whether the run has stalled."""
        if not self._may_stall():
            return _LONGEST_WAIT_SECONDS
        left = self._heard + self._stall_seconds - time.monotonic()
        return min(max(left, 0.0), _LONGEST_WAIT_SECONDS)

    def _may_stall(self) -> bool:
        """Whether a stall, if there were one now, would be told."""
        return "stall" in self._on and not self._stalled and not self._told

    def _look_for_stall(self) -> None:
        """Tell that the run has stalled, if it has and nobody was told of it."""
        with self._lock:
            quiet = time.monotonic() - self._heard
            if not self._may_stall() or quiet < self._stall_seconds:
                return
            self._stalled = True
            # Within the lock: that it goes on is told after this.
            self._tell(self._teller.stalled, quiet, self._steps)

    def _send(self, channel: Channel, message: Message) -> None:
        try:
            why = channel.send(message, self._timeout_seconds)
        except Exception as error:
            # Its words may hold what is secret; whatever it is, the run has nothing to do with it.
            why = type(error).__name__
        if why is not None:
            self._warn(channel.name, f"could not tell that the run {message.outcome} ({why})")

    def _warn(self, who: str, why: str) -> None:
        if who not in self._failed:
            self._failed.add(who)
            # Where nobody hears that either, the run goes on as well.
            with suppress(Exception):
                self._say(f"warning: {who} {why}; what the run makes is not affected")


class _Steps:
    """The tracker of one node."""

    def __init__(self, notifier: Notifier, node: str) -> None:
        self._notifier, self._node = notifier, node

    def start(self, *, steps: int, unit: str) -> None:
        """How many steps there are is for those who watch."""

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """One more step is done."""
        self._notifier.step(self._node, step)

    def note(self, message: str) -> None:
        """Notes are for those who watch."""

    def tag(self, name: str, value: str) -> None:
        """How a build was made is for its record."""

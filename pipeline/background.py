"""One thread that reports elsewhere, in order, and never lets a failure reach who submitted it."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

RETRY_SECONDS = 30.0
SAMPLE_SECONDS = 10.0
SEND_SECONDS = 2.0
_MOST_TOLD = 3


class Watched(Protocol):
    """Something that collects, and is sent now and then."""

    def sample(self) -> None:
        """Look at the machine."""

    def send(self) -> None:
        """Send what was collected."""


class Background:
    """Jobs are done one after another; while nobody answers they are left out.

    The first such failure is told; those after it would say the same. Jobs that are owed and that
    failed or were left out are done again at the end.
    """

    def __init__(
        self,
        warning: Callable[[str], str],
        say: Callable[[str], None],
        *,
        is_ours: Callable[[Exception], bool] = lambda error: False,
    ) -> None:
        """Tell the user `warning(reason)` through `say` if a job fails.

        An error that `is_ours` is one job's own: others may well be done.
        """
        self._warning, self._say, self._is_ours = warning, say, is_ours
        self._told: set[str] = set()
        self._jobs: queue.SimpleQueue[tuple[Callable[[], object], bool] | None]
        self._jobs = queue.SimpleQueue()
        self._owed: list[Callable[[], object]] = []
        self._watched: list[Watched] = []
        self._silent_until = 0.0
        self._warned = False
        self._done = 0.0
        self._allowed = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True, name="background")
        self._thread.start()

    def submit(self, job: Callable[[], object], *, owed: bool = False) -> None:
        """Have `job` done after all that were submitted before.

        One that is `owed` must bear being done again after it failed halfway.
        """
        self._jobs.put((job, owed))

    def allow(self, seconds: float) -> None:
        """Let the job that calls this take so much longer than others before it is given up."""
        self._done = max(self._done, time.monotonic() + seconds)
        self._allowed += seconds

    def watch(self, one: Watched) -> None:
        """Sample and send `one` at intervals from now on."""
        self._watched = [*self._watched, one]

    def unwatch(self, one: Watched) -> None:
        """Leave `one` alone from now on."""
        self._watched = [other for other in self._watched if other is not one]

    def stop(self, *, patience_seconds: float, limit_seconds: float) -> None:
        """Wait until all jobs are done, unless one takes `patience` or all take `limit`.

        What a job is allowed beyond that (`allow`) is added to both.
        """
        self._jobs.put(None)
        started = time.monotonic()
        self._done = max(self._done, started)
        while self._thread.is_alive():
            self._thread.join(0.05)
            moment = time.monotonic()
            late = moment - self._done > patience_seconds
            if late or moment - started > limit_seconds + self._allowed:
                self._warn(f"it was still busy after {moment - started:.1f} s")
                return

    def _work(self) -> None:
        sent = sampled = time.monotonic()
        while True:
            try:
                item = self._jobs.get(timeout=SEND_SECONDS)
                if item is None:
                    self._settle()
                    return
                job, owed = item
                if not self._attempt(job) and owed:
                    self._owed.append(job)
                self._done = time.monotonic()
            except queue.Empty:
                pass
            moment = time.monotonic()
            if moment - sampled >= SAMPLE_SECONDS:
                sampled = moment
                for one in self._watched:
                    self._attempt(one.sample)
            if moment - sent >= SEND_SECONDS:
                sent = moment
                for one in self._watched:
                    self._attempt(one.send)

    def _settle(self) -> None:
        """Do what is owed, silence or not, and again what still failed as long as that gets on."""
        before = len(self._owed) + 1
        while 0 < len(self._owed) < before:
            before, again, failures = len(self._owed), list[Callable[[], object]](), 0
            for job in self._owed:
                self._silent_until = 0.0
                is_done = self._attempt(job)
                self._done = time.monotonic()
                failures = failures + 1 if self._silent_until else 0
                if failures == 2:
                    # Nobody answers.
                    return
                if not is_done:
                    again.append(job)
            self._owed = again

    def _attempt(self, job: Callable[[], object]) -> bool:
        """Whether the job was done."""
        if time.monotonic() < self._silent_until:
            return False
        try:
            job()
        except Exception as error:
            # Whatever is wrong over there must not reach the run.
            why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            if self._is_ours(error):
                self._tell(f"warning: part of this run is not recorded elsewhere ({why})")
                return False
            self._silent_until = time.monotonic() + RETRY_SECONDS
            self._warn(why)
            return False
        return True

    def _tell(self, warning: str) -> None:
        if warning not in self._told and len(self._told) < _MOST_TOLD:
            self._told.add(warning)
            self._say(warning)

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            self._say(self._warning(why))

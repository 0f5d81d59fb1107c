"""One thread that reports elsewhere, in order, and never lets a failure reach who submitted it."""

import queue
import threading
import time
from collections.abc import Callable
from typing import Protocol

RETRY_SECONDS = 30.0
SAMPLE_SECONDS = 10.0
SEND_SECONDS = 2.0


class Watched(Protocol):
    """Something that collects, and is sent now and then."""

    def sample(self) -> None:
        """Look at the machine."""

    def send(self) -> None:
        """Send what was collected."""


class Background:
    """Jobs are done one after another; after a failure they are left out for a while.

    The first failure is told; those after it would say the same.
    """

    def __init__(self, warning: Callable[[str], str], say: Callable[[str], None]) -> None:
        """Tell the user `warning(reason)` through `say` if a job fails."""
        self._warning, self._say = warning, say
        self._jobs: queue.SimpleQueue[Callable[[], object] | None] = queue.SimpleQueue()
        self._watched: list[Watched] = []
        self._silent_until = 0.0
        self._warned = False
        self._done = 0.0
        self._thread = threading.Thread(target=self._work, daemon=True, name="background")
        self._thread.start()

    def submit(self, job: Callable[[], object]) -> None:
        """Have `job` done after all that were submitted before."""
        self._jobs.put(job)

    def watch(self, one: Watched) -> None:
        """Sample and send `one` at intervals from now on."""
        self._watched = [*self._watched, one]

    def unwatch(self, one: Watched) -> None:
        """Leave `one` alone from now on."""
        self._watched = [other for other in self._watched if other is not one]

    def stop(self, *, patience_seconds: float, limit_seconds: float) -> None:
        """Wait until all jobs are done, unless one takes `patience` or all take `limit`."""
        self._jobs.put(None)
        started = self._done = time.monotonic()
        while self._thread.is_alive():
            self._thread.join(0.05)
            moment = time.monotonic()
            if moment - self._done > patience_seconds or moment - started > limit_seconds:
                self._warn(f"it was still busy after {moment - started:.1f} s")
                return

    def _work(self) -> None:
        sent = sampled = time.monotonic()
        while True:
            try:
                job = self._jobs.get(timeout=SEND_SECONDS)
                if job is None:
                    return
                self._attempt(job)
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

    def _attempt(self, job: Callable[[], object]) -> None:
        if time.monotonic() < self._silent_until:
            return
        try:
            job()
        except Exception as error:
            # Whatever is wrong over there must not reach the run.
            self._silent_until = time.monotonic() + RETRY_SECONDS
            self._warn(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            self._say(self._warning(why))

"""Who does the jobs of a run: the calling thread alone, or several threads side by side.

Python raises Ctrl-C in the main thread only. A crew hands it on to its threads, where it ends a job
as it would end it there: at the next line of Python. So a job that waits must look up now and then.
"""

import ctypes
import queue
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

T = TypeVar("T")

_LOOK_SECONDS = 0.1


class Crew(Protocol[T]):
    """Does named jobs. What one of them raises, `next` raises."""

    @property
    def free(self) -> bool:
        """Whether another job can be started now."""

    @property
    def busy(self) -> tuple[str, ...]:
        """Names of the jobs that were started and of which nobody has heard yet."""

    def start(self, name: str, job: Callable[[], T]) -> None:
        """Begin a job; only if the crew is `free`."""

    def next(self) -> tuple[str, T]:
        """Wait for a job to end: its name and what it returned. Only if any is `busy`."""

    def stop(self, patience_seconds: float) -> dict[str, T | None]:
        """Interrupt all that is `busy`; what each returned, none of those that do not end in time.

        A second Ctrl-C meanwhile ends the waiting.
        """


def hire(hands: int) -> Crew[T]:
    """A crew for so many jobs at a time; a single one is done by the thread that asks for it."""
    return Alone() if hands == 1 else Threads(hands)


class Alone(Generic[T]):
    """One job at a time, on the calling thread, when its result is asked for."""

    def __init__(self) -> None:
        self._job: tuple[str, Callable[[], T]] | None = None

    @property
    def free(self) -> bool:
        return self._job is None

    @property
    def busy(self) -> tuple[str, ...]:
        return () if self._job is None else (self._job[0],)

    def start(self, name: str, job: Callable[[], T]) -> None:
        self._job = name, job

    def next(self) -> tuple[str, T]:
        assert self._job is not None
        (name, job), self._job = self._job, None
        return name, job()

    def stop(self, patience_seconds: float) -> dict[str, T | None]:
        """Nothing runs where this could be called: what was not begun is left out."""
        self._job = None
        return {}


@dataclass(frozen=True, slots=True)
class _Raised:
    error: BaseException


class Threads(Generic[T]):
    """Each job on a thread of its own, which does not outlive the process."""

    def __init__(self, hands: int) -> None:
        self._hands = hands
        self._threads: dict[str, threading.Thread] = {}
        self._ended: queue.SimpleQueue[tuple[str, T | _Raised]] = queue.SimpleQueue()

    @property
    def free(self) -> bool:
        return len(self._threads) < self._hands

    @property
    def busy(self) -> tuple[str, ...]:
        return tuple(self._threads)

    def start(self, name: str, job: Callable[[], T]) -> None:
        def work() -> None:
            # An interrupt may come when the job has just ended: `stop` finds no result then.
            with suppress(KeyboardInterrupt):
                self._ended.put((name, _attempt(job)))

        thread = threading.Thread(target=work, name=name, daemon=True)
        self._threads[name] = thread
        thread.start()

    def next(self) -> tuple[str, T]:
        while True:
            # Wherever the system delivers a signal, the main thread sees it between two waits.
            with suppress(queue.Empty):
                name, said = self._ended.get(timeout=_LOOK_SECONDS)
                self._threads.pop(name).join()
                if isinstance(said, _Raised):
                    raise said.error
                return name, said

    def stop(self, patience_seconds: float) -> dict[str, T | None]:
        deadline = time.monotonic() + patience_seconds
        for thread in self._threads.values():
            _interrupt(thread)
        with suppress(KeyboardInterrupt):
            while self._running() and time.monotonic() < deadline:
                time.sleep(_LOOK_SECONDS)
        results: dict[str, T | None] = dict.fromkeys(self._threads)
        with suppress(queue.Empty):
            while True:
                name, said = self._ended.get_nowait()
                results[name] = None if isinstance(said, _Raised) else said
        self._threads.clear()
        return results

    def _running(self) -> bool:
        return any(thread.is_alive() for thread in self._threads.values())


def _attempt(job: Callable[[], T]) -> T | _Raised:
    try:
        return job()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # Whatever ends a job, as `sys.exit` does, must end the wait for it.
        return _Raised(error)


def _interrupt(thread: threading.Thread) -> None:
    """Raise KeyboardInterrupt in a thread, at its next line of Python."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(
            ctypes.c_ulong(thread.ident), ctypes.py_object(KeyboardInterrupt)
        )

"""Ctrl-C and the end of training, without Ray: how the wait for a fit ends."""

import _thread
import threading
import time
from typing import Any, cast

import pytest
import ray

from cluster import fit
from pipeline.crew import Crew, hire


class Fitting:
    """Stands for a TorchTrainer: ends as it is told, or is interrupted meanwhile."""

    def __init__(self, ending: BaseException | None, *, interrupts: bool = False) -> None:
        self.ending, self.interrupts = ending, interrupts
        self.thread: threading.Thread | None = None

    def fit(self) -> None:
        """End."""
        self.thread = threading.current_thread()
        if self.interrupts:
            _thread.interrupt_main()
            time.sleep(0.5)
        if self.ending is not None:
            raise self.ending


def run(fitting: Fitting) -> None:
    fit._fit_interruptibly(cast(Any, fitting))


def test_fitting_leaves_signals_to_the_main_thread() -> None:
    fitting = Fitting(None)
    run(fitting)
    assert fitting.thread not in (None, threading.main_thread())


@pytest.mark.parametrize("ending", [RuntimeError("broken"), SystemExit(0)])
def test_whatever_ends_a_fit_ends_the_wait_for_it(ending: BaseException) -> None:
    with pytest.raises(type(ending)):
        run(Fitting(ending))


def test_an_interrupt_closes_ray_and_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(ray, "shutdown", lambda: closed.append(True))
    with pytest.raises(KeyboardInterrupt):
        run(Fitting(None, interrupts=True))
    assert closed == [True]


def test_a_fit_on_a_thread_of_its_own_can_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    closed: list[bool] = []
    monkeypatch.setattr(ray, "shutdown", lambda: closed.append(True))
    released = threading.Event()

    class Lasting(Fitting):
        def fit(self) -> None:
            released.wait(30)

    def train() -> str:
        try:
            run(Lasting(None))
        except KeyboardInterrupt:
            return "interrupted"
        return "trained"

    crew: Crew[str] = hire(2)
    crew.start("pretrain", train)
    time.sleep(0.2)
    assert crew.stop(20) == {"pretrain": "interrupted"}
    released.set()
    assert closed == [True]

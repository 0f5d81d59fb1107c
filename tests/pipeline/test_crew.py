"""Jobs, one at a time or side by side, and how an interrupt ends them."""

import _thread
import threading
import time
from functools import partial

import pytest

from pipeline.crew import Crew, hire


def wait(seconds: float) -> str:
    """Wait as a stage should: looking up now and then."""
    deadline = time.monotonic() + seconds
    try:
        while time.monotonic() < deadline:
            time.sleep(0.01)
    except KeyboardInterrupt:
        return "interrupted"
    return "done"


@pytest.mark.parametrize("hands", [1, 2, 3])
def test_every_job_is_done_and_told_by_name_and_no_more_at_a_time_than_there_are_hands(
    hands: int,
) -> None:
    crew: Crew[str] = hire(hands)
    inside, most, lock = 0, 0, threading.Lock()

    def job() -> str:
        nonlocal inside, most
        with lock:
            inside += 1
            most = max(most, inside)
        time.sleep(0.1)
        with lock:
            inside -= 1
        return "done"

    waiting, told = [f"job {number}" for number in range(5)], {}
    while waiting or crew.busy:
        while waiting and crew.free:
            crew.start(waiting.pop(0), job)
        assert len(crew.busy) <= hands
        name, result = crew.next()
        told[name] = result
    assert told == {f"job {number}": "done" for number in range(5)}
    assert most == hands
    assert crew.stop(0) == {}


def test_one_pair_of_hands_is_the_calling_threads() -> None:
    crew: Crew[threading.Thread] = hire(1)
    crew.start("job", threading.current_thread)
    assert crew.next() == ("job", threading.main_thread())


def test_whichever_ends_first_is_told_first() -> None:
    crew: Crew[str] = hire(2)
    crew.start("slow", lambda: wait(0.5))
    crew.start("quick", lambda: wait(0.0))
    assert [crew.next()[0], crew.next()[0]] == ["quick", "slow"]


def test_an_interrupt_reaches_every_thread_and_what_had_ended_is_not_lost() -> None:
    crew: Crew[str] = hire(3)
    for name, seconds in (("one", 30), ("two", 30), ("quick", 0)):
        crew.start(name, partial(wait, seconds))
    time.sleep(0.2)
    started = time.monotonic()
    assert crew.stop(10) == {"one": "interrupted", "two": "interrupted", "quick": "done"}
    assert time.monotonic() - started < 5
    assert crew.busy == ()
    assert crew.free


def test_a_job_that_does_not_look_up_is_left_behind_after_a_while() -> None:
    crew: Crew[str | bool] = hire(2)
    held = threading.Event()
    crew.start("deaf", lambda: held.wait(30))
    crew.start("hears", lambda: wait(30))
    time.sleep(0.1)
    started = time.monotonic()
    assert crew.stop(0.5) == {"deaf": None, "hears": "interrupted"}
    assert 0.4 < time.monotonic() - started < 5
    held.set()


def test_a_second_ctrl_c_ends_the_waiting_for_those_that_do_not_look_up() -> None:
    crew: Crew[str | bool] = hire(2)
    held = threading.Event()
    crew.start("deaf", lambda: held.wait(30))
    threading.Timer(0.5, _thread.interrupt_main).start()
    started = time.monotonic()
    assert crew.stop(20) == {"deaf": None}
    assert time.monotonic() - started < 10
    held.set()


def test_ctrl_c_interrupts_the_wait_for_the_next() -> None:
    crew: Crew[str] = hire(2)
    crew.start("job", lambda: wait(30))
    threading.Timer(0.3, _thread.interrupt_main).start()
    with pytest.raises(KeyboardInterrupt):
        crew.next()
    assert crew.busy == ("job",)
    assert crew.stop(10) == {"job": "interrupted"}


def test_an_interrupt_after_the_end_of_a_job_is_nobodys(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def end() -> str:
        raise KeyboardInterrupt

    unheard: list[object] = []
    monkeypatch.setattr(threading, "excepthook", unheard.append)
    crew: Crew[str] = hire(2)
    crew.start("job", end)
    time.sleep(0.1)
    assert crew.stop(5) == {"job": None}
    assert unheard == []


@pytest.mark.parametrize("hands", [1, 2])
@pytest.mark.parametrize("error", [ValueError("broken"), SystemExit(3)])
def test_what_ends_a_job_ends_the_wait_for_it(hands: int, error: BaseException) -> None:
    def end() -> str:
        raise error

    crew: Crew[str] = hire(hands)
    crew.start("job", end)
    with pytest.raises(type(error), match=str(error)):
        crew.next()
    assert crew.busy == ()

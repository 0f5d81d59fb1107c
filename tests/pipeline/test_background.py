"""Reporting elsewhere is done in order, bounded in time, and silent after its first failure."""

import threading
import time
from functools import partial

import pytest

from pipeline import background
from pipeline.background import Background


class Spy:
    """Something watched, that counts how often it is sent."""

    def __init__(self) -> None:
        self.sent = self.sampled = 0

    def sample(self) -> None:
        self.sampled += 1

    def send(self) -> None:
        self.sent += 1


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def worker(said: list[str]) -> Background:
    return Background(lambda why: f"warning: {why}", said.append)


def fail() -> None:
    raise RuntimeError("down\nand more")


def test_jobs_are_done_in_order(worker: Background) -> None:
    done: list[int] = []
    for number in range(100):
        worker.submit(partial(done.append, number))
    worker.stop(patience_seconds=10, limit_seconds=10)
    assert done == list(range(100))


def test_after_a_failure_jobs_are_left_out_for_a_while(
    worker: Background, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.5)
    done: list[str] = []
    worker.submit(fail)
    worker.submit(lambda: done.append("at once"))
    time.sleep(1)
    worker.submit(lambda: done.append("later"))
    worker.stop(patience_seconds=10, limit_seconds=10)
    assert done == ["later"]


def test_what_is_owed_is_done_at_the_end_in_order_even_within_the_silence(
    worker: Background, said: list[str]
) -> None:
    done: list[str] = []

    def fails_once() -> None:
        if not said:
            fail()
        done.append("first")

    worker.submit(fails_once, owed=True)
    worker.submit(lambda: done.append("left out"))
    worker.submit(lambda: done.append("second"), owed=True)
    started = time.monotonic()
    worker.stop(patience_seconds=10, limit_seconds=10)
    assert done == ["first", "second"]
    assert time.monotonic() - started < 5


def test_a_job_that_cannot_succeed_does_not_keep_the_others_that_are_owed(
    worker: Background,
) -> None:
    done: list[int] = []
    for number in range(3):
        worker.submit(fail, owed=True)
        worker.submit(partial(done.append, number), owed=True)
    worker.stop(patience_seconds=10, limit_seconds=10)
    assert done == [0, 1, 2]


def test_an_outage_is_not_waited_for_once_for_every_job_that_is_owed(worker: Background) -> None:
    tried: list[int] = []

    def refused() -> None:
        tried.append(1)
        fail()

    for _ in range(20):
        worker.submit(refused, owed=True)
    worker.stop(patience_seconds=10, limit_seconds=10)
    assert len(tried) == 3


def test_only_the_first_failure_is_told(
    worker: Background, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "RETRY_SECONDS", 0.0)
    for _ in range(3):
        worker.submit(fail)
    worker.stop(patience_seconds=10, limit_seconds=10)
    assert said == ["warning: RuntimeError: down"]


@pytest.mark.parametrize(("patience", "limit"), [(0.3, 10.0), (10.0, 0.3)])
def test_the_end_waits_no_longer_than_asked(
    worker: Background, said: list[str], patience: float, limit: float
) -> None:
    stuck = threading.Event()
    worker.submit(lambda: stuck.wait(30))
    started = time.monotonic()
    worker.stop(patience_seconds=patience, limit_seconds=limit)
    assert time.monotonic() - started < 5
    assert said[0].startswith("warning: it was still busy after 0.")
    stuck.set()


def test_the_end_waits_longer_while_jobs_get_done(worker: Background, said: list[str]) -> None:
    done: list[int] = []

    def job(number: int) -> None:
        time.sleep(0.2)
        done.append(number)

    for number in range(6):
        worker.submit(partial(job, number))
    worker.stop(patience_seconds=0.7, limit_seconds=10)
    assert said == []
    assert done == list(range(6))


def test_what_is_watched_is_sampled_and_sent_until_it_no_longer_is(
    said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "SEND_SECONDS", 0.05)
    monkeypatch.setattr(background, "SAMPLE_SECONDS", 0.05)
    worker, spy = Background(str, said.append), Spy()
    worker.watch(spy)
    time.sleep(0.5)
    worker.unwatch(spy)
    assert spy.sent >= 2
    assert spy.sampled >= 2
    time.sleep(0.1)
    before = spy.sent
    time.sleep(0.3)
    assert spy.sent == before
    worker.stop(patience_seconds=10, limit_seconds=10)


def test_faults_of_single_jobs_cost_no_others(said: list[str]) -> None:
    def wrong(number: int) -> None:
        raise ValueError(f"wrong {number}")

    worker = Background(
        lambda why: f"warning: {why}", said.append, is_ours=lambda e: isinstance(e, ValueError)
    )
    done: list[str] = []
    worker.submit(partial(wrong, 1), owed=True)
    worker.submit(partial(wrong, 2), owed=True)
    worker.submit(lambda: done.append("other node"))
    worker.submit(lambda: done.append("parent finished"), owed=True)
    worker.stop(patience_seconds=10, limit_seconds=10)
    assert done == ["other node", "parent finished"]
    assert said == [
        f"warning: part of this run is not recorded elsewhere (ValueError: wrong {number})"
        for number in (1, 2)
    ]

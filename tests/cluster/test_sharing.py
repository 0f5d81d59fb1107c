"""Stages side by side on one Ray: who waits for room, who opens it, and who closes it."""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import ray

from cluster.session import close_ray, ensure_ray, ray_for
from configs.errors import MachineError
from configs.parallel import ClusterConfig

HALF = ClusterConfig(trainers=2, samplers=2, cpus_per_worker=0.5)
"""Two workers of it fill half of two CPUs."""


@pytest.fixture
def closed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A Ray of two CPUs, and the threads that closed it."""
    names: list[str] = []
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})
    monkeypatch.setattr(ray, "shutdown", lambda: names.append(threading.current_thread().name))
    return names


class Stage:
    """One that holds room for workers until it is told to end."""

    def __init__(self, pool: ThreadPoolExecutor, home: Path, workers: int) -> None:
        self.inside, self.told = threading.Event(), threading.Event()
        self.then: Callable[[], None] = lambda: None
        self.ended: Future[None] = pool.submit(self._run, str(home), workers)

    def _run(self, home: str, workers: int) -> None:
        with ray_for(HALF, home, workers=workers):
            self.inside.set()
            assert self.told.wait(10)
            self.then()

    def end(self) -> None:
        self.told.set()
        self.ended.result(10)


@contextmanager
def stages(home: Path, *workers: int) -> Iterator[list[Stage]]:
    """Stages that asked for room in this order."""
    with ThreadPoolExecutor(len(workers)) as pool:
        begun = []
        for one in workers:
            begun.append(Stage(pool, home, one))
            begun[-1].inside.wait(0.2)
        try:
            yield begun
        finally:
            for stage in begun:
                stage.told.set()


def test_a_stage_waits_until_others_have_left_it_room(closed: list[str], tmp_path: Path) -> None:
    with stages(tmp_path, 2, 2, 2) as (one, two, three):
        assert one.inside.is_set()
        assert two.inside.is_set()
        assert not three.inside.wait(0.7)
        two.end()
        assert three.inside.wait(5)
    assert closed == []


def test_a_stage_that_failed_leaves_its_room_to_others(closed: list[str], tmp_path: Path) -> None:
    with stages(tmp_path, 4, 4) as (one, two):
        one.then = lambda: 1 / 0  # type: ignore[assignment]
        with pytest.raises(ZeroDivisionError):
            one.end()
        assert two.inside.wait(5)


def test_what_a_stage_asks_for_within_its_room_is_part_of_it(
    closed: list[str], tmp_path: Path
) -> None:
    """As post-training does, whose trainers and samplers are there at a time."""
    with stages(tmp_path, 4) as (one,):
        nested: list[bool] = []

        def ask() -> None:
            with ray_for(HALF, str(tmp_path), workers=2), ray_for(HALF, str(tmp_path), workers=2):
                nested.append(True)

        one.then = ask
        one.end()
        assert nested == [True]


def test_a_stage_alone_need_not_wait_and_one_too_large_is_refused(
    closed: list[str], tmp_path: Path
) -> None:
    with ray_for(HALF, str(tmp_path), workers=4):
        pass
    with (
        pytest.raises(MachineError, match=r"ask for 2\.5 CPUs, the cluster has 2"),
        ray_for(HALF, str(tmp_path), workers=5),
    ):
        pass


def test_ray_is_closed_by_the_last_that_uses_it(closed: list[str], tmp_path: Path) -> None:
    with stages(tmp_path, 2, 2) as (one, two):
        one.then = close_ray
        one.end()
        assert closed == []
        two.end()
        assert len(closed) == 1
    # That was meant once: the next who leaves it leaves it open.
    with ray_for(HALF, str(tmp_path), workers=1):
        pass
    assert len(closed) == 1


def test_who_uses_ray_alone_closes_it_at_once(closed: list[str], tmp_path: Path) -> None:
    with ray_for(HALF, str(tmp_path), workers=1):
        close_ray()
        assert closed == ["MainThread"]
    assert closed == ["MainThread"]


class Opening:
    """Stands for a Ray that is opened: by whom, and from where."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.threads: list[threading.Thread] = []
        self.fault: Exception | None = None
        monkeypatch.setattr(ray, "is_initialized", lambda: bool(self.threads))
        monkeypatch.setattr(ray, "init", self._open)
        monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 2.0})

    def _open(self, **settings: object) -> None:
        time.sleep(0.2)
        if self.fault is not None:
            raise self.fault
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.threads.append(threading.current_thread())


def test_two_stages_open_one_ray_on_a_thread_that_lasts(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Linux ends child processes with the thread that has started them."""
    opening, here = Opening(monkeypatch), Path.cwd()
    with ThreadPoolExecutor(2) as pool:
        asked = [pool.submit(ensure_ray, HALF, str(tmp_path), cpus_needed=1.0) for _ in range(2)]
        for one in asked:
            one.result(10)
    (opener,) = opening.threads
    assert opener.is_alive()
    assert opener is not threading.main_thread()
    assert Path.cwd() == here


def test_a_fault_of_another_threads_ray_is_told_where_it_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opening = Opening(monkeypatch)
    opening.fault = ConnectionError("nobody home")
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ensure_ray, HALF, str(tmp_path), cpus_needed=1.0)
        with pytest.raises(MachineError, match="nobody home"):
            asked.result(10)


def test_the_main_thread_opens_ray_itself_and_keeps_its_answer_to_a_schedulers_end(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    opening = Opening(monkeypatch)
    monkeypatch.setenv("RAY_worker_niceness", "0")
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        ensure_ray(HALF, str(tmp_path), cpus_needed=1.0)
        assert opening.threads == [threading.main_thread()]
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
    finally:
        signal.signal(signal.SIGTERM, before)

"""Actors behind a driver: what it is told when one of them fails, and how soon."""

import os
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.exceptions import ActorUnavailableError, ObjectLostError, RayTaskError
from ray.util.placement_group import placement_group_table

from cluster import workers
from cluster.output import Output
from cluster.supply import Supply
from cluster.workers import (
    Worker,
    WorkerDied,
    choose_network,
    free_address,
    gather,
    open_workers,
    what_happened,
    with_restarts,
)
from configs.errors import DataError, DeadlineError, MachineError
from configs.parallel import ClusterConfig
from pipeline.crew import Crew, hire
from tests.supplies import local


class Toy(Worker):
    """An actor that does as it is told."""

    def __init__(self, fault: str, output: Output, supply: Supply, rank: int) -> None:
        super().__init__(output, supply, rank)
        if fault == "constructor" and rank == 1:
            raise DataError("no such thing")

    def environment(self, name: str) -> str | None:
        """One variable of its process."""
        return os.environ.get(name)

    def fail(self, who: int, how: str) -> int:
        """Fail in one of several ways if `who` is this rank."""
        if self.rank == who:
            match how:
                case "ingot":
                    raise DataError("the file is empty")
                case "other":
                    raise KeyError("lost")
                case "die":
                    print("on stdout, just before")
                    os.kill(os.getpid(), signal.SIGKILL)
                case "abort":
                    os.write(2, b"terminate called\n")
                    os.abort()
                case "sleep":
                    time.sleep(4)
                case "wait":
                    time.sleep(30)
        return self.rank


@pytest.fixture
def output(tmp_path: Path) -> Output:
    """Where they write."""
    return Output(str(tmp_path / "logs"), "toy")


GONE = "its machine does not answer any more"


def toys_on(
    machines: ClusterConfig, output: Output, fault: str = ""
) -> AbstractContextManager[list[Any]]:
    """Two toys, of which the second may have a fault."""
    supply = local(Path(output.folder).parent)
    return open_workers(Toy, machines, 2, output=output, supply=supply, arguments=(fault,))


def enter(group: AbstractContextManager[list[Any]]) -> None:
    """Open it and close it."""
    with group:
        pass


@pytest.fixture
def toys(machines: ClusterConfig, output: Output) -> Iterator[list[Any]]:
    """Two of them."""
    with toys_on(machines, output) as actors:
        yield actors


def test_results_come_in_order_and_failures_by_name(toys: list[Any], output: Output) -> None:
    def ask(who: int, how: str, seconds: float = 60) -> list[Any]:
        refs = [toy.fail.remote(who, how) for toy in toys]
        return gather(refs, output, timeout_seconds=seconds)

    assert ask(-1, "") == [0, 1]
    with pytest.raises(DataError, match=r"^the file is empty$"):
        ask(1, "ingot")
    with pytest.raises(MachineError, match=r"^toy 1: KeyError: 'lost'\n"):
        ask(1, "other")
    threads = [toy.environment.remote("OMP_NUM_THREADS") for toy in toys]
    assert gather(threads, output, timeout_seconds=60) == ["1", "1"]
    begin = time.monotonic()
    with pytest.raises(DeadlineError, match=r"^toy \[1\] did not answer within 1 s; "):
        ask(1, "sleep", seconds=1)
    assert time.monotonic() - begin < 4
    with pytest.raises(WorkerDied, match=r"^toy 0 died: "):
        ask(0, "die")
    with pytest.raises(WorkerDied, match=r"^toy 0 died: "):
        gather([toys[0].ready.remote()], output, timeout_seconds=60)


def test_a_failure_is_not_hidden_behind_a_worker_that_waits_for_the_failed_one(
    toys: list[Any], output: Output
) -> None:
    begin = time.monotonic()
    refs = [toys[0].fail.remote(0, "ingot"), toys[1].fail.remote(1, "wait")]
    with pytest.raises(DataError, match=r"^the file is empty$"):
        gather(refs, output, timeout_seconds=60)
    assert time.monotonic() - begin < 15


def test_a_constructor_that_raises_is_no_dead_worker(
    machines: ClusterConfig, output: Output
) -> None:
    with pytest.raises(MachineError, match=r"toy 1 could not start: .*no such thing") as caught:
        enter(toys_on(machines, output, "constructor"))
    assert not isinstance(caught.value, WorkerDied)


def test_a_group_that_finds_no_place_says_what_is_short(
    machines: ClusterConfig, output: Output
) -> None:
    greedy = machines.model_copy(update={"cpus_per_worker": 1.5, "placement_timeout_seconds": 3})
    with pytest.raises(MachineError, match=r"2 toys ask for 3 CPUs and 2 were free after 3 s"):
        enter(toys_on(greedy, output))


def test_an_address_is_on_loopback_and_free() -> None:
    scheme, _, rest = free_address("127.0.0.1").partition("://")
    host, port = rest.split(":")
    assert (scheme, host) == ("tcp", "127.0.0.1")
    with socket.socket() as probe:
        probe.bind((host, int(port)))


def test_a_stage_that_waits_on_a_thread_of_its_own_can_be_interrupted(
    toys: list[Any], output: Output
) -> None:
    def ask() -> str:
        try:
            refs = [toy.fail.remote(1, "wait") for toy in toys]
            gather(refs, output, timeout_seconds=60)
        except KeyboardInterrupt:
            return "interrupted"
        return "answered"

    crew: Crew[str] = hire(2)
    crew.start("stage", ask)
    time.sleep(2)
    started = time.monotonic()
    assert crew.stop(20) == {"stage": "interrupted"}
    assert time.monotonic() - started < 5


def test_what_workers_print_lies_in_a_file_for_each_and_its_end_in_the_error(
    machines: ClusterConfig, output: Output
) -> None:
    """Also what C++ says as it aborts, whose streams Python knows nothing of."""
    for how, said in (("abort", "terminate called"), ("die", "on stdout, just before")):
        with toys_on(machines, output) as actors, pytest.raises(WorkerDied) as caught:
            refs = [toy.fail.remote(1, how) for toy in actors]
            gather(refs, output, timeout_seconds=60)
        (note,) = caught.value.__notes__
        assert note.startswith(f"the last lines of {output.path(1)}:\n")
        assert said in note
        assert " toy 1: died: " in note.splitlines()[-1]
    # The second worker of a rank appends, and says when it began.
    log = output.path(1).read_text()
    assert log.count(" begins\n") == 2
    # Python's own report of an abort: where it was.
    assert 'test_workers.py", line' in log
    assert "terminate called" not in output.path(0).read_text()


def test_an_exception_of_a_worker_leaves_its_traceback(toys: list[Any], output: Output) -> None:
    with pytest.raises(MachineError, match="KeyError") as caught:
        gather([toys[0].fail.remote(0, "other")], output, timeout_seconds=60)
    log = output.path(0).read_text()
    assert 'raise KeyError("lost")' in log
    assert "\x1b[" not in log
    assert "KeyError: 'lost'" in caught.value.__notes__[0]
    # One of ours says all by itself.
    with pytest.raises(DataError) as ours:
        gather([toys[0].fail.remote(0, "ingot")], output, timeout_seconds=60)
    assert not hasattr(ours.value, "__notes__")


def test_a_worker_that_does_not_answer_is_told_of_with_what_it_said(
    toys: list[Any], output: Output
) -> None:
    with pytest.raises(DeadlineError, match=r"see what it printed in .*toy-0\.log") as caught:
        gather([toys[0].fail.remote(0, "sleep")], output, timeout_seconds=1)
    assert " begins" in caught.value.__notes__[0]


def test_a_group_takes_its_places_and_gives_them_back(
    machines: ClusterConfig, output: Output
) -> None:
    """As `cluster.placement` says, which one machine can do in one way only."""
    for placement in ("pack", "spread"):
        asked = machines.model_copy(update={"placement": placement})
        with toys_on(asked, output):
            (table,) = (
                one for one in placement_group_table().values() if one["state"] == "CREATED"
            )
            assert table["strategy"] == placement.upper()
            assert list(table["bundles"].values()) == [{"CPU": 0.5}] * 2
        assert {one["state"] for one in placement_group_table().values()} == {"REMOVED"}


def test_places_that_are_free_on_no_one_machine_are_told_of(
    machines: ClusterConfig, output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(workers, "await_room", lambda *_, **__: None)
    large = machines.model_copy(update={"cpus_per_worker": 1.5, "placement_timeout_seconds": 2})
    with pytest.raises(MachineError, match=r"2 toys of 1\.5 CPUs each found no place within 2 s"):
        enter(toys_on(large, output))


@pytest.mark.parametrize(("set_before", "found"), [(None, "lo"), ("eth7", "eth7")])
def test_collectives_use_the_network_that_ray_knows_the_machine_by(
    monkeypatch: pytest.MonkeyPatch, set_before: str | None, found: str
) -> None:
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    if set_before is not None:
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", set_before)
    monkeypatch.setattr(ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    choose_network()
    assert os.environ["GLOO_SOCKET_IFNAME"] == found
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ActorUnavailableError("RpcError: Socket closed", None), GONE),
        # Ray Train wraps it, and keeps the words alone.
        (RuntimeError("health check failed:\nThe actor b is unavailable: RPC error"), GONE),
        (RuntimeError("The actor died because its node has died. Node Id: 1"), GONE),
        (RuntimeError("killed\nlines of a log"), "killed"),
    ],
)
def test_why_a_worker_is_gone_is_one_line(error: Exception, told: str) -> None:
    assert what_happened(error) == told


def test_a_group_is_started_anew_as_often_as_is_allowed() -> None:
    few = ClusterConfig(max_restarts=2)
    notes: list[str] = []
    deaths = iter([WorkerDied("toy 1 died"), WorkerDied("toy 0 died")])

    def build() -> str:
        for death in deaths:
            raise death
        return "made"

    assert with_restarts(build, few, notes.append) == "made"
    assert notes == [f"toy {n} died; starting the workers anew" for n in (1, 0)]

    def die() -> str:
        raise WorkerDied("toy 1 died")

    with pytest.raises(MachineError, match=r"died 3 times, cluster\.max_restarts = 2; run again"):
        with_restarts(die, few, notes.append)
    assert len(notes) == 4


def test_what_a_lost_machine_held_is_a_death_and_not_a_fault_of_who_asked_for_it(
    output: Output,
) -> None:
    lost = ObjectLostError("ab" * 28, None, "")
    found = workers._failure(RayTaskError("f", "Traceback", lost), output, 1)
    assert isinstance(found, WorkerDied)
    assert str(found) == f"toy 1 died: {GONE}"
    ours = workers._failure(RayTaskError("f", "Traceback", KeyError("x")), output, 1)
    assert not isinstance(ours, WorkerDied)

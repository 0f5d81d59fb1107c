"""A cluster's head that is not there, or is lost, is told of in time."""

import queue
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import head, session
from cluster.head import is_lost, require_head, require_listener, watch
from configs.errors import MachineError


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Other tests of this process have a head of their own."""
    yield
    watch(None)


def address_of(server: socket.socket) -> str:
    return f"127.0.0.1:{server.getsockname()[1]}"


def test_an_address_where_nobody_listens_is_refused_at_once(listener: socket.socket) -> None:
    address = address_of(listener)
    require_listener(address)
    for unknown in ("auto", "ray://somewhere:10001"):
        require_listener(unknown)  # Not for us to judge.
    listener.close()
    begin = time.monotonic()
    with pytest.raises(MachineError, match=rf"cluster.address = '{address}': nobody answers there"):
        require_listener(address)
    assert time.monotonic() - begin < 5


def test_a_head_that_is_lost_ends_every_wait_for_the_cluster(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(head, "LOST_SECONDS", 0.5)
    monkeypatch.setattr(session, "LOOK_SECONDS", 0.05)
    left: list[object] = []
    monkeypatch.setattr("atexit.register", left.append)
    address = address_of(listener)
    watch(address)
    time.sleep(1.0)
    assert not is_lost()
    require_head()
    threading.Timer(0.2, listener.close).start()
    silent: queue.SimpleQueue[None] = queue.SimpleQueue()
    with pytest.raises(MachineError, match=rf"head of the cluster at {address} does not answer"):
        session.hear(silent)
    assert is_lost()
    assert left == [head._leave]


def test_a_head_that_is_watched_no_more_is_never_lost(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As before a local Ray of the same process."""
    monkeypatch.setattr(head, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(head, "LOST_SECONDS", 0.2)
    monkeypatch.setattr("atexit.register", lambda call: pytest.fail("lost"))
    watch(address_of(listener))
    watch(None)
    listener.close()
    time.sleep(0.6)
    assert not is_lost()


def test_a_process_that_lost_its_head_leaves_with_what_it_said(tmp_path: Path) -> None:
    """Before the handlers that were there, which would wait for the head."""
    script = (
        "import atexit, time\n"
        "from cluster import head\n"
        "atexit.register(time.sleep, 60)\n"
        "head.LOST_SECONDS = 0.0\n"
        "head._watched[:] = ['nowhere:1']\n"
        "head._watch('nowhere:1', ('127.0.0.1', 1))\n"
        "print('the end')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "the end\n")


def test_a_head_is_asked_before_ray_is(
    listener: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(head, "LOST_SECONDS", 0.3)
    monkeypatch.setattr("atexit.register", lambda call: None)
    head.require_reachable()  # There is none.
    watch(address_of(listener))
    head.require_reachable()
    listener.close()
    with pytest.raises(MachineError, match="does not answer any more"):
        head.require_reachable()

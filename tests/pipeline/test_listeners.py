"""Listeners hear of everything, one at a time, and a broken one spoils nothing but itself."""

import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from configs.parallel import StoreConfig
from pipeline.graph import Node
from pipeline.listeners import Audience
from pipeline.records import Blocked, Built, Failed, Reused
from pipeline.store import Committed
from tests.conftest import Recorder
from tests.pipeline.fakes import World, outcomes

BUILT = dict.fromkeys(["data", "train", "judge", "pack.cuda", "pack.ascend"], "built")


class Heard(Recorder):
    """A listener, and tracker of all nodes, that keeps what it is told."""

    def __init__(self) -> None:
        """It has heard nothing yet."""
        super().__init__()
        self.ended: dict[str, str] = {}

    def begin(self, node: Node, inputs: Mapping[str, Committed]) -> Recorder:
        """Every node's tracker is this one."""
        return self

    def end(
        self, node: Node, outcome: Built | Reused | Failed | Blocked, made: Committed | None
    ) -> None:
        """Keep the outcome."""
        self.ended[node.name] = outcome.outcome


class Broken(Heard):
    """A listener that raises whenever it is told this."""

    def __init__(self, *where: str, error: BaseException | None = None) -> None:
        """Raise `error` in the methods of these names."""
        super().__init__()
        self.calls: list[str] = []
        for name in where:
            setattr(self, name, self._fail(name, error or RuntimeError("no paper\nleft")))

    def _fail(self, name: str, error: BaseException) -> Callable[..., None]:
        def call(*told: Any, **more: Any) -> None:
            self.calls.append(name)
            raise error

        return call


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


@pytest.mark.parametrize("where", ["begin", "end", "note", "start", "log", "tag"])
def test_a_listener_that_raises_is_told_of_once_and_left_out_and_the_run_goes_on(
    world: World, capsys: pytest.CaptureFixture[str], where: str
) -> None:
    broken, heard = Broken(where), Heard()
    world.run(listeners=(broken, heard))
    if where == "note":
        # Nothing in this run is worth one.
        assert capsys.readouterr().err == ""
        assert broken.ended == BUILT
        Audience((broken, heard)).note("now")
        assert heard.notes == ["now"]
    assert broken.calls == [where]
    (told,) = capsys.readouterr().err.splitlines()
    assert told == (
        "ingot: warning: the listener Broken failed (RuntimeError: no paper) and is told nothing "
        "more; the run goes on"
    )
    (record,) = world.store.records.newest_first()
    assert outcomes(record) == BUILT == heard.ended
    assert record.succeeded
    # The one after it is told all, and nothing twice.
    assert heard.started == [(3, "step")]
    assert [step for step, _ in heard.logged] == [1, 2, 3]


@pytest.mark.parametrize("where", ["begin", "end", "log"])
def test_what_was_left_out_hears_no_more_of_any_node(world: World, where: str) -> None:
    broken = Broken(where)
    world.run(listeners=(broken,))
    assert broken.calls == [where]
    before = {"begin": {}, "end": {}, "log": {"data": "built"}}[where]
    assert broken.ended == before


def test_ctrl_c_in_a_listener_is_not_taken_for_its_fault(world: World) -> None:
    run = world.run(listeners=(Broken("begin", error=KeyboardInterrupt()),))
    assert run.interrupted
    assert outcomes(run) == {"data": "failed"}


def test_a_closed_stderr_is_no_reason_to_fail(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Closed:
        def write(self, text: str) -> None:
            raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", Closed())
    assert outcomes(world.run(listeners=(Broken("begin"),))) == BUILT


def test_a_tracker_passes_everything_on_to_every_listener(world: World) -> None:
    members = [Heard(), Heard()]
    tracker = Audience(members).begin(world.graph()["data"], {})
    tracker.start(steps=2, unit="step")
    tracker.log({"loss": 1.0}, step=1)
    tracker.note("hello")
    tracker.tag("kind", "fake")
    for one in members:
        assert (one.started, one.logged, one.notes, one.tags) == (
            [(2, "step")],
            [(1, {"loss": 1.0})],
            ["hello"],
            {"kind": "fake"},
        )


def test_listeners_are_told_by_one_thread_at_a_time(world: World) -> None:
    """Two nodes that begin, log and end at the same moment."""
    inside, together = threading.Lock(), threading.Barrier(2)

    class Slow(Heard):
        def _alone(self) -> None:
            assert inside.acquire(blocking=False)
            time.sleep(0.02)
            inside.release()

        def begin(self, node: Node, inputs: Mapping[str, Committed]) -> Recorder:
            self._alone()
            return super().begin(node, inputs)

        def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
            self._alone()
            super().log(metrics, step=step)

    slow = Slow()
    audience, node = Audience((slow,)), world.graph()["data"]

    def build(step: int) -> None:
        together.wait(10)
        audience.begin(node, {}).log({}, step=step)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(build, (1, 2)))
    assert sorted(step for step, _ in slow.logged) == [1, 2]

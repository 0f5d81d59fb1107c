"""A run that ends, fails or stalls is told of, once, and telling it can do the run no harm."""

import json
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from configs.errors import StoreError
from configs.notify import NotifyConfig
from configs.parallel import StoreConfig
from pipeline.messages import Message, Teller
from pipeline.notify import Notifier
from pipeline.records import Blocked, Built, Failed, Invocation, Reused, Run
from tests.pipeline.fakes import World, outcomes
from tests.pipeline.hooks import wait_until

COMMAND = "ingot run fake"
BUILT = dict.fromkeys(["data", "train", "judge", "pack.cuda", "pack.ascend"], "built")


@dataclass
class Ear:
    """A channel that keeps what it is told; `reply` is what becomes of each message."""

    name: str = "ear"
    reply: Callable[[], str | None] = lambda: None
    heard: list[Message] = field(default_factory=list)
    limits: list[float] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)

    def send(self, message: Message, timeout_seconds: float) -> str | None:
        """Keep it."""
        self.heard.append(message)
        self.limits.append(timeout_seconds)
        self.threads.add(threading.current_thread().name)
        return self.reply()

    @property
    def outcomes(self) -> list[str]:
        """Of the messages, in order."""
        return [one.outcome for one in self.heard]


def config(**fields: Any) -> NotifyConfig:
    return NotifyConfig(command=("true",), **fields)


@pytest.fixture
def world(store_config: StoreConfig) -> World:
    return World(store_config)


def notifier(world: World, *ears: Ear, said: list[str] | None = None, **fields: Any) -> Notifier:
    say = pytest.fail if said is None else said.append
    return Notifier(config(**fields), ears, world.begin(), command=COMMAND, say=say)


def notified(world: World, *ears: Ear, fields: Any = None, said: Any = None, **line: Any) -> Run:
    """Run the fake line with a notifier."""
    with notifier(world, *ears, said=said, **(fields or {})) as one:
        run = world.run(listeners=(one,), **line)
        one.finish(run)
    return run


def test_a_run_that_succeeded_is_told_once_with_its_figures(world: World) -> None:
    ear = Ear()
    run = notified(world, ear, fields={"timeout_seconds": 7.0})
    (told,) = ear.heard
    assert (told.event, told.outcome, told.recipe, told.run) == (
        *("end", "succeeded", "fake", run.id),
    )
    assert (told.outcomes, told.errors, told.command) == (BUILT, {}, COMMAND)
    assert told.figures["train"] == {"loss": 1 / 3}
    assert told.store == str(world.store.root)
    lines = told.text.splitlines()
    assert lines[0].startswith("fake succeeded after ")
    assert lines[0].endswith(f" on {told.host}, run {run.id}")
    assert "train built: loss 0.3333" in lines
    assert "go on" not in told.text
    assert ear.limits == [7.0]
    assert ear.threads == {"notify"}


def test_a_run_that_failed_names_node_error_and_the_command_to_go_on(world: World) -> None:
    ear = Ear()
    notified(world, ear, train={"fails": True})
    (told,) = ear.heard
    assert (told.event, told.outcome) == ("failure", "failed")
    assert told.errors == {"train": "train was told to fail"}
    assert told.outcomes["judge"] == "blocked"
    lines = told.text.splitlines()
    assert "train failed: train was told to fail" in lines
    assert "judge blocked by train" in lines
    assert lines[-1] == f"go on with: {COMMAND}"


def run_of(**outcomes: Any) -> Run:
    return Run(
        id="1",
        recipe="[red]a\nb",
        invocation=Invocation("tiny"),
        provenance={},
        started=0.0,
        store_root="/store",
        process={},
        outcomes=outcomes,
    )


def built(**fields: Any) -> Built:
    return Built("a", "f", "c", 1.0, fields.pop("figures", {"loss": 0.5}), **fields)


@pytest.mark.parametrize("reused", [False, True])
def test_a_model_that_fell_short_is_a_failure_of_its_own_kind(reused: bool) -> None:
    one: Built | Reused = built(shortfall="the gap is too large")
    if reused:
        one = Reused("a", "f", "c", 1.0, {"loss": 0.5}, None, shortfall="the gap is too large")
    told = Teller(COMMAND, "here").ended(run_of(data=built(), judge=one), 61.0)
    assert (told.event, told.outcome) == ("failure", "fell short")
    assert told.errors == {"judge": "the gap is too large"}
    assert told.text.splitlines()[0] == "[red]a b fell short after 01:01 on here, run 1"
    word = "reused" if reused else "built"
    assert f"judge {word}: loss 0.5; falls short: the gap is too large" in told.text
    # Worse things come first.
    failed = run_of(judge=one, train=Failed("no", 1.0))
    assert Teller(COMMAND, "here").ended(failed, 1.0).outcome == "failed"
    assert Teller(COMMAND, "here").ended(run_of(), 1.0).outcome == "failed"


def test_a_run_that_the_user_stopped_has_ended_and_nothing_of_it_failed() -> None:
    run = replace(run_of(data=built(), train=Failed("interrupted", 1.0)), interrupted=True)
    told = Teller(COMMAND, "here").ended(run, 1.0)
    assert (told.event, told.outcome, told.errors) == ("end", "stopped", {})
    assert "train was stopped" in told.text
    assert told.text.splitlines()[-1] == f"go on with: {COMMAND}"


def test_an_error_with_line_breaks_and_markup_is_one_line_and_whole_beside_it() -> None:
    error = "bad <b>&\r\n\x1b[31m`x`\u2028" + "y" * 6000
    told = Teller(COMMAND, "here").ended(run_of(train=Failed(error, 1.0)), 1.0)
    (line,) = (one for one in told.text.splitlines() if one.startswith("train"))
    assert line.startswith("train failed: bad <b>& [31m`x` yyy")
    assert line.endswith("y...")
    assert len(line) == 500
    assert told.errors["train"] == error[:4000]


def test_a_figure_that_is_no_number_is_left_out() -> None:
    figures = {"loss": float("nan"), "gap": float("inf"), "reward": 1.0}
    told = Teller(COMMAND, "here").ended(run_of(train=built(figures=figures)), 1.0)
    assert told.figures["train"] == {"reward": 1.0}
    assert "train built: reward 1" in told.text.splitlines()
    assert json.loads(json.dumps(told.as_json(), allow_nan=False))["text"] == told.text


@pytest.mark.parametrize(
    ("on", "fails", "expected"),
    [
        (["end"], False, ["succeeded"]),
        (["end"], True, []),
        (["failure"], False, []),
        (["failure"], True, ["failed"]),
        (["stall"], True, []),
        ([], False, []),
    ],
)
def test_only_what_was_asked_for_is_told(
    world: World, on: list[str], fails: bool, expected: list[str]
) -> None:
    ear = Ear()
    notified(world, ear, fields={"on": tuple(on)}, train={"fails": fails})
    assert ear.outcomes == expected


def test_a_stall_is_told_once_and_once_more_when_it_goes_on(world: World) -> None:
    ear = Ear()
    node = world.graph()["train"]
    with notifier(world, ear, stall_seconds=0.5) as one:
        tracker = one.begin(node, {})
        tracker.log({}, step=3)
        wait_until(lambda: ear.outcomes == ["stalled"], "stall")
        time.sleep(1.2)
        assert ear.outcomes == ["stalled"]
        tracker.log({}, step=4)
        wait_until(lambda: len(ear.heard) > 1, "message that it goes on")
        wait_until(lambda: len(ear.heard) > 2, "second stall")
        one.end(node, built(), None)
        wait_until(lambda: len(ear.heard) > 3, "message that it goes on again")
        one.finish(run_of(train=built()))
    assert ear.outcomes == ["stalled", "goes on", "stalled", "goes on", "succeeded"]
    assert {told.event for told in ear.heard[:4]} == {"stall"}
    first, on, second, again, _ = ear.heard
    assert "no step and no node done for 0.5 s, building train after step 3" in first.text
    assert "at train" in on.text
    assert "building train after step 4" in second.text
    assert again.outcomes == {"train": "built"}


def test_steps_and_nodes_that_come_in_time_are_no_stall(world: World) -> None:
    ear = Ear()
    node = world.graph()["train"]
    with notifier(world, ear, stall_seconds=1.0) as one:
        for turn in range(3):
            tracker = one.begin(node, {})
            time.sleep(0.2)
            tracker.log({}, step=turn)
            time.sleep(0.2)
            one.end(node, built(), None)
            time.sleep(0.2)
    assert ear.heard == []


def test_a_node_that_reports_no_step_or_waits_to_begin_stalls_too(world: World) -> None:
    ear = Ear()
    with notifier(world, ear, stall_seconds=0.1) as one:
        wait_until(lambda: len(ear.heard) == 1, "stall")
        one.begin(world.graph()["data"], {})
        wait_until(lambda: len(ear.heard) == 3, "second stall")
    assert ", building no node" in ear.heard[0].text
    assert ear.heard[2].text.endswith(", building data")


def test_a_stalled_run_that_is_stopped_does_not_go_on(world: World) -> None:
    ear = Ear()
    node = world.graph()["train"]
    with notifier(world, ear, stall_seconds=0.5) as one:
        one.begin(node, {})
        wait_until(lambda: len(ear.heard) == 1, "stall")
        one.end(node, Failed("interrupted", 1.0), None)
        one.finish(replace(run_of(), interrupted=True))
    assert ear.outcomes == ["stalled", "stopped"]


def test_a_stall_that_nobody_asked_for_is_not_told(world: World) -> None:
    ear = Ear()
    with notifier(world, ear, stall_seconds=0.05, on=("end",)) as one:
        one.begin(world.graph()["train"], {}).log({}, step=1)
        time.sleep(0.4)
        one.begin(world.graph()["train"], {})
        time.sleep(0.2)
    assert ear.heard == []


def test_after_the_end_nothing_stalls(world: World) -> None:
    ear = Ear()
    with notifier(world, ear, stall_seconds=0.2) as one:
        one.finish(run_of(train=built()))
        time.sleep(0.6)
    assert ear.outcomes == ["succeeded"]


@pytest.mark.parametrize(
    ("error", "event", "outcome", "why"),
    [
        (StoreError("no disk"), "failure", "failed", {"run": "no disk"}),
        (KeyError("x"), "failure", "failed", {"run": "internal error: KeyError: 'x'"}),
        (SystemExit(3), "failure", "failed", {"run": "internal error: SystemExit: 3"}),
        (KeyboardInterrupt(), "end", "stopped", {}),
    ],
)
def test_a_run_that_ends_by_an_error_of_its_own_is_told_and_the_error_passes_on(
    world: World, error: BaseException, event: str, outcome: str, why: dict[str, str]
) -> None:
    ear = Ear()
    with pytest.raises(type(error)) as caught, notifier(world, ear) as one:
        one.end(world.graph()["data"], built(), None)
        raise error
    assert caught.value is error
    (told,) = ear.heard
    assert (told.event, told.outcome, told.errors) == (event, outcome, why)
    assert told.outcomes == {"data": "built"}
    assert all(word in told.text for word in why.values())


def test_what_goes_wrong_after_the_end_was_told_is_not_told_again(world: World) -> None:
    ear = Ear()
    with pytest.raises(BrokenPipeError), notifier(world, ear) as one:
        one.finish(run_of(train=built()))
        raise BrokenPipeError
    assert ear.outcomes == ["succeeded"]


def raises() -> str | None:
    raise RuntimeError("T0SECRET")


@pytest.mark.parametrize(
    ("reply", "why"), [(lambda: "it answered 500", "it answered 500"), (raises, "RuntimeError")]
)
def test_a_channel_that_fails_is_named_once_and_tried_again_and_the_others_are_told(
    world: World, reply: Callable[[], str | None], why: str
) -> None:
    broken, ear, said = Ear("broken", reply), Ear(), list[str]()
    with notifier(world, broken, ear, said=said, stall_seconds=0.1) as one:
        wait_until(lambda: len(ear.heard) == 1, "stall")
        run = world.run(listeners=(one,))
        one.finish(run)
    assert outcomes(run) == BUILT
    assert said == [
        f"warning: broken could not tell that the run stalled ({why}); what the run makes is not "
        "affected"
    ]
    assert broken.outcomes == ear.outcomes
    assert ear.outcomes[:2] == ["stalled", "goes on"]
    assert ear.outcomes[-1] == "succeeded"


def test_a_run_that_cannot_be_put_into_words_is_a_warning(world: World) -> None:
    said = list[str]()
    with notifier(world, Ear(), said=said) as one:
        one.finish(run_of(train=built(figures={"loss": "none"})))
    (warning,) = said
    assert warning.startswith("warning: notify has no words for the run (TypeError: ")


def test_where_no_warning_can_be_shown_the_end_is_told_all_the_same(world: World) -> None:
    def closed(message: str) -> None:
        raise BrokenPipeError

    broken, ear = Ear("broken", lambda: "no"), Ear()
    with Notifier(config(), (broken, ear), world.begin(), command=COMMAND, say=closed) as one:
        one.finish(run_of(train=built()))
    assert ear.outcomes == ["succeeded"]


def test_a_run_does_not_wait_for_a_channel_while_it_goes_on(world: World) -> None:
    free = threading.Event()
    ear = Ear(reply=lambda: None if free.wait(20) else "no")
    with notifier(world, ear, stall_seconds=0.05) as one:
        wait_until(lambda: len(ear.heard) == 1, "stall")
        assert outcomes(world.run(listeners=(one,))) == BUILT
        assert len(ear.heard) == 1
        free.set()


def test_leaving_waits_for_what_is_told_and_no_longer_than_it_may_take(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = Ear(reply=lambda: time.sleep(0.5))
    notified(world, slow)
    assert slow.outcomes == ["succeeded"]
    free, said = threading.Event(), list[str]()
    monkeypatch.setattr("pipeline.notify._SPARE_SECONDS", 0.1)
    stuck = Ear(reply=lambda: None if free.wait(20) else "no")
    started = time.monotonic()
    notified(world, stuck, said=said, fields={"timeout_seconds": 0.1})
    assert 0.6 <= time.monotonic() - started < 5
    assert said == [
        "warning: notify was still busy after 0.6 s; what the run makes is not affected"
    ]
    free.set()


def test_ctrl_c_while_the_end_is_told_ends_the_waiting_and_nothing_else(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    ear = Ear()
    with notifier(world, ear) as one:
        join = one._thread.join

        def impatient(timeout: float) -> None:
            join(timeout)
            raise KeyboardInterrupt

        monkeypatch.setattr(one._thread, "join", impatient)
        one.finish(run_of(train=built()))
    assert ear.outcomes == ["succeeded"]


def test_without_a_table_nobody_is_told_and_no_thread_runs(world: World) -> None:
    before = threading.active_count()
    with Notifier(None, (), world.begin(), command=COMMAND, say=pytest.fail) as one:
        assert threading.active_count() == before
        run = world.run(listeners=(one,))
        one.finish(run)
    assert outcomes(run) == BUILT


def test_blocked_nodes_say_by_what() -> None:
    run = run_of(train=Failed("no", 1.0), judge=Blocked("train"))
    assert "judge blocked by train" in Teller(COMMAND, "here").ended(run, 1.0).text

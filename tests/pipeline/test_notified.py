"""`ingot run` with a table [notify]: who is told, what a failure to tell changes (nothing), and a
secret that stays one."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster.mirror import mirror_of
from pipeline import cli
from pipeline.records import Records, Run
from pipeline.verbs import asked, run
from tests.pipeline.hooks import PATH, Hook, listening, program, told_by_program, wait_until

ROOT = Path(__file__).parents[2]
NO_MLFLOW = ("--set", "tracking.uri=http://127.0.0.1:9")

# MLflow's own use of SQLAlchemy is behind its deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


@pytest.fixture
def line(fake_line: Path) -> Path:
    """A user's folder with the fake line."""
    return fake_line


@pytest.fixture
def hook() -> Iterator[Hook]:
    with listening() as one:
        yield one


def ingot(*words: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["ingot", *words])
        return cli.main()


def newest(folder: Path, store: str = ".ingot") -> Run:
    return next(Records(mirror_of(str(folder / store)), say=pytest.fail).newest_first())


def made(one: Run) -> dict[str, str]:
    """What became of each node, and the content of what was made."""
    return {
        name: f"{each.outcome} {getattr(each, 'content', '')}"
        for name, each in one.outcomes.items()
    }


def settings(**values: Any) -> list[str]:
    return [
        word
        for key, value in values.items()
        for word in ("--set", f"notify.{key}={json.dumps(value)}")
    ]


@pytest.mark.parametrize(
    ("steps", "code", "outcome"), [("24", 0, "succeeded"), ("13", 1, "failed")]
)
def test_program_and_webhook_are_told_how_a_run_ended(
    line: Path, hook: Hook, monkeypatch: pytest.MonkeyPatch, steps: str, code: int, outcome: str
) -> None:
    program(line, "")
    monkeypatch.setenv("MY_HOOK", hook.address)
    sets = ("--set", f"pretrain.steps={steps}", *settings(command=["./tell"], webhook="$MY_HOOK"))
    assert ingot("run", "smoke", *NO_MLFLOW, *sets) == code
    (told,) = told_by_program(line)
    (posted,) = hook.told
    assert {**posted, "text": told["text"]} == {**told, "mrkdwn": False}
    record = newest(line)
    assert (told["outcome"], told["run"]) == (outcome, record.id)
    assert told["outcomes"] == {name: one.outcome for name, one in record.outcomes.items()}
    assert told["command"] == asked.command("run", record.invocation)
    assert 'notify.webhook="$MY_HOOK"' in told["command"]
    assert told["errors"] == ({"train": "train was told to fail"} if code else {})


FAILING = {
    "exits 1": ("sys.exit('no paper')", None),
    "hangs": ("time.sleep(60)", None),
    "writes much": ("while True: os.write(2, b'x' * 100_000)", None),
    "500": ("", 500),
    "redirect": ("", 302),
    "drips": ("", "drip"),
    "refused": ("", "refused"),
}


@pytest.mark.parametrize("fault", FAILING)
def test_whatever_fails_to_be_told_a_run_ends_as_it_would_have(
    line: Path, hook: Hook, fault: str, capfd: pytest.CaptureFixture[str]
) -> None:
    body, mode = FAILING[fault]
    results = []
    for steps in ("24", "13"):
        words = ("run", "smoke", *NO_MLFLOW, "--set", f"pretrain.steps={steps}")
        code = ingot(*words, "--set", f"store.url=plain{steps}")
        plain = newest(line, f"plain{steps}")
        capfd.readouterr()
        address = hook.address
        if mode == "refused":
            with socket.create_server(("127.0.0.1", 0)) as taken:
                address = f"http://127.0.0.1:{taken.getsockname()[1]}{PATH}"
        elif mode is not None:
            hook.mode = mode
        who = {"webhook": address} if mode else {"command": [str(program(line, body))]}
        sets = ("--set", f"store.url=told{steps}", *settings(**who, timeout_seconds=0.5))
        assert ingot(*words, *sets) == code
        told = capfd.readouterr()
        one = newest(line, f"told{steps}")
        assert (made(one), one.finished) == (made(plain), True)
        results.append(code)
        assert told.out.count("warning: notify.") == 1
        assert "could not tell that the run " in told.out
        assert told.err == ("" if code == 0 else "ingot: error: train: train was told to fail\n")
        assert PATH not in told.out + told.err
    assert results == [0, 1]


def test_with_json_a_warning_stays_out_of_it(line: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = settings(command=["false"])
    assert ingot("run", "smoke", *NO_MLFLOW, "--json", *command) == 0
    told = capfd.readouterr()
    assert json.loads(told.out)["succeeded"]
    assert "warning: notify.command (" in told.err
    assert told.err.count("exit code 1") == 1


def holding(folder: Path, secret: str) -> list[str]:
    return [
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and secret.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("how", ["set", "inline", "overlay"])
def test_a_webhook_is_in_no_file_and_no_output_of_a_run(
    line: Path, hook: Hook, how: str, capfd: pytest.CaptureFixture[str]
) -> None:
    hook.mode = 500
    words = {
        "set": ("--set", f"notify.webhook={hook.address}"),
        "inline": (f'--set=notify={{webhook="{hook.address}"}}',),
        "overlay": ("@own.toml",),
    }[how]
    if how == "overlay":
        (line / "own.toml").write_text(f'[notify]\nwebhook = "{hook.address}"\n')
    # Once with MLflow's own store beside it, which takes seconds to make.
    words = (*words, *(() if how == "set" else NO_MLFLOW))
    assert ingot("run", "smoke", *words) == 0
    assert ingot("run", "smoke", *words, "--set", "pretrain.steps=13") == 1
    assert len(hook.told) == 2
    assert ingot("plan", "smoke", *words, "--json") == 0
    for verb in (["runs"], ["runs", "--json"], ["status"], ["why", "train"], ["show", "data"]):
        ingot(*verb)
    told = capfd.readouterr()
    assert PATH not in told.out + told.err + json.dumps(hook.told)
    assert holding(line, PATH) == (["own.toml"] if how == "overlay" else [])
    # What went wrong is in both, so that these files were read.
    assert holding(line, "train was told to fail") != []
    if how == "set":
        assert "MLflow, this run: " in told.out
        assert "mlflow.db" in holding(line / ".ingot", "notify.webhook")
        assert len(list((line / ".ingot").rglob("recipe.json"))) == 2
    if how != "overlay":
        assert "$INGOT_NOTIFY_WEBHOOK" in " ".join(newest(line).invocation.sets)


def test_two_recipes_differ_by_who_is_told_without_the_secret(
    line: Path, hook: Hook, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("new", "mine", "--from", "smoke") == 0
    path = line / "mine.toml"
    path.write_text(path.read_text() + f'\n[notify]\nwebhook = "{hook.address}"\n')
    assert ingot("diff", "smoke", "mine.toml") == 3
    told = capsys.readouterr().out
    assert "notify.webhook: none -> $INGOT_NOTIFY_WEBHOOK" in told
    assert PATH not in told


def test_the_command_to_go_on_asks_for_the_address_again(
    line: Path, hook: Hook, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ingot("run", "smoke", *NO_MLFLOW, "--set", f"notify.webhook={hook.address}") == 0
    recorded = newest(line).invocation
    again = ["run", recorded.recipe, *(w for one in recorded.sets for w in ("--set", one))]
    assert ingot("status") == 0
    capsys.readouterr()
    monkeypatch.delenv("INGOT_NOTIFY_WEBHOOK", raising=False)
    assert ingot(*again) == 2
    assert "variable INGOT_NOTIFY_WEBHOOK is not set" in capsys.readouterr().err
    monkeypatch.setenv("INGOT_NOTIFY_WEBHOOK", hook.address)
    assert ingot(*again) == 0
    assert len(hook.told) == 2


def test_a_program_that_is_not_there_is_told_of_before_the_first_stage(
    line: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ingot("run", "smoke", *settings(command=["./nothing"])) == 2
    told = capsys.readouterr()
    assert told.err.count("\n") == 1
    assert told.err.startswith(f"ingot: error: notify.command: {line}/nothing is no file")
    assert not (line / ".ingot").exists()


def test_a_run_that_dies_of_a_fault_of_ours_still_tells(
    line: Path,
    hook: Hook,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*told: Any) -> None:
        raise ZeroDivisionError("a slip")

    monkeypatch.setattr(run, "across_seeds", broken)
    assert ingot("run", "smoke", *NO_MLFLOW, *settings(webhook=hook.address)) == 1
    assert "internal error: ZeroDivisionError: a slip" in capsys.readouterr().err
    (told,) = hook.told
    assert (told["event"], told["outcome"]) == ("failure", "failed")
    assert told["errors"] == {"run": "internal error: ZeroDivisionError: a slip"}
    assert told["outcomes"]["train"] == "built"


RUN = """
import sys
from pipeline import cli
from pipeline.verbs import asked
from tests.pipeline.fakes import make_line
asked.production = lambda recipe: make_line(train={"seconds": 60})
sys.exit(cli.main(sys.argv[1:]))
"""


def test_a_run_that_stalls_and_is_stopped_tells_both(line: Path, hook: Hook) -> None:
    words = [*NO_MLFLOW, *settings(webhook=hook.address, stall_seconds=1.0)]
    with subprocess.Popen(
        [sys.executable, "-c", RUN, "run", "smoke", *words],
        cwd=line,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        # A fake reports its steps first, and then sleeps.
        wait_until(lambda: hook.told[-1:] and hook.told[-1]["outcome"] == "stalled", "stall", 60)
        process.send_signal(signal.SIGINT)
        told = process.communicate(timeout=60)[0]
    assert process.returncode == 130, told
    assert [one["outcome"] for one in hook.told[-2:]] == ["stalled", "stopped"]
    assert "building train after step 3" in hook.told[-2]["text"]
    assert hook.told[-1]["event"] == "end"
    assert "go on with: ingot run smoke" in hook.told[-1]["text"]
    assert PATH not in told

"""A program and a webhook are told, or say why not, in time and without their secret."""

import json
import os
import socket
import stat
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.notify import NotifyConfig
from pipeline.channels import Program, Webhook, open_channels
from pipeline.messages import Message
from tests.pipeline.hooks import PATH, Hook, listening, program, told_by_program, wait_until

MESSAGE = Message(
    text="it <!channel> & *ran*\nwell",
    event="end",
    outcome="succeeded",
    recipe="größe\n\0",
    run="2026",
    host="here",
    store="/store",
    command="ingot run tiny",
    seconds=1.0,
    outcomes={"data": "built"},
    errors={"train": "half a pair: \ud800"},
    figures={"data": {"loss": 0.5}},
)


@pytest.fixture
def hook() -> Iterator[Hook]:
    with listening() as one:
        yield one


def tell(folder: Path, body: str, seconds: float = 10.0, *arguments: str) -> str | None:
    path = program(folder, body)
    return Program(str(path), arguments, folder).send(MESSAGE, seconds)


def gone(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().split()[2] == "Z"
    except OSError:
        return True


def test_a_program_reads_the_message_where_the_run_was_started(tmp_path: Path) -> None:
    assert tell(tmp_path, "", 10.0, "an argument", "$HOME; true") is None
    assert told_by_program(tmp_path) == [json.loads(json.dumps(MESSAGE.as_json()))]
    variables, folder, arguments = json.loads((tmp_path / "beside.json").read_text())
    said = {"EVENT": "end", "OUTCOME": "succeeded", "RECIPE": "größe", "RUN": "2026"}
    assert {key: variables[f"INGOT_{key}"] for key in said} == said
    assert folder == str(tmp_path)
    assert arguments == ["an argument", "$HOME; true"]


def test_a_program_that_reads_nothing_of_a_long_message_ends_as_it_likes(tmp_path: Path) -> None:
    long = replace(MESSAGE, errors={str(n): "x" * 4000 for n in range(100)})
    assert Program("/bin/true", (), tmp_path).send(long, 10) is None


def test_a_program_that_fails_is_named_by_its_last_words(tmp_path: Path) -> None:
    why = tell(tmp_path, "sys.exit('no\\n\\x1b[31mpaper\\n \\n')")
    assert why == "exit code 1: [31mpaper"
    assert tell(tmp_path, "sys.exit(7)") == "exit code 7"
    assert tell(tmp_path, "os.kill(os.getpid(), 9)") == "exit code -9"


@pytest.mark.parametrize("stream", [1, 2])
def test_a_program_that_writes_much_is_read_and_forgotten(tmp_path: Path, stream: int) -> None:
    body = f"for _ in range(100): os.write({stream}, b'x' * 1_000_000)\nsys.exit(3)"
    tracemalloc.start()
    try:
        why = tell(tmp_path, body)
        _, most_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert why is not None
    assert why.startswith("exit code 3")
    assert len(why) < 600
    assert most_bytes < 5_000_000


def test_a_program_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path) -> None:
    body = (
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen(['sleep', '60'])\n"
        "(folder / 'pids').write_text(f'{os.getpid()} {child.pid}')\n"
        "time.sleep(60)"
    )
    started = time.monotonic()
    assert tell(tmp_path, body, 1.5) == "it did not end within 1.5 s"
    assert time.monotonic() - started < 5
    for pid in map(int, (tmp_path / "pids").read_text().split()):
        wait_until(lambda pid=pid: gone(pid), f"end of process {pid}")


def test_a_program_that_leaves_another_behind_has_ended(tmp_path: Path) -> None:
    body = (
        "child = subprocess.Popen(['sleep', '30'])\n"
        "(folder / 'pid').write_text(str(child.pid))\n"
        "sys.exit('left one')"
    )
    started = time.monotonic()
    assert tell(tmp_path, body) == "exit code 1: left one"
    assert time.monotonic() - started < 5
    pid = int((tmp_path / "pid").read_text())
    assert not gone(pid)
    os.kill(pid, 9)


def test_a_program_that_vanished_meanwhile_is_no_error_of_the_run(tmp_path: Path) -> None:
    said = Program(str(tmp_path / "gone"), (), tmp_path).send(MESSAGE, 10)
    assert said == "it cannot be started: No such file or directory"
    path = program(tmp_path, "")
    path.write_text("no script")
    said = Program(str(path), (), tmp_path).send(MESSAGE, 10)
    assert said == "it cannot be started: Exec format error"


def test_a_webhook_is_posted_fields_and_a_text_that_slack_shows_as_it_is(hook: Hook) -> None:
    assert Webhook(hook.address).send(MESSAGE, 10) is None
    (told,) = hook.told
    assert told["text"] == "it &lt;!channel&gt; &amp; *ran*\nwell"
    assert told["mrkdwn"] is False
    fields = {**MESSAGE.as_json(), "text": told["text"], "mrkdwn": False}
    assert told == json.loads(json.dumps(fields))


@pytest.mark.parametrize(
    ("status", "why"),
    [
        (500, "it answered 500 Internal Server Error"),
        (404, "it answered 404 Not Found"),
        (299, None),
        (599, "it answered 599"),
        (301, "it answered 301 Moved Permanently, a redirect, which is not followed"),
        (307, "it answered 307 Temporary Redirect, a redirect, which is not followed"),
    ],
)
def test_a_webhook_counts_by_its_status_and_no_redirect_is_followed(
    hook: Hook, status: int, why: str | None
) -> None:
    hook.mode = status
    assert Webhook(hook.address).send(MESSAGE, 10) == why
    assert hook.methods == ["POST"]
    assert len(hook.told) == 1


def test_an_answer_that_comes_byte_by_byte_is_not_waited_for(hook: Hook) -> None:
    hook.mode = "drip"
    started = time.monotonic()
    assert Webhook(hook.address).send(MESSAGE, 0.5) == "no answer within 0.5 s"
    assert time.monotonic() - started < 2


def test_a_server_that_says_nothing_is_not_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}{PATH}"
        started = time.monotonic()
        why = Webhook(address).send(MESSAGE, 0.5)
        assert why in ("no answer within 0.5 s", "no answer in time")
        assert time.monotonic() - started < 2


def test_a_server_that_is_not_there_is_named_in_the_systems_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    assert Webhook(f"http://127.0.0.1:{port}{PATH}").send(MESSAGE, 10) == "Connection refused"


def test_what_is_no_http_is_named_by_its_kind_without_the_secret(hook: Hook) -> None:
    why = Webhook(hook.address.replace("http:", "https:")).send(MESSAGE, 10)
    assert why is not None
    assert PATH not in why
    # A fault that the checks of an address leave no room for, whose words hold the address.
    assert Webhook(f"http://127.0.0.1:1{PATH} x").send(MESSAGE, 10) == "InvalidURL"


def test_a_webhook_on_this_machine_is_told_past_a_proxy(
    hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    with listening() as proxy:
        for name in ("http_proxy", "HTTP_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
        for name in ("no_proxy", "NO_PROXY"):
            monkeypatch.delenv(name, raising=False)
        assert Webhook(hook.address).send(MESSAGE, 10) is None
        assert (len(hook.told), proxy.posts) == (1, [])


def test_a_webhook_shows_its_address_nowhere(hook: Hook) -> None:
    webhook = Webhook(hook.address)
    assert PATH not in repr(webhook) + str(webhook) + webhook.name


def test_a_program_is_found_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = program(tmp_path, "")

    def found(word: str) -> str:
        config = NotifyConfig(command=(word, "x"))
        (channel,) = open_channels(config, tmp_path, {})
        assert isinstance(channel, Program)
        assert (channel.arguments, channel.folder) == (("x",), tmp_path)
        return channel.path

    assert found("./tell") == str(path)
    assert found(str(path)) == str(path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert found("~/tell") == str(path)
    assert os.path.basename(found("true")) == "true"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("nothing-of-this-name", "'nothing-of-this-name' is no program on PATH; name one by"),
        ("./nothing", "/nothing is no file; name a program that may be run"),
        ("./.", " is no file; name a program"),
        ("./plain", "/plain is a file that cannot be run; name a program"),
    ],
)
def test_a_program_that_is_not_there_is_one_clear_error(
    tmp_path: Path, word: str, message: str
) -> None:
    plain = tmp_path / "plain"
    plain.touch(stat.S_IRUSR)
    with pytest.raises(ConfigError) as caught:
        open_channels(NotifyConfig(command=(word,)), tmp_path, {})
    said = str(caught.value)
    assert said.startswith("notify.command: ")
    assert message in said
    assert "\n" not in said


def test_a_variable_that_holds_no_address_is_one_clear_error_without_what_it_holds() -> None:
    config = NotifyConfig.model_validate({"webhook": "$MY_HOOK"})
    for environment, message in (
        ({}, "notify.webhook: the environment variable MY_HOOK is not set; let it hold"),
        ({"MY_HOOK": ""}, "the environment variable MY_HOOK is not set"),
        ({"MY_HOOK": f"host{PATH}"}, "what MY_HOOK holds is no http or https address; write it"),
        ({"MY_HOOK": f"http://host{PATH}"}, "what MY_HOOK holds sends a secret to host in the cl"),
    ):
        with pytest.raises(ConfigError) as caught:
            open_channels(config, Path(), environment)
        assert message in str(caught.value)
        assert PATH not in str(caught.value)
    (channel,) = open_channels(config, Path(), {"MY_HOOK": f"https://host{PATH}"})
    assert channel == Webhook(f"https://host{PATH}")


def test_who_asks_for_nothing_gets_no_channel() -> None:
    assert open_channels(None, Path(), {}) == []

"""The ways to tell somebody of a run: a program of the user's, and a webhook.

A channel raises nothing that it can foresee: it says why it could not tell. A webhook's address is
a secret, so no words of libraries are passed on, which may hold it.
"""

import json
import os
import queue
import shlex
import shutil
import signal
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from http.client import responses
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, ProxyHandler, Request, build_opener

from configs.errors import ConfigError
from configs.notify import NotifyConfig, check_webhook, variable_of
from pipeline.messages import Message, one_line

_KILL_SECONDS = 1.0
_TAIL_BYTES = 65_536


class Channel(Protocol):
    """A way to tell somebody."""

    @property
    def name(self) -> str:
        """What a warning calls it."""

    def send(self, message: Message, timeout_seconds: float) -> str | None:
        """Tell it within so long. Why that failed; none if it did not."""


def open_channels(
    config: NotifyConfig | None, folder: Path, environment: Mapping[str, str]
) -> list[Channel]:
    """Those that a recipe asks for, checked as far as that tells nobody; paths begin in `folder`.

    ConfigError if a program is not there, or a variable holds no address.
    """
    channels: list[Channel] = []
    if config is not None and config.command is not None:
        program = _find(config.command[0], folder)
        channels.append(Program(program, config.command[1:], folder))
    if config is not None and config.webhook is not None:
        variable = variable_of(config.webhook)
        secret = config.webhook.get_secret_value()
        channels.append(Webhook(secret if variable is None else _held(variable, environment)))
    return channels


def _find(program: str, folder: Path) -> str:
    if "/" in program:
        path = folder / os.path.expanduser(program)
        if path.is_file() and os.access(path, os.X_OK):
            return str(path)
        why = "is a file that cannot be run" if path.is_file() else "is no file"
        raise ConfigError(
            f"notify.command: {path} {why}; name a program that may be run, or leave it out"
        )
    found = shutil.which(program)
    if found is None:
        raise ConfigError(
            f"notify.command: {program!r} is no program on PATH; name one by its path, or leave "
            "it out"
        )
    return str(folder / found)


def _held(variable: str, environment: Mapping[str, str]) -> str:
    address = environment.get(variable, "")
    if not address:
        raise ConfigError(
            f"notify.webhook: the environment variable {variable} is not set; let it hold the "
            "address, or leave the webhook out"
        )
    try:
        check_webhook(address)
    except ValueError as error:
        raise ConfigError(f"notify.webhook: what {variable} holds {error}") from None
    return address


@dataclass(frozen=True, slots=True)
class Program:
    """A program that reads a message as JSON on its standard input."""

    path: str
    arguments: tuple[str, ...]
    folder: Path
    """Where it is run."""

    @property
    def name(self) -> str:
        """The command line."""
        return f"notify.command ({one_line(shlex.join((self.path, *self.arguments)))})"

    def send(self, message: Message, timeout_seconds: float) -> str | None:
        """Run it to its end."""
        try:
            process = self._start(message)
        except OSError as error:
            return f"it cannot be started: {_named(error)}"
        assert process.stderr is not None
        tail = _Tail(process.stderr)
        try:
            code = process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            _kill(process)
            return f"it did not end within {timeout_seconds:g} s"
        return None if code == 0 else f"exit code {code}{tail.last_line()}"

    def _start(self, message: Message) -> subprocess.Popen[bytes]:
        with tempfile.TemporaryFile() as letter:
            # A file, as a pipe would have to be fed while the program may not read.
            letter.write(_body(message.as_json()))
            letter.seek(0)
            return subprocess.Popen(
                [self.path, *self.arguments],
                cwd=self.folder,
                env={**os.environb, **_variables(message)},
                stdin=letter,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                # A group of its own: Ctrl-C is meant for the run.
                start_new_session=True,
            )


class _Tail:
    """Reads a stream to its end, however much comes, and keeps the last of it."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self._chunks: deque[bytes] = deque(maxlen=2)
        self._thread = threading.Thread(target=self._read, daemon=True, name="notify.stderr")
        self._thread.start()

    def last_line(self) -> str:
        """The last line that says something, after a colon; empty without one."""
        # What the program started may hold the stream open.
        self._thread.join(_KILL_SECONDS)
        lines = b"".join(self._chunks).decode(errors="replace").splitlines()
        told = [line for line in map(one_line, lines) if line]
        return f": {told[-1]}" if told else ""

    def _read(self) -> None:
        descriptor = self._stream.fileno()
        with self._stream:
            while chunk := os.read(descriptor, _TAIL_BYTES):
                self._chunks.append(chunk)


def _kill(process: subprocess.Popen[bytes]) -> None:
    """End a program, and what it has started unless that left its group."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_KILL_SECONDS)


def _variables(message: Message) -> dict[bytes, bytes]:
    said = {
        "INGOT_EVENT": message.event,
        "INGOT_OUTCOME": message.outcome,
        "INGOT_RECIPE": one_line(message.recipe),
        "INGOT_RUN": message.run,
    }
    # As UTF-8, whatever the terminal's own encoding can say.
    return {name.encode(): value.encode(errors="replace") for name, value in said.items()}


@dataclass(frozen=True, slots=True)
class Webhook:
    """An address that messages are posted to."""

    address: str = field(repr=False)

    @property
    def name(self) -> str:
        """Not the address."""
        return "notify.webhook"

    def send(self, message: Message, timeout_seconds: float) -> str | None:
        """Post it. The answer counts by its status alone; a redirect is not followed."""
        body, said = _body(_for_slack(message)), queue.SimpleQueue[str | None]()
        # urllib bounds the wait for each part of an answer, and for a name's address not at all.
        threading.Thread(
            target=lambda: said.put(self._post(body, timeout_seconds)),
            daemon=True,
            name="notify.webhook",
        ).start()
        try:
            return said.get(timeout=timeout_seconds)
        except queue.Empty:
            return f"no answer within {timeout_seconds:g} s"

    def _post(self, body: bytes, timeout_seconds: float) -> str | None:
        headers = {"Content-Type": "application/json", "User-Agent": "ingot"}
        request = Request(self.address, body, headers, method="POST")
        # What may be read on the way stays on this machine.
        proxies = ProxyHandler({} if request.type == "http" else None)
        try:
            with build_opener(proxies, _NoRedirects).open(request, timeout=timeout_seconds):
                return None
        except HTTPError as error:
            with error:
                return f"it answered {_status(error.code)}"
        except URLError as error:
            return _named(error.reason)
        except Exception as error:
            # On a thread of its own nobody would catch it, and its words may hold the address.
            return _named(error)


class _NoRedirects(HTTPRedirectHandler):
    """Takes a redirect for an answer, as the message was not meant for anybody else."""

    def redirect_request(self, *told: Any, **more: Any) -> None:
        return None


def _for_slack(message: Message) -> dict[str, Any]:
    """The message with a text that Slack shows as it is: no markup, no mention of people."""
    text = message.text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return {**message.as_json(), "text": text, "mrkdwn": False}


def _body(fields: Mapping[str, Any]) -> bytes:
    return json.dumps(fields, allow_nan=False).encode("ascii")


def _status(code: int) -> str:
    redirect = ", a redirect, which is not followed" if 300 <= code < 400 else ""
    return f"{code} {responses.get(code, '')}".rstrip() + redirect


def _named(error: object) -> str:
    """What went wrong, in the system's words or as its kind."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return (isinstance(error, OSError) and error.strerror) or type(error).__name__

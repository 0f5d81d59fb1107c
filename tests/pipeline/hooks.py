"""Those who are told of runs, as tests need them: a server on loopback, and programs."""

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

PATH = "/services/T0SECRET"


class Hook(ThreadingHTTPServer):
    """A webhook that keeps what it is posted, and answers as it is told to.

    `mode` is the status of its answer, or `drip`: an answer that comes a byte at a time, always
    soon enough for the next. With 307 it points to `/elsewhere` on itself.
    """

    daemon_threads = True

    def __init__(self) -> None:
        """On a free port of loopback."""
        super().__init__(("127.0.0.1", 0), _Handler)
        self.mode: int | str = 200
        self.posts: list[tuple[str, dict[str, Any]]] = []
        """Path and JSON of each."""
        self.methods: list[str] = []

    @property
    def address(self) -> str:
        """Where it listens, with a secret."""
        return f"http://127.0.0.1:{self.server_port}{PATH}"

    @property
    def told(self) -> list[dict[str, Any]]:
        """What was posted to its own address."""
        return [body for path, body in self.posts if path == PATH]


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_GET(self) -> None:
        """Only a redirect that was followed gets here."""
        self.server.methods.append("GET")
        self.send_response(200)
        self.end_headers()

    def do_POST(self) -> None:
        """Keep the body, and answer by the mode."""
        self.server.methods.append("POST")
        assert self.headers["Content-Type"] == "application/json"
        raw = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.posts.append((self.path, json.loads(raw)))
        mode = self.server.mode
        if isinstance(mode, str):
            with suppress(OSError):
                for byte in b"HTTP/1.1 200 " + b"O" * 200:
                    self.wfile.write(bytes([byte]))
                    time.sleep(0.05)
            return
        self.send_response(mode, f"no {PATH}")
        if 300 <= mode < 400:
            self.send_header("Location", "/elsewhere")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *told: Any) -> None:
        """Nothing on stderr."""


@contextmanager
def listening() -> Iterator[Hook]:
    """A webhook for as long as the block runs."""
    with Hook() as hook:
        thread = threading.Thread(target=hook.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield hook
        hook.shutdown()
        thread.join(5)


def program(folder: Path, body: str) -> Path:
    """A program in `folder` that keeps what it reads in `told.jsonl` there, and then does `body`.

    Its environment and working folder are kept beside that.
    """
    path = folder / "tell"
    path.write_text(
        f"#!{sys.executable}\n"
        "import json, os, pathlib, signal, subprocess, sys, time\n"
        f"folder = pathlib.Path({str(folder)!r})\n"
        "with open(folder / 'told.jsonl', 'a') as file:\n"
        "    print(json.dumps(json.load(sys.stdin)), file=file)\n"
        "said = {k: v for k, v in os.environ.items() if k.startswith('INGOT_')}\n"
        "(folder / 'beside.json').write_text(json.dumps([said, os.getcwd(), sys.argv[1:]]))\n"
        f"{body}\n"
    )
    path.chmod(0o755)
    return path


def told_by_program(folder: Path) -> list[dict[str, Any]]:
    """What the program in `folder` has read."""
    path = folder / "told.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wait_until(condition: Any, what: str, seconds: float = 10.0) -> None:
    """Fail unless the condition holds in time."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"no {what} within {seconds:g} s")
        time.sleep(0.01)

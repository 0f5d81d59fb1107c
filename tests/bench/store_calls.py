"""What one run of `smoke` asks of a store of objects: calls and bytes, by stage.

    python -m tests.bench.store_calls

A proxy between the run and the server counts. Calls that create a file only if it is not there
carry `If-None-Match`; they decide who builds and whose artifact counts.
"""

import http.client
import os
import re
import subprocess
import tempfile
import threading
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from tests.line.runs import INGOT
from tests.objects import BUCKET, patched, serving

KINDS = ("list", "read", "write", "create", "delete")
_STORE = "store"


class Calls:
    """Counts by stage and kind; `""` is what belongs to no stage."""

    def __init__(self) -> None:
        self.number: dict[str, Counter[str]] = defaultdict(Counter)
        self.sent: Counter[str] = Counter()
        self.received: Counter[str] = Counter()
        self._lock = threading.Lock()

    def forget(self) -> None:
        """Begin anew."""
        with self._lock:
            for counts in (self.number, self.sent, self.received):
                counts.clear()

    def add(self, stage: str, kind: str, sent: int, received: int) -> None:
        """One more call, with the bytes of its bodies."""
        with self._lock:
            self.number[stage][kind] += 1
            self.sent[stage] += sent
            self.received[stage] += received


def stage_of(url: str) -> str:
    """The stage whose folder a request is about."""
    found = re.search(rf"{_STORE}/artifacts/(\w+)", unquote(url))
    return found[1] if found else ""


def kind_of(method: str, url: str, headers: "dict[str, str]") -> str:
    """What a request does."""
    if method == "GET" and "list-type" in urlsplit(url).query:
        return "list"
    if method in ("GET", "HEAD"):
        return "read"
    if method == "DELETE" or (method == "POST" and "delete" in urlsplit(url).query):
        return "delete"
    return "create" if "if-none-match" in headers else "write"


@contextmanager
def counting(endpoint: str) -> Iterator[tuple[str, Calls]]:
    """A proxy before the server at `endpoint`: its own endpoint, and what it counts."""
    calls, host = Calls(), endpoint.partition("://")[2]

    class Proxy(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def forward(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            there = http.client.HTTPConnection(host, timeout=60)
            given = {key: value for key, value in self.headers.items() if key != "Host"}
            there.request(self.command, self.path, body, given)
            answer = there.getresponse()
            data = answer.read()
            lower = {key.lower(): value for key, value in given.items()}
            kind = kind_of(self.command, self.path, lower)
            calls.add(stage_of(self.path), kind, len(body), len(data))
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("transfer-encoding", "connection", "content-length"):
                    self.send_header(key, value)
            length = answer.getheader("Content-Length") if self.command == "HEAD" else len(data)
            self.send_header("Content-Length", str(length or 0))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)
            there.close()

        do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed of a request."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Proxy)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", calls
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def table(calls: Calls) -> str:
    """One row a stage, and the whole."""
    lines = ["| stage | " + " | ".join(KINDS) + " | kB sent | kB received |"]
    lines.append("|---" * (len(KINDS) + 3) + "|")
    for stage in sorted(calls.number, key=lambda name: (name == "", name)):
        counts = [str(calls.number[stage][kind]) for kind in KINDS]
        size = [f"{one[stage] / 1000:,.0f}" for one in (calls.sent, calls.received)]
        lines.append(f"| {stage or 'none'} | " + " | ".join([*counts, *size]) + " |")
    sums = [str(sum(one[kind] for one in calls.number.values())) for kind in KINDS]
    size = [f"{sum(one.values()) / 1000:,.0f}" for one in (calls.sent, calls.received)]
    lines.append("| all | " + " | ".join([*sums, *size]) + " |")
    return "\n".join(lines)


def main() -> None:
    """Run `smoke` once to build all, once with nothing to do; print both tables."""
    with (
        serving() as objects,
        # One address for both: a store of another server would be another store.
        counting(objects.endpoint) as (endpoint, calls),
        tempfile.TemporaryDirectory() as folder,
    ):
        variables = {"AWS_ENDPOINT_URL": endpoint, "XDG_CACHE_HOME": str(Path(folder, "cache"))}
        words = ["run", "smoke", "--set", f"store.url=s3://{BUCKET}/{_STORE}"]
        for name in ("built", "reused"):
            calls.forget()
            with patched(variables):
                subprocess.run(
                    [str(INGOT), *words], cwd=folder, env=dict(os.environ), check=True, timeout=900
                )
            print(f"\n{name}:\n\n{table(calls)}\n", flush=True)


if __name__ == "__main__":
    main()

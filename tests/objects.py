"""A store of objects on this machine, in the place of S3: a server in a process of its own."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.request import urlopen

import s3fs

from tests.pipeline.test_tracking_servers import free_port

BUCKET = "bucket"
_START_SECONDS = 60.0
_SERVER = """
import sys, threading
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import run_simple
answers, turn = DomainDispatcherApplication(create_backend_app), threading.Lock()
def one_at_a_time(environ, start):
    with turn:
        return list(answers(environ, start))
run_simple("127.0.0.1", int(sys.argv[1]), one_at_a_time, threaded=True)
"""
"""A store creates an object for one of many who ask at once; moto alone looks and then writes."""
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "anybody", "AWS_SECRET_ACCESS_KEY": "anything"}


@dataclass(frozen=True)
class Objects:
    """A server that answers, with an empty bucket."""

    endpoint: str

    @property
    def url(self) -> str:
        """Where the bucket is."""
        return f"s3://{BUCKET}"

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to reach it."""
        return {
            **CREDENTIALS,
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": self.endpoint,
        }


@contextmanager
def serving() -> Iterator[Objects]:
    """Start a server, make the bucket, and end the server."""
    port = free_port()
    command = [sys.executable, "-c", _SERVER, str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    objects = Objects(f"http://127.0.0.1:{port}")
    with patched(objects.environment):
        try:
            _await_answer(objects, server)
            # Those that are known in this process may be of a server that was there before.
            s3fs.S3FileSystem.clear_instance_cache()
            s3fs.S3FileSystem(skip_instance_cache=True).mkdir(BUCKET)
            yield objects
        finally:
            server.terminate()
            server.wait(30)


@contextmanager
def patched(variables: Mapping[str, str]) -> Iterator[None]:
    """The environment with these variables, for a while."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _await_answer(objects: Objects, server: "subprocess.Popen[bytes]") -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urlopen(f"{objects.endpoint}/moto-api/", timeout=5):
            return
        time.sleep(0.1)
    raise TimeoutError(f"no server of objects on {objects.endpoint}")

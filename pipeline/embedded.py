"""The embedded tracking store: one SQLite file, its schema made once, served on this machine."""

import fcntl
import logging
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http import HTTPStatus
from pathlib import Path
from typing import TextIO
from urllib.parse import unquote, urlsplit
from urllib.request import urlopen

from configs.errors import StoreError
from configs.parallel import TrackingConfig
from pipeline.places import sqlite_path

UI_PORT = 5000
LOCK_SECONDS = 180.0
"""Making the schema takes seconds, and on a busy machine a minute."""
_LOOK_SECONDS = 0.1
_START_SECONDS = 120.0
_ARTIFACTS = "mlflow-artifacts"
_LOCATIONS = (
    ("experiments", "artifact_location"),
    ("runs", "artifact_uri"),
    ("logged_models", "artifact_location"),
    ("model_versions", "storage_location"),
)
"""Tables and columns in which MLflow keeps absolute addresses of files."""


@contextmanager
def schema_lock(uri: str) -> Iterator[None]:
    """Only one process at a time creates or migrates an SQLite store; two would both fail."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = path.with_name(f"{path.name}.lock")
    with lock.open("a+") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while not _is_taken(file, lock):
            if time.monotonic() > deadline:
                file.seek(0)
                holder = file.read(40).strip() or "another process"
                raise TimeoutError(f"{holder} held {lock} for more than {LOCK_SECONDS:g} s")
            time.sleep(_LOOK_SECONDS)
        file.truncate(0)
        file.write(f"process {os.getpid()}")
        file.flush()
        yield


def _is_taken(file: TextIO, lock: Path) -> bool:
    """Whether the lock is ours now; StoreError where its file system knows no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        raise StoreError(
            f"{lock} cannot be locked ({error.strerror}); set tracking.uri to a server, or to "
            "sqlite:/// and a path on a local disk"
        ) from None
    return True


def artifact_location(store_root: Path) -> str:
    """Where runs of the embedded store keep plots and reports."""
    return (store_root / _ARTIFACTS).as_uri()


def move_in(uri: str, store_root: Path) -> None:
    """Point the runs of an embedded store that was moved or copied to where their files lie now.

    MLflow writes absolute addresses only: in a copy they would lead to the original, and new plots
    would be written there.
    """
    path = sqlite_path(uri)
    if path is None or not path.is_file() or not path.is_relative_to(store_root):
        return
    here = artifact_location(store_root)
    with closing(sqlite3.connect(path, timeout=30)) as database, database:
        found = {row[0] for row in database.execute("SELECT name FROM sqlite_master")}
        if "experiments" not in found:
            return
        rows = database.execute("SELECT DISTINCT artifact_location FROM experiments").fetchall()
        for (there,) in rows:
            if there is None or there == here or not there.endswith(f"/{_ARTIFACTS}"):
                continue
            for table, column in _LOCATIONS:
                if table in found:
                    database.execute(
                        f"UPDATE {table} SET {column} = ? || substr({column}, ?) "
                        f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                        (here, len(there) + 1, there, len(there) + 1, f"{there}/"),
                    )
            if "model_versions" in found:
                # Its words say where the files of a bundle lie.
                old = unquote(urlsplit(there).path).removesuffix(f"/{_ARTIFACTS}")
                database.execute(
                    "UPDATE model_versions SET description = replace(description, ?, ?)",
                    (f"{old}/", f"{store_root}/"),
                )


def set_environment(config: TrackingConfig) -> None:
    """Bound every call, whose own defaults would retry for minutes, and keep libraries quiet."""
    os.environ["MLFLOW_HTTP_REQUEST_MAX_RETRIES"] = "1"
    os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = str(math.ceil(config.timeout_seconds))
    # What MLflow itself would print of each run that ends stands in our own last lines.
    os.environ["MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT"] = "true"
    # It would make every run that is opened the one it names.
    os.environ.pop("MLFLOW_RUN_ID", None)
    # Each retry, each table made, and a home that holds no cache would otherwise be lines of their
    # own.
    for library in ("urllib3.connectionpool", "mlflow", "alembic", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)


def serve(uri: str, store_root: Path, port: int, *, ready: str) -> int:
    """Serve the embedded store on 127.0.0.1 until it is stopped; returns the server's exit code.

    Prints `ready` once the server answers.
    """
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--workers", "1"]
    command += ["--artifacts-destination", artifact_location(store_root)]
    environment = {
        **os.environ,
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # Not on the command line, which everybody on the machine may read: it may hold a password.
        "MLFLOW_BACKEND_STORE_URI": uri,
        "MLFLOW_REGISTRY_STORE_URI": uri,
        # What its libraries say to their developers.
        "PYTHONWARNINGS": "ignore::DeprecationWarning",
    }
    # However this process is politely ended, the server ends with it.
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)
    # Not from the user's folder, whose modules could shadow those of the server.
    server = subprocess.Popen(command, env=environment, cwd=store_root)
    try:
        if _answers(port, server):
            print(ready, flush=True)
        else:
            print(f"MLflow does not answer on 127.0.0.1:{port} yet; {ready}", flush=True)
        return server.wait()
    except KeyboardInterrupt:
        server.terminate()
        server.wait(10)
        return 0


def _answers(port: int, server: "subprocess.Popen[bytes]") -> bool:
    """Wait until the server answers; false if it ended, or took too long."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError), urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            if answer.status == HTTPStatus.OK:
                return True
        time.sleep(_LOOK_SECONDS)
    return False

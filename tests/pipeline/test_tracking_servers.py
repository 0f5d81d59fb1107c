"""A tracking server behaves as the embedded file does, and may be started anew in the middle."""

import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest
from mlflow.tracking import MlflowClient

from configs.parallel import ClusterConfig, StoreConfig, TrackingConfig
from configs.reading import load_recipe
from pipeline.graph import Selection, make_graph
from pipeline.landing import ORDER, OUTCOME
from pipeline.runner import Setting, realise
from pipeline.states import Examiner
from pipeline.tracking.listener import Tracking
from pipeline.tracking.runs import Told
from stages.artifacts import Checkpoint, Corpus
from stages.contract import Workspace, stage
from tests.pipeline.fakes import RECIPE, FakeConfig, World, gather, train
from tests.pipeline.test_tracking import tracked

pytestmark = [
    pytest.mark.slow,
    # MLflow's own use of SQLAlchemy and of protobuf is behind their deprecations.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
_START_SECONDS = 120.0
_POSTGRES = shutil.which("postgres") or next(
    iter(sorted(map(str, Path("/usr/lib/postgresql").glob("*/bin/postgres")))), None
)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class MlflowServer:
    """`mlflow server` on a database, which can be ended and started anew on its port."""

    def __init__(self, backend: str, folder: Path) -> None:
        self._backend, self._folder, self._port = backend, folder, free_port()
        self.uri = f"http://127.0.0.1:{self._port}"
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1"]
        command += ["--port", str(self._port), "--workers", "1"]
        command += ["--backend-store-uri", self._backend]
        command += ["--artifacts-destination", str(self._folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        with (self._folder / "server.log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=log, env=environment
            )
        deadline = time.monotonic() + _START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urlopen(f"{self.uri}/health", timeout=5) as answer:
                    if answer.status == 200:
                        return
            except OSError:
                time.sleep(0.2)
        raise TimeoutError((self._folder / "server.log").read_text())

    def stop(self) -> None:
        assert self._process is not None
        self._process.terminate()
        self._process.wait(30)


@contextmanager
def postgresql(folder: Path) -> Iterator[str]:
    """A PostgreSQL of our own, on loopback, run by an ordinary user."""
    if _POSTGRES is None:
        pytest.skip("PostgreSQL is not installed (Debian: postgresql)")
    pytest.importorskip("psycopg2", reason="pip install 'ingot[postgresql]'")
    user = None
    if os.geteuid() == 0:
        # It refuses to be run by root.
        user = next((n for n in ("postgres", "nobody") if n in _users()), None)
        folder.chmod(0o777)
        for parent in folder.parents:
            if parent.owner() == "root" and parent != Path("/") and not parent.stat().st_mode & 1:
                parent.chmod(parent.stat().st_mode | 0o011)
    data, port, bin_ = folder / "pg", free_port(), Path(_POSTGRES).parent
    if user is not None:
        data.mkdir()
        shutil.chown(data, user)
    make = [bin_ / "initdb", "-D", data, "-A", "trust", "-U", "ingot", "--no-sync"]
    subprocess.run(list(map(str, make)), check=True, capture_output=True, user=user, timeout=120)
    serve = [_POSTGRES, "-D", str(data), "-p", str(port), "-h", "127.0.0.1", "-k", "", "-F"]
    with (folder / "pg.log").open("wb") as log:
        process = subprocess.Popen(serve, stdout=log, stderr=log, user=user)
    try:
        _await_port(port)
        yield f"postgresql+psycopg2://ingot@127.0.0.1:{port}/postgres"
    finally:
        # Whoever is connected still is not waited for.
        process.send_signal(signal.SIGINT)
        process.wait(30)


def _users() -> set[str]:
    return {one.pw_name for one in pwd.getpwall()}


def _await_port(port: int) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(0.5)
                return
        time.sleep(0.1)
    raise TimeoutError(f"nobody listens on port {port}")


@stage(revision=1)
def interrupted(config: FakeConfig, work: Workspace, *, corpus: Corpus) -> Checkpoint:
    """A training in the middle of which the server goes away and comes back."""
    for step in range(1, 41):
        work.tracker.log({"loss": 1 / step}, step=step)
        if step == 20:
            # So that some steps have been sent, and the next find nobody.
            time.sleep(3)
            SERVERS[0].stop()
        if step == 30:
            time.sleep(3)
            SERVERS[0].start()
    return train.run(config, work, corpus=corpus)


SERVERS: list[MlflowServer] = []


@pytest.fixture(params=["sqlite", "postgresql"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path}/server.db"
        return
    with postgresql(tmp_path) as uri:
        yield uri


@pytest.fixture
def server(backend: str, tmp_path: Path) -> Iterator[MlflowServer]:
    one = MlflowServer(backend, tmp_path)
    one.start()
    SERVERS[:] = [one]
    yield one
    one.stop()


@pytest.mark.timeout(600)
def test_no_step_is_lost_or_doubled_when_the_server_starts_anew(
    server: MlflowServer,
    store_config: StoreConfig,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("pipeline.background.RETRY_SECONDS", 2.0)
    world = World(store_config)
    corpus = gather(FakeConfig())
    line = {"data": corpus, "train": interrupted(FakeConfig(), corpus=corpus)}
    graph = make_graph(line, world.store.hashes)
    config = TrackingConfig(uri=server.uri, timeout_seconds=10)
    recipe = load_recipe("smoke").model_copy(update={"tracking": config, "name": RECIPE})
    run, store = world.begin(), world.store
    store.prepare()
    told = Told(recipe, run, list(graph.nodes), "ingot run \0", {"a.b": ("1", "\0")})
    tracking = Tracking(told, store_root=store.root, records=store.records, say=world.said.append)
    setting = Setting(store, Examiner(store, RECIPE), ClusterConfig(), [tracking])
    run = tracking.finish(realise(graph, Selection(), setting, run), None)
    assert run.succeeded
    client = MlflowClient(server.uri, registry_uri=server.uri)
    experiment = client.get_run(str(run.tracking_id)).info.experiment_id
    found = client.search_runs([experiment], order_by=[f"tags.`{ORDER}` ASC"])
    assert [one.data.tags[OUTCOME] for one in found] == ["succeeded", "built", "built"]
    assert {one.info.status for one in found} == {"FINISHED"}
    history = client.get_metric_history(found[2].info.run_id, "curves/loss")
    assert [(one.step, one.value) for one in history] == [(k, 1 / k) for k in range(1, 41)]
    assert {one.path for one in client.list_artifacts(found[2].info.run_id)} >= {"manifest.json"}
    # The one warning is of the outage; MLflow's own lines would be among ours.
    assert len(world.said) == 1
    assert "View run" not in capfd.readouterr().out


def test_a_database_needs_no_server(tmp_path: Path, store_config: StoreConfig) -> None:
    with postgresql(tmp_path) as uri:
        world = World(store_config)
        run, _ = tracked(world, TrackingConfig(uri=uri, timeout_seconds=30))
        assert world.said == []
        info = MlflowClient(uri, registry_uri=uri).get_run(str(run.tracking_id)).info
        assert info.status == "FINISHED"
        # In the store, and not in whatever folder the run was started in.
        assert info.artifact_uri.startswith(world.store.root.as_uri())


@pytest.mark.timeout(900)
def test_sixteen_first_runs_beside_four_busy_loops_are_sixteen_records(tmp_path: Path) -> None:
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(4)]
    try:
        for number in range(16):
            store = tmp_path / str(number)
            done = subprocess.run(
                [sys.executable, "-m", "tests.pipeline.first_run", str(store)],
                capture_output=True,
                text=True,
                timeout=300,
                check=True,
            )
            assert done.stdout.split() == ["FINISHED"] * 6, (number, done.stdout, done.stderr)
    finally:
        for one in busy:
            one.kill()
            one.wait()

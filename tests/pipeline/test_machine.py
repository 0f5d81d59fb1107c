"""What of the user's machine would stop a run is told before anything is built."""

import errno
import fcntl
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from configs.errors import MachineError, StoreError
from configs.parallel import ClusterConfig, StoreConfig, TrackingConfig
from configs.reading import load_recipe
from configs.recipe import Recipe
from pipeline import cli
from pipeline.graph import Selection
from pipeline.machine import Finding, require_machine, surroundings
from pipeline.places import sqlite_uri, tracking_uri
from pipeline.runner import Setting, realise
from pipeline.states import Examiner
from pipeline.tracking.listener import Tracking
from pipeline.tracking.runs import Told
from pipeline.tracking.server import Server, open_server
from pipeline.verbs import asked
from pipeline.verbs.doctor import examine
from stages.contract import Planned
from tests.pipeline.fakes import RECIPE, World, made, make_line

LONG = "/" + "x" * 60
# MLflow's own use of SQLAlchemy is behind its deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def found(database: Path | None = None, **environ: str) -> dict[str, Finding]:
    """What is found with these variables set and no others."""
    return {one.what: one for one in surroundings(ClusterConfig(), database, environ)}


def test_a_machine_with_nothing_unusual_lacks_nothing(tmp_path: Path) -> None:
    usual = found(tmp_path / "store" / "mlflow.db", HOME=str(tmp_path))
    assert len(usual) == 6
    assert all(one.fix is None for one in usual.values())
    assert list(tmp_path.iterdir()) == []


def test_what_is_lacking_comes_with_a_remedy(tmp_path: Path) -> None:
    address = found(RAY_ADDRESS="1.2.3.4:5")["RAY_ADDRESS"]
    assert (address.needed, address.fix) == (
        False,
        "cluster.address = '1.2.3.4:5' joins that cluster",
    )
    folder = found(TMPDIR=LONG)["Ray's folder"]
    assert (folder.needed, folder.fix) == (False, "RAY_TMPDIR names another short folder")
    assert folder.seen.startswith("/tmp, for TMPDIR is too long")
    both = found(TMPDIR=LONG, RAY_TMPDIR="/r")["Ray's folder"]
    assert (both.seen.partition(",")[0], both.fix) == ("/r", None)
    assert found(RAY_TMPDIR=LONG)["Ray's folder"].needed
    assert found(RAY_AUTH_TOKEN_PATH="/nowhere")["Ray's token"].fix is not None
    for homeless in (found(), found(HOME="/proc/nowhere")):
        assert "nothing of a run needs it" in homeless["HOME"].seen


def test_a_file_system_without_locks_is_told_of_where_mlflows_file_is_to_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*asked: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)
    locks = found(tmp_path / "store" / "mlflow.db")["file locks"]
    assert locks.seen.startswith(f"{tmp_path} is on a file system without them (No locks avail")
    assert locks.fix is not None
    assert "tracking.uri" in locks.fix
    assert not locks.needed
    assert "file locks" not in found()
    uri = sqlite_uri(tmp_path / "mlflow.db")
    with pytest.raises(StoreError, match=r"mlflow\.db\.lock cannot be locked.*tracking\.uri"):
        open_server(Server(TrackingConfig(), uri, tmp_path, print))
    (tmp_path / "mlflow.db.lock").unlink()
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_addresses_spell_otherwise_holds_a_run_and_all_that_mlflow_shows_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")  # What tracking sets must not outlive the test.
    root = tmp_path / "a b?c#d%41"
    world = World(StoreConfig(url=str(root), min_free_bytes=0))
    recipe = load_recipe("smoke").model_copy(update={"name": RECIPE})
    run = world.begin()
    world.store.prepare()
    graph = world.graph()
    asked_for = Told(recipe, run, list(graph.nodes), "ingot run")
    tracking = Tracking(
        asked_for, store_root=root, records=world.store.records, say=world.said.append
    )
    setting = Setting(world.store, Examiner(world.store, RECIPE), ClusterConfig(), [tracking])
    run = tracking.finish(realise(graph, Selection(), setting, run), None)
    assert world.said == []
    client = MlflowClient(tracking_uri=tracking_uri(recipe.tracking, root))
    shown = client.download_artifacts(str(made(run, "judge").tracking_id), "report.json")
    assert "headline" in Path(shown).read_text()
    assert list(root.glob("mlflow-artifacts/*/artifacts/report.json"))
    # All that lies beside it is what was told of.
    told = found(root / "mlflow.db")["store's path"]
    beside = [path for path in tmp_path.iterdir() if path != root]
    assert [f"empty folder {path}" in told.seen for path in beside] == [True]
    assert [path for one in beside for path in one.rglob("*")] == []
    assert told.fix is not None


def test_a_run_ends_at_what_it_needs_and_tells_of_what_it_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[str] = []
    monkeypatch.setenv("RAY_ADDRESS", "1.2.3.4:5")
    require_machine(ClusterConfig(), None, said.append)
    (one,) = [line for line in said if line.startswith("RAY_ADDRESS")]
    assert one.startswith("RAY_ADDRESS: 1.2.3.4:5 is ignored: ")
    monkeypatch.setenv("RAY_TMPDIR", LONG)
    with pytest.raises(
        MachineError, match=r"^Ray's folder: RAY_TMPDIR = /x+ has 61 bytes, .*; set"
    ):
        require_machine(ClusterConfig(), None, said.append)


def test_it_is_told_before_anything_is_built_and_only_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fake(recipe: Recipe) -> dict[str, Planned[Any]]:
        return make_line()

    words = ("run", "smoke", "@over.toml")
    monkeypatch.setattr(asked, "production", fake)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "over.toml").write_text('[tracking]\nuri = "http://127.0.0.1:9"\n')
    with monkeypatch.context() as patch:
        patch.setenv("RAY_TMPDIR", LONG)
        assert cli.main(words) == 1
        assert "ingot: error: Ray's folder: RAY_TMPDIR = " in capsys.readouterr().err
        assert list(tmp_path.glob(".ingot/artifacts/*")) == []
        assert cli.main(["plan", "smoke"]) == 0
    assert cli.main(words) == 0
    monkeypatch.setenv("RAY_TMPDIR", LONG)
    assert cli.main(words) == 0  # All is there.


def test_doctor_shows_all_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", LONG)
    shown = {one.what: one for one in examine()}
    assert set(found()) | {"file locks"} <= set(shown)
    assert shown["Ray's folder"].needed

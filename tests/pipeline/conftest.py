"""What tests of the command line and of MLflow share."""

import pickle
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from configs.recipe import Recipe
from pipeline import page, report
from pipeline.verbs import asked
from stages.contract import Planned
from stages.plots import PLOTS
from tests.pipeline.fakes import make_line


@pytest.fixture
def fake_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's folder, and the fake line in place of the real one.

    `pretrain.steps` of the recipe is the steps of the fake `train`; 13 of them fail.
    """

    def fake(recipe: Recipe) -> dict[str, Planned[Any]]:
        steps = recipe.pretraining["pretrain"].steps
        return make_line(train={"steps": steps, "fails": steps == 13})

    monkeypatch.setattr(asked, "production", fake)
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
    return tmp_path


Drawing = Callable[[Any, Path], list[Path]]


def once_each(draw: Drawing, key_of: Callable[[Any], bytes]) -> Drawing:
    """`draw`, which draws the pictures of what it has drawn before by copying them."""
    known: dict[bytes, list[tuple[str, bytes]]] = {}

    def drawn(given: Any, folder: Path) -> list[Path]:
        key = key_of(given)
        if key not in known:
            made = draw(given, folder)
            known[key] = [(path.name, path.read_bytes()) for path in made]
            return made
        folder.mkdir(parents=True, exist_ok=True)
        for name, picture in known[key]:
            (folder / name).write_bytes(picture)
        return [folder / name for name, _ in known[key]]

    return drawn


def _plots_of(folder: Path) -> bytes:
    path = folder / PLOTS
    return path.read_bytes() if path.is_file() else b""


_plot_log = once_each(report.plot_log, pickle.dumps)
_plot_artifact = once_each(report.plot_artifact, _plots_of)


@pytest.fixture(autouse=True)
def _draws_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two thirds of a run of the fake line are pictures of the same few logs."""
    for module in (report, page):
        monkeypatch.setattr(module, "plot_log", _plot_log)
        monkeypatch.setattr(module, "plot_artifact", _plot_artifact)


@pytest.fixture
def mlflow_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What tracking sets for the process must not outlive the test."""
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables without a row of ours: making them anew takes each test a second or two."""
    path = tmp_path_factory.mktemp("empty") / "mlflow.db"
    uri = f"sqlite:///{path}"
    MlflowClient(uri, registry_uri=uri).search_experiments(max_results=1)
    return path

"""What tests of the command line and of MLflow share."""

import signal
from pathlib import Path
from typing import Any

import pytest
from mlflow.tracking import MlflowClient

from configs.recipe import Recipe
from pipeline.verbs import asked
from stages.contract import Planned
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

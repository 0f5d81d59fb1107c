"""The MLflow store and our experiment in it, opened on first use."""

import os
from collections.abc import Callable
from http import HTTPStatus
from pathlib import Path

import mlflow
from mlflow.entities import LifecycleStage
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE
from requests import RequestException

from configs.errors import ArtifactError, IngotError, MachineError
from configs.masking import masked
from configs.parallel import TrackingConfig
from pipeline.embedded import artifact_location, move_in, schema_lock
from pipeline.landing import EXPERIMENT_NOTE
from pipeline.places import URI_VARIABLE, sqlite_path

REGISTRY_VARIABLE = "MLFLOW_REGISTRY_URI"

_DAMAGED = ("malformed", "not a database", "file is encrypted")
"""What SQLite says of a file that will not be better next time."""
_REFUSALS = {HTTPStatus.BAD_REQUEST, HTTPStatus.NOT_FOUND, HTTPStatus.CONFLICT}


class Server:
    """A client of one tracking address, and the experiment that runs are recorded in."""

    def __init__(
        self, config: TrackingConfig, uri: str, store_root: Path, say: Callable[[str], None]
    ) -> None:
        """Nothing is opened yet; `say` is told what the user should know."""
        self._config, self._root, self._say = config, store_root, say
        self._client: MlflowClient | None = None
        self.uri = uri
        self.experiment_id = "0"

    @property
    def is_embedded(self) -> bool:
        """Whether this process opens the database itself, and keeps plots and reports beside."""
        return not self.uri.startswith("http")

    @property
    def is_open(self) -> bool:
        """Whether it has answered before."""
        return self._client is not None

    def client(self) -> MlflowClient:
        """The client, once its experiment is there."""
        if self._client is None:
            _tell_mlflow(self.uri)
            with schema_lock(self.uri):
                move_in(self.uri, self._root)
                client = MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
                self.experiment_id = self._experiment(client)
            self._client = client
        return self._client

    def _experiment(self, client: MlflowClient) -> str:
        name = self._config.experiment
        found = client.get_experiment_by_name(name)
        if found is None:
            location = artifact_location(self._root) if self.is_embedded else None
            try:
                made = str(client.create_experiment(name, artifact_location=location))
            except MlflowException as error:
                found = client.get_experiment_by_name(name)
                if error.error_code != "RESOURCE_ALREADY_EXISTS" or found is None:
                    raise
                return str(found.experiment_id)
            client.set_experiment_tag(made, MLFLOW_RUN_NOTE, EXPERIMENT_NOTE)
            return made
        if found.lifecycle_stage == LifecycleStage.DELETED:
            # No other may bear its name, and in a deleted one nothing can be recorded.
            client.restore_experiment(found.experiment_id)
            self._say(
                f"MLflow's experiment {name!r} was deleted; it is restored with its runs, since "
                "this run is recorded there. tracking.experiment names another"
            )
        return str(found.experiment_id)


def _tell_mlflow(uri: str) -> None:
    """Have its own functions go to `uri`, and leave the variables that name it to the user."""
    asked = {name: os.environ.get(name) for name in (URI_VARIABLE, REGISTRY_VARIABLE)}
    mlflow.set_tracking_uri(uri)
    # Where the runs are: an address of ours in another server's registry would lead nowhere.
    mlflow.set_registry_uri(uri)
    for name, value in asked.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


def is_ours(error: Exception) -> bool:
    """Whether an error is of one thing that we asked, so that others may well be answered."""
    if isinstance(error, MlflowException):
        return error.get_http_status_code() in _REFUSALS
    # Those of requests are values too.
    faults = (ArtifactError, ValueError, TypeError, LookupError, AttributeError)
    return isinstance(error, faults) and not isinstance(error, RequestException)


def open_server(server: Server) -> None:
    """Create or migrate the store, and make the experiment.

    MachineError if it cannot be read, StoreError if it cannot be locked.
    """
    try:
        server.client()
    except IngotError:
        raise
    except Exception as error:  # whatever SQLAlchemy or MLflow makes of a file that is no store
        why = (str(error).splitlines() or [""])[0]
        path = sqlite_path(server.uri)
        if "out-of-date database schema" in str(error):
            fix = f"save a copy of it, then run: mlflow db upgrade '{masked(server.uri)}'"
        elif path is not None and any(one in str(error) for one in _DAMAGED):
            fix = f"move {path} away, and a new one is made; artifacts do not depend on it"
        elif path is not None:
            fix = f"see that {path} can be written, that its disk has room, and that no other "
            fix += "process holds it"
        else:
            fix = "see that the server runs and that tracking.uri names it"
        raise MachineError(
            f"tracking.uri = {masked(server.uri)}: MLflow cannot open it "
            f"({type(error).__name__}: {masked(why)[:300]}); {fix}"
        ) from None

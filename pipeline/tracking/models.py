"""Models in MLflow: each checkpoint and bundle by reference, and versions of those delivered."""

import importlib.metadata
import json
import shutil
import tempfile
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import mlflow
from mlflow.entities import LoggedModelOutput
from mlflow.exceptions import MlflowException
from mlflow.models import Model, ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema

from configs.masking import masked
from pipeline import described
from pipeline.graph import Node
from pipeline.landing import plain_name
from pipeline.plain import KEY_CHARS, flatten
from pipeline.store import Committed
from pipeline.tracking.server import Server

MOST_BYTES = 100_000_000
"""A model up to this is copied to MLflow, so that whoever reaches it there can load it."""
ARTIFACT_TAG, CONTENT_TAG = "ingot.artifact", "ingot.content"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_TOKENS = 256
"""As long as transformers lets an answer become if nobody says otherwise."""
_TRANSFORMERS = "5.23.0"
"""What the files were compared with, where it is not installed."""


class Models:
    """Logged models and registered versions of one run. Called on the background thread."""

    def __init__(self, server: Server, prefix: str, recipe: str) -> None:
        """Versions are registered under `prefix-recipe`."""
        self._server = server
        self.name = plain_name(f"{prefix}-{recipe}")
        self._models: dict[str, str] = {}
        self._versions: dict[str, str] = {}
        self.aliases: list[str] = []
        """Addresses of what was registered, or registered again."""

    def show(self, node: Node, run_id: str, made: Committed) -> None:
        """A logged model that the node's run put out."""
        if made.artifact.is_model:
            output = LoggedModelOutput(self._model_id(node, run_id, made), step=0)
            self._server.client().log_outputs(run_id, [output])

    def register(self, node: Node, run_id: str, made: Committed, pages: Mapping[str, str]) -> None:
        """Have the artifact's alias point to its version, which is made if there is none."""
        alias = made.artifact.alias()
        if alias is None:
            return
        if node.seed is not None:
            alias = f"{alias}-seed-{node.seed}"
        client = self._server.client()
        if node.name not in self._versions:
            self._versions[node.name] = self._known_version(made) or self._new_version(
                node, run_id, made, alias, pages
            )
        client.set_registered_model_alias(self.name, alias, self._versions[node.name])
        self.aliases.append(f"models:/{self.name}@{alias}")

    def _known_version(self, made: Committed) -> str | None:
        """The latest version that is of this artifact."""
        found = self._server.client().search_model_versions(f"name = '{self.name}'")
        same = [one for one in found if one.tags.get(CONTENT_TAG) == made.manifest.content]
        same = [one for one in same if one.tags.get(ARTIFACT_TAG) == made.address]
        return max((str(one.version) for one in same), key=int, default=None)

    def _new_version(
        self, node: Node, run_id: str, made: Committed, alias: str, pages: Mapping[str, str]
    ) -> str:
        made.bring()
        client, model_id = self._server.client(), self._model_id(node, run_id, made)
        try:
            client.create_registered_model(self.name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        version = client.create_model_version(
            self.name,
            f"models:/{model_id}",
            run_id=run_id,
            tags={ARTIFACT_TAG: made.address, CONTENT_TAG: made.manifest.content},
            await_creation_for=0,
            model_id=model_id,
        )
        words = described.version(
            f"models:/{self.name}/{version.version}",
            alias,
            tracking=masked(self._server.uri),
            folder=str(made.artifact.path()),
            pages=pages,
            not_copied=_not_copied(made),
        )
        client.update_model_version(self.name, version.version, words)
        return str(version.version)

    def _model_id(self, node: Node, run_id: str, made: Committed) -> str:
        if node.name not in self._models:
            facts = flatten(made.artifact.facts())
            name, kind = node.name.replace(".", "-"), made.artifact.kind
            params = {key: value[:KEY_CHARS] for key, value in islice(facts.items(), 100)}
            tags = {ARTIFACT_TAG: made.address, CONTENT_TAG: made.manifest.content}
            if made.artifact.alias() is None or _not_copied(made) is not None:
                model = mlflow.create_external_model(
                    name=name,
                    source_run_id=run_id,
                    params=params,
                    tags=tags,
                    model_type=kind,
                    experiment_id=self._server.experiment_id,
                )
            else:
                model = self._copied(name, kind, run_id, made, params, tags)
            self._models[node.name] = str(model.model_id)
        return self._models[node.name]

    def _copied(
        self,
        name: str,
        kind: str,
        run_id: str,
        made: Committed,
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> "mlflow.entities.LoggedModel":
        """A logged model with the weights and the words by which `models:/` addresses load it."""
        client, weights = self._server.client(), made.artifact.weights()
        assert weights is not None
        model = client.create_logged_model(
            self._server.experiment_id,
            name=name,
            source_run_id=run_id,
            params=dict(params),
            tags=dict(tags),
            model_type=kind,
        )
        with tempfile.TemporaryDirectory() as folder:
            write_flavor(weights, Path(folder), model_id=str(model.model_id))
            client.log_model_artifacts(model.model_id, folder)
        client.finalize_logged_model(model.model_id, "READY")
        return model


def _not_copied(made: Committed) -> str | None:
    """Why its weights stay where they are; none if they are small, and a model with a tokenizer."""
    weights = made.artifact.weights()
    if weights is None:
        return "it has no plain weights"
    for name in ("config.json", "tokenizer.json"):
        if not (weights / name).is_file():
            return f"it has no {name}"
    size = sum(path.stat().st_size for path in weights.rglob("*") if path.is_file())
    return "it is too large to be copied here" if size > MOST_BYTES else None


def write_flavor(weights: Path, folder: Path, *, model_id: str | None = None) -> None:
    """Write the folder of a model that MLflow loads with transformers, from files in its layout.

    MLflow's own way would load the weights in this process and save them anew, without what
    transformers has no use for; here they are copied as they are.
    """
    config = json.loads((weights / "config.json").read_text())
    for place, wanted in (("model", None), ("components/tokenizer", _TOKENIZER_FILES)):
        target = folder / place
        target.mkdir(parents=True)
        for path in sorted(weights.iterdir()):
            if path.is_file() and (wanted is None or path.name in wanted):
                shutil.copyfile(path, target / path.name)
    version = _installed("transformers") or _TRANSFORMERS
    needs = [f"transformers=={version}", f"torch=={(_installed('torch') or '').partition('+')[0]}"]
    (folder / "requirements.txt").write_text("\n".join([*needs, "accelerate"]) + "\n")
    text = Schema([ColSpec(DataType.string)])
    signature = ModelSignature(inputs=text, outputs=text, params=_parameters(weights))
    model = Model(model_id=model_id, signature=signature)
    model.add_flavor(
        "transformers",
        task="text-generation",
        instance_type="TextGenerationPipeline",
        pipeline_model_type=config["architectures"][0],
        model_binary="model",
        torch_dtype=f"torch.{config.get('dtype') or config.get('torch_dtype') or 'bfloat16'}",
        components=["tokenizer"],
        tokenizer_type="PreTrainedTokenizerFast",
        transformers_version=version,
        code=None,
    )
    model.add_flavor("python_function", loader_module="mlflow.transformers", env={})
    model.save(str(folder / "MLmodel"))


def _parameters(weights: Path) -> ParamSchema:
    """What a call may say beside the prompt; what it leaves out is as the model's files have it."""
    path = weights / "generation_config.json"
    config = json.loads(path.read_text()) if path.is_file() else {}
    return ParamSchema(
        [
            ParamSpec("do_sample", DataType.boolean, bool(config.get("do_sample", False))),
            ParamSpec("max_new_tokens", DataType.long, int(config.get("max_new_tokens", _TOKENS))),
        ]
    )


def _installed(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None

"""What `config.json` describes: a model's config, by the table of its family. Loads no torch."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from configs.errors import ArtifactError
from configs.model import ModelConfig
from model.weights import v3, v4, v32
from model.weights.reading import read_json_file
from model.weights.table import Table

_TABLES: dict[str, Table] = {"v3": v3, "v32": v32, "v4": v4}


def table_of(config: ModelConfig) -> Table:
    """The table of the config's family."""
    return _TABLES[config.family]


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` as transformers and the readers of released files take it, float32."""
    return table_of(config).to_hf_config(config)


def from_hf_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The reverse; ArtifactError names the field that no family here has."""
    known = {table.MODEL_TYPE: table for table in _TABLES.values()}
    table = known.get(str(raw.get("model_type")))
    if table is None:
        raise ArtifactError(
            f"config.json: model_type = {raw.get('model_type')!r} is unknown; known: "
            f"{', '.join(known)}; take a model of one of these"
        )
    return table.from_hf_config(raw)


def read_config(folder: Path) -> ModelConfig:
    """The model config in `folder/config.json`."""
    with speaking_of(folder):
        return from_hf_config(read_json(folder))


def read_json(folder: Path) -> dict[str, Any]:
    """`folder/config.json` as it stands; ArtifactError if it is no table."""
    path = folder / "config.json"
    if not path.is_file():
        raise ArtifactError(
            f"{path}: no such file, so {folder} is not a model folder; name one that holds "
            "config.json and safetensors"
        )
    raw = read_json_file(path)
    if not isinstance(raw, dict):
        raise ArtifactError(
            f"{path}: holds a {type(raw).__name__}, expected a table; take the config.json that "
            "belongs to the weights"
        )
    return raw


def quantized_fields(scheme: dict[str, Any]) -> dict[str, Any]:
    """The fields of `config.json` that announce the FP8 of `scheme`.

    transformers reads the type of V4's experts in the scheme, servers beside it, where they take
    FP4 for meant if it is missing.
    """
    beside = {name: scheme[name] for name in ("expert_dtype",) if name in scheme}
    return {"quantization_config": scheme, **beside}


@contextmanager
def speaking_of(folder: Path) -> Iterator[None]:
    """Errors also name the folder, which whoever meets a tensor or a field does not know."""
    try:
        yield
    except ArtifactError as error:
        if str(folder) in str(error):
            raise
        raise ArtifactError(f"{folder}: {error}") from error

"""The face of the import stage: a Hugging Face folder in, a checkpoint of the line's own out."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.imports import ImportSpec
from configs.model import ModelConfig
from model.weights.config import read_config
from model.weights.reading import INDEX, SUFFIX
from stages.artifacts import Checkpoint
from stages.contract import Face
from stages.hashing import Hashes
from stages.names import BROUGHT_FILES, CONFIG, TOKENIZER


def read_base(folder: Path) -> ModelConfig:
    """The config of the model in `folder`; errors as of `reads`, ArtifactError if it is wrong."""
    list(_files(folder))
    return read_config(folder)


def reads(config: ImportSpec, hashes: Hashes) -> Mapping[str, Any]:
    """The folder's files by content; ConfigError if there is no folder or one cannot be read."""
    folder = Path(config.folder)
    try:
        return {name: hashes.of(str(folder / name)).model_dump() for name in _files(folder)}
    except OSError as error:
        raise ConfigError(
            f"base = {config.folder!r}: {error.filename} cannot be read ({error.strerror}); make "
            "it readable"
        ) from None


def _files(folder: Path) -> Iterator[str]:
    """Names of the files that make the model."""
    if not folder.is_dir():
        raise ConfigError(
            f"base = {str(folder)!r}: no such folder; name one that holds {CONFIG}, safetensors "
            f"and {TOKENIZER}"
        )
    for name in (CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise ConfigError(
                f"base = {str(folder)!r}: holds no {name}; put the one that belongs to the model "
                "there"
            )
    yield from (CONFIG, TOKENIZER)
    if (folder / INDEX).is_file():
        yield INDEX
    for name in BROUGHT_FILES:
        if (folder / name).is_dir():
            yield from sorted(f"{name}/{path.name}" for path in (folder / name).glob("*.jinja"))
        elif (folder / name).is_file():
            yield name
    yield from sorted(path.name for path in folder.glob(f"*{SUFFIX}"))


imported = Face(
    name="imported",
    revision=3,
    config=ImportSpec,
    makes=Checkpoint,
    reads=reads,
    body="stages.imported.loop:imported",
    known_as="stages.imported:imported",
)

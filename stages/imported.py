"""The stage `imported`: a Hugging Face folder in, a checkpoint of the line's own form out.

Weights in any type that `model.weights` reads become float32; a model that is too large for memory
passes through it tensor by tensor.
"""

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from configs.errors import ArtifactError, ConfigError
from configs.imports import ImportSpec
from configs.model import ModelConfig
from model.weights.files import consolidate, read_config, read_json
from model.weights.stored import INDEX
from stages.artifacts import Checkpoint, FileEntry, hash_file
from stages.contract import Workspace, stage
from stages.shards import BOS_ID, EOS_ID
from stages.tokens import read_tokenizer, vocabulary_size

TOKENIZER = "tokenizer.json"
_CONFIG = "config.json"
_FRAMES = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}


def reads(config: ImportSpec) -> Mapping[str, Any]:
    """The folder's files by content; ConfigError if there is no folder or it lacks one."""
    return {
        name: FileEntry(
            bytes=Path(config.folder, name).stat().st_size, sha256=hash_file(config.folder, name)
        ).model_dump()
        for name in _files(Path(config.folder))
    }


def read_base(folder: Path) -> ModelConfig:
    """The config of the model in `folder`; errors as of `reads`, ArtifactError if it is wrong."""
    list(_files(folder))
    return read_config(folder)


@stage(revision=1, reads=reads)
def imported(config: ImportSpec, work: Workspace) -> Checkpoint:
    """Read the folder whole and write it as pretraining would have.

    ArtifactError names what is missing, damaged or not of a family that is known; ConfigError if
    its tokenizer does not frame documents as this line does.
    """
    folder = Path(config.folder)
    _check_frames(folder)
    work.tracker.note(f"reading {folder}")
    work.lease.check()
    model = consolidate(folder, work.path())
    tokens = vocabulary_size(read_tokenizer(folder / TOKENIZER))
    if tokens > model.vocab_size:
        raise ArtifactError(
            f"{folder / TOKENIZER} has {tokens} tokens, but vocab_size = {model.vocab_size} in its "
            f"{_CONFIG}; put the model's own tokenizer there"
        )
    work.lease.check()
    shutil.copyfile(folder / TOKENIZER, work.path(TOKENIZER))
    facts = {"step": 0, "sequences_seen": 0, "model": model.model_dump(), "final_loss": None}
    return Checkpoint.model_validate({"uri": work.out, **facts})


def _files(folder: Path) -> Iterator[str]:
    """Names of the files that make the model."""
    if not folder.is_dir():
        raise ConfigError(
            f"base = {str(folder)!r}: no such folder; name one that holds {_CONFIG}, safetensors "
            f"and {TOKENIZER}"
        )
    for name in (_CONFIG, TOKENIZER):
        if not (folder / name).is_file():
            raise ConfigError(
                f"base = {str(folder)!r}: holds no {name}; put the one that belongs to the model "
                "there"
            )
    yield from (_CONFIG, TOKENIZER)
    if (folder / INDEX).is_file():
        yield INDEX
    yield from sorted(path.name for path in folder.glob("*.safetensors"))


def _check_frames(folder: Path) -> None:
    """Documents begin and end with the tokens 0 and 1, here and in every released model."""
    raw = read_json(folder)
    for name, expected in _FRAMES.items():
        found = raw.get(name)
        if found is not None and found != expected:
            raise ConfigError(
                f"{folder / _CONFIG}: {name} = {found!r}, but documents are framed by tokens "
                f"{BOS_ID} and {EOS_ID} here; only models that do so can be imported"
            )

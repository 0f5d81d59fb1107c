"""Reading what a model's folder holds: whatever stands there in place of a file is named.

A folder that was cloned without git-lfs holds pointers, small texts that say which file belongs
there. One from before safetensors holds pickles, which can run code when they are loaded.
"""

import json
from pathlib import Path
from typing import Any

from configs.errors import ArtifactError

SUFFIX = ".safetensors"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
POINTER = b"version https://git-lfs.github.com/spec/"
"""Begins the small text that git-lfs leaves in place of a file that was not fetched."""
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_NO_WEIGHTS = ("training_args", "optimizer", "scheduler", "scaler", "rng_state")
"""Begin the names of what trainers leave beside weights."""
_CONVERT = (
    "pickled weights are never loaded, as they can run code; let transformers write safetensors: "
    "AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)"
)


def require_not_pointer(path: Path) -> None:
    """ArtifactError if the file at `path` is a pointer of git-lfs; its first bytes are read."""
    with path.open("rb") as file:
        begin = file.read(len(POINTER))
    if begin == POINTER:
        raise ArtifactError(
            f"{path}: a git-lfs pointer, not the file itself; run `git lfs pull` in {path.parent}"
        )


def require_safetensors(folder: Path, file: str) -> None:
    """ArtifactError if `file`, one of the folder's weights, is no safetensors file by its name."""
    if file.endswith(_PICKLED):
        raise ArtifactError(f"{folder / file}: {_CONVERT}")
    if not file.endswith(SUFFIX):
        raise ArtifactError(f"{folder / file}: no safetensors file by its name; take one that is")


def missing_weights(folder: Path, file: str) -> ArtifactError:
    """The error for a folder without safetensors: it names the pickle there, or else `file`."""
    pickled = [
        path.name
        for path in sorted(folder.iterdir(), key=lambda path: ("model" not in path.name, path.name))
        if path.name.endswith(_PICKLED) and not path.name.startswith(_NO_WEIGHTS)
    ]
    if pickled:
        return ArtifactError(f"{folder / pickled[0]}: the folder holds no safetensors; {_CONVERT}")
    return ArtifactError(
        f"{folder / file}: no such file, nor any other safetensors; complete the folder, or name "
        "the one that holds the weights"
    )


def read_json_file(path: Path) -> Any:
    """What a JSON file holds; ArtifactError if it holds none, or is a pointer of git-lfs.

    The mark that some editors put in front of UTF-8 is skipped.
    """
    require_not_pointer(path)
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise ArtifactError(
            f"{path}: not valid JSON: {error}; take a whole copy of the file, or mend it"
        ) from None

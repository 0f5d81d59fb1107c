"""The stage `imported`: a Hugging Face folder in, a checkpoint of the line's own form out.

Weights in any type that `model.weights` reads become float32; a model that is too large for memory
passes through it tensor by tensor. What the folder says of how the model is spoken to (chat
template, end tokens, sampling) goes with it; what it holds besides is named.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import ConfigError
from configs.imports import ImportSpec
from model.weights.config import read_config, read_json
from model.weights.files import consolidate
from model.weights.reading import INDEX, SUFFIX
from stages.artifacts import Checkpoint
from stages.contract import Workspace, fills
from stages.conventions import Brought, as_field, read_conventions, read_end_tokens, write_brought
from stages.framing import BOS_ID, EOS_ID
from stages.imported import face
from stages.names import BROUGHT_FILES, CONFIG, GENERATION_CONFIG, TOKENIZER
from stages.tokens import adopt_tokenizer, write_tokenizer

_FRAMES = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID}
_DOCUMENTS = ("README", "LICENSE", ".git", ".cache")
"""Begin the names of what accompanies a model for people, not for programs."""


@fills(face.imported)
def imported(config: ImportSpec, work: Workspace) -> Checkpoint:
    """Read the folder whole and write it as pretraining would have.

    ArtifactError names what is missing, damaged or not of a family that is known; ConfigError if
    its tokenizer does not frame documents as this line does. How the model is spoken to is read
    first: export needs it, hours later.
    """
    folder = Path(config.folder)
    _check_frames(folder)
    work.tracker.note(f"reading {folder}")
    work.lease.check()
    described = read_config(folder)
    adopted = adopt_tokenizer(folder / TOKENIZER, vocab_size=described.vocab_size)
    conventions = read_conventions(
        folder, adopted.tokenizer, max_tokens=described.max_position_embeddings
    )
    model = consolidate(folder, work.path())
    work.lease.check()
    write_tokenizer(work.path(TOKENIZER), adopted.record)
    brought = Brought(_carry(folder, work), tuple(_left(folder)), adopted.said)
    write_brought(work.path(), brought)
    for note in (*brought.notes(), *conventions.said):
        work.tracker.note(f"{folder}: {note}")
    facts = {"step": 0, "sequences_seen": 0, "model": model.model_dump(), "final_loss": None}
    return Checkpoint.model_validate({"uri": work.out, **facts})


def _carry(folder: Path, work: Workspace) -> tuple[str, ...]:
    """Copy what the model brought; the names. The config's end tokens are among it."""
    carried = []
    for name in BROUGHT_FILES:
        if (folder / name).is_dir():
            shutil.copytree(folder / name, work.path(name))
        elif (folder / name).is_file():
            shutil.copyfile(folder / name, work.path(name))
        else:
            continue
        carried.append(name)
    end_tokens = read_end_tokens(folder)
    generation: dict[str, Any] = {}
    if GENERATION_CONFIG in carried:
        generation = json.loads(work.path(GENERATION_CONFIG).read_text(encoding="utf-8-sig"))
    generation["eos_token_id"] = as_field(end_tokens)
    work.path(GENERATION_CONFIG).write_text(json.dumps(generation, indent=2) + "\n")
    return tuple(carried)


def _left(folder: Path) -> Iterator[str]:
    """Names in the folder that nothing here reads or carries."""
    known = {CONFIG, TOKENIZER, INDEX, *BROUGHT_FILES}
    for path in sorted(folder.iterdir()):
        is_known = path.name in known or path.name.startswith(_DOCUMENTS)
        if not is_known and path.suffix != SUFFIX:
            yield path.name
    if "auto_map" in read_json(folder):
        yield f"auto_map in {CONFIG}"


def _check_frames(folder: Path) -> None:
    """Documents begin and end with the tokens 0 and 1, here and in every released model."""
    raw = read_json(folder)
    for name, expected in _FRAMES.items():
        found = raw.get(name)
        ids = found if isinstance(found, list) else [found]
        if found is not None and expected not in ids:
            raise ConfigError(
                f"{folder / CONFIG}: {name} = {found!r}, but documents are framed by tokens "
                f"{BOS_ID} and {EOS_ID} here; only models that do so can be imported"
            )

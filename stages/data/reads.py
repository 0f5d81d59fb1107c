"""What the data stage reads from outside the line, by content: the user's files, and Python."""

import platform
from collections.abc import Mapping
from typing import Any

from configs.data import (
    DataSpec,
    EvaluationSet,
    FilesSource,
    ProblemsSource,
    Source,
    StdlibSource,
    TokenizerConfig,
)
from configs.errors import DataError
from stages.data.faults import EVALUATIONS, Globbed, HeldOutFiles, reading
from stages.data.finding import matches
from stages.hashing import Hashes
from stages.names import TOKENIZER


def reads(config: DataSpec, hashes: Hashes) -> Mapping[str, Any]:
    """What the corpus depends on besides its config: files by content, the Python version."""
    sources: dict[str, Source | EvaluationSet] = {**config.data.sources}
    sources |= {f"{EVALUATIONS}{name}": one for name, one in config.data.evaluations.items()}
    found = {name: identify(name, source, hashes) for name, source in sources.items()}
    known = {name: facts for name, facts in sorted(found.items()) if facts}
    return known | identify_tokenizer(config.data.tokenizer, hashes)


def identify(name: str, source: Source | EvaluationSet, hashes: Hashes) -> dict[str, Any]:
    """What makes two readings of this source equal, as JSON; empty where the config says it all.

    Files enter by relative name, bytes and sha256, those of problems below the setting that names
    them; the standard library by the Python version.
    """
    match source:
        case FilesSource() | EvaluationSet():
            return _identify_files(name, source, hashes)
        case ProblemsSource():
            found = {"glob": _identify_files(name, source, hashes)}
            if source.held_out_glob is not None:
                held_out = HeldOutFiles(source.held_out_glob)
                found["held_out_glob"] = _identify_files(name, held_out, hashes)
            return found
        case StdlibSource():
            return {"python": platform.python_version()}
        case _:
            return {}


def identify_tokenizer(config: TokenizerConfig, hashes: Hashes) -> dict[str, Any]:
    """The file to be taken, by content; nothing if the tokenizer is to be trained."""
    if config.file is None:
        return {}
    try:
        entry = hashes.of(config.file)
    except OSError as error:
        raise DataError(
            f"data.tokenizer.file = {config.file!r}: cannot be read ({error.strerror}); name "
            "another"
        ) from None
    # No source can bear this name: theirs have no dots.
    return {TOKENIZER: entry.model_dump()}


def _identify_files(name: str, source: Globbed, hashes: Hashes) -> dict[str, Any]:
    """Bytes and sha256 of all files of a glob, by relative name."""
    found = {}
    for path, label in matches(name, source, hashes.store):
        with reading(name, source, path):
            found[label] = hashes.of(path).model_dump()
    return found

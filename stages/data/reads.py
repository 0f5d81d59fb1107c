"""What the data stage reads from outside the line, by content: the user's files, and Python."""

import platform
from collections.abc import Mapping
from typing import Any

from configs.data import DataSpec, FilesSource, Source, StdlibSource, TokenizerConfig
from configs.errors import DataError
from stages.data.faults import reading
from stages.data.finding import matches
from stages.hashing import Hashes
from stages.names import TOKENIZER


def reads(config: DataSpec, hashes: Hashes) -> Mapping[str, Any]:
    """What the corpus depends on besides its config: files by content, the Python version."""
    found = {name: identify(name, source, hashes) for name, source in config.data.sources.items()}
    known = {name: facts for name, facts in sorted(found.items()) if facts}
    return known | identify_tokenizer(config.data.tokenizer, hashes)


def identify(name: str, source: Source, hashes: Hashes) -> dict[str, Any]:
    """What makes two readings of this source equal, as JSON; empty where the config says it all.

    Files enter by relative name, bytes and sha256, the standard library by the Python version.
    """
    match source:
        case FilesSource():
            found = {}
            for path, label in matches(name, source, hashes.store):
                with reading(name, source, path):
                    found[label] = hashes.of(path).model_dump()
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

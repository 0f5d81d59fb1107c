"""What a run and its artifacts are, in the flat names and short values that MLflow takes."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from pipeline.store import Committed
from stages.artifacts import MANIFEST
from stages.telemetry import METRICS

VALUE_CHARS, KEY_CHARS, DIGEST_CHARS = 6000, 250, 36
SMALL_BYTES = 5_000_000
"""Files of an artifact above this are referred to, never uploaded."""


def metric_name(name: str) -> str:
    """A name that MLflow takes, without slashes: a name may not be the folder of another."""
    return re.sub(r"[^\w.\- :]", "_", name.replace("@", "_at_").replace("/", "."))


def flatten(value: object, path: str = "") -> dict[str, str]:
    """Leaves of nested tables as text, by dotted path."""
    if isinstance(value, Mapping) and value:
        found: dict[str, str] = {}
        for key, inner in value.items():
            found |= flatten(inner, f"{path}.{key}" if path else str(key))
        return found
    return {path: value if isinstance(value, str) else json.dumps(value)} if path else {}


def small_files(made: Committed) -> Sequence[Path]:
    """The manifest, the step log, and the records and reports on the artifact's ground floor."""
    paths = [made.path / MANIFEST, made.artifact.beside(METRICS)]
    paths += [
        made.artifact.path(name)
        for name, entry in made.manifest.files.items()
        if name.endswith((".json", ".md")) and "/" not in name and entry.bytes < SMALL_BYTES
    ]
    return [path for path in paths if path.is_file()]

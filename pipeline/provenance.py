"""When, where and by which code: what is recorded with an artifact and never enters identity."""

import ast
import hashlib
import importlib.metadata
import inspect
import os
import platform
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from configs.parallel import ClusterConfig
from stages.artifacts import now
from stages.contract import Stage

FLOORS = frozenset({"configs", "model", "cluster", "stages"})


def machine_facts(cluster: ClusterConfig) -> dict[str, Any]:
    """Versions, hardware and the cluster that was asked for, as JSON values."""
    return {
        "ingot": ingot_version(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": platform.node(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "cluster": cluster.model_dump(mode="json"),
        "command": sys.argv[1:],
        "time": now(),
    }


def ingot_version() -> str:
    """The installed version; `source` when run from a folder that was never installed."""
    try:
        return importlib.metadata.version("ingot")
    except importlib.metadata.PackageNotFoundError:
        return "source"


def source_digest(stage: Stage[Any]) -> str:
    """SHA-256, 16 digits, over the stage's module and every module of ours that it imports.

    Found by reading import statements, so nothing is imported to know it.
    """
    start = inspect.getsourcefile(stage.run)
    module = stage.run.__module__
    if start is None or not Path(start).is_file():
        return "unknown"
    root = Path(start).resolve().parents[module.count(".")]
    ours = FLOORS | {module.partition(".")[0]}
    seen: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _module_file(root, name)
        if name not in seen and path is not None:
            seen[name] = path
            waiting += [one for one in _imports(path) if one.partition(".")[0] in ours]
    digest = hashlib.sha256()
    for name, path in sorted(seen.items()):
        digest.update(name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _module_file(root: Path, name: str) -> Path | None:
    base = root.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if path.is_file():
            return path
    return None


@cache
def _imports(path: Path) -> tuple[str, ...]:
    return tuple(_imported_names(ast.parse(path.read_bytes())))


def _imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names that may be modules: `from a.b import c` yields both `a.b` and `a.b.c`."""
    for statement in ast.walk(tree):
        match statement:
            case ast.Import(names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)

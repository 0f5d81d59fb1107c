"""When, where and by which code: what is recorded with an artifact and never enters identity."""

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import psutil

from configs.masking import masked
from configs.parallel import ClusterConfig
from configs.reading import without_webhooks
from stages.contract import Face
from stages.manifest import now

LIBRARIES = ("torch", "ray", "transformers", "tokenizers", "safetensors", "pyarrow", "mlflow")
"""Whose versions bear on what is built, or on who reads it."""
ALLOCATOR = ("MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "LD_PRELOAD")
"""Settings of this process's memory, without which times mean little."""
_GIT_SECONDS = 5.0
_PACKAGE = "__init__.py"
_IMPORT = re.compile(
    r"^[ \t]*(?:from[ \t]+(\.*[\w.]*)[ \t]+import[ \t]+(\([^)]*\)|[^\n#;]+)"
    r"|import[ \t]+([^\n#;]+))",
    re.MULTILINE,
)
"""Of a line that imports: where from and which names, or the modules."""
_COMMENT = re.compile(r"#[^\n]*")
FLOORS = frozenset({"configs", "model", "cluster", "stages"})


def machine_facts(cluster: ClusterConfig) -> dict[str, Any]:
    """Versions, hardware and the cluster that was asked for, as JSON values."""
    return {
        "ingot": ingot_version(),
        "git": git_state(),
        "python": platform.python_version(),
        "versions": {name: installed_version(name) for name in LIBRARIES},
        "platform": platform.platform(),
        "host": platform.node(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "allocator": {name: os.environ[name] for name in ALLOCATOR if name in os.environ},
        "memory_bytes": psutil.virtual_memory().total,
        "cluster": cluster.model_dump(mode="json"),
        "command": list(without_webhooks(map(masked, sys.argv[1:]))),
        "time": now(),
    }


def ingot_version() -> str:
    """The installed version; `source` when run from a folder that was never installed."""
    return installed_version("ingot") or "source"


def installed_version(library: str) -> str | None:
    """The version of an installed library, which is not imported for it; none if there is none."""
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


@cache
def git_state() -> dict[str, Any] | None:
    """Commit of the checkout that this code lies in, and whether it differs; none without one.

    An installed package in a project's environment lies in no checkout of its own.
    """
    root = Path(__file__).resolve().parents[1]
    if not (root / ".git").exists():
        return None
    commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    if commit is None or changes is None:
        return None
    return {"commit": commit.strip(), "dirty": bool(changes.strip())}


def _git(root: Path, *words: str) -> str | None:
    """What git prints; none if it is not there, refuses, or takes too long."""
    # It only looks: it waits for nobody's lock, and leaves none in the way of a commit.
    command = ["git", "--no-optional-locks", "-C", str(root), *words]
    # Under a hook of another checkout, variables lead there.
    environment = {name: v for name, v in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_GIT_SECONDS,
            check=True,
            env=environment,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


@cache
def processor() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def source_digest(stage: Face[Any]) -> str:
    """SHA-256, 16 digits, over the stage's module and every module of ours that it imports.

    Found by reading import statements, so nothing is imported to know it.
    """
    module = stage.body.partition(":")[0]
    file = _source(module)
    if file is None:
        return "unknown"
    root = file.parents[module.count(".") + (file.name == _PACKAGE)]
    ours = FLOORS | {module.partition(".")[0]}
    found: dict[str, bytes] = {}
    tried, waiting = {module}, [module]
    while waiting:
        name = waiting.pop()
        path = _module_file(root, name)
        if path is None:
            continue
        package = name if path.name == _PACKAGE else name.rpartition(".")[0]
        found[name], imported = _read(path, package)
        new = {one for one in imported if one.partition(".")[0] in ours} - tried
        tried |= new
        waiting += new
    digest = hashlib.sha256()
    for name, content in sorted(found.items()):
        digest.update(name.encode() + b"\0" + content + b"\0")
    return digest.hexdigest()[:16]


def _source(module: str) -> Path | None:
    """The file of a module, which is not loaded for it; none if there is none."""
    try:
        found = importlib.util.find_spec(module)
    except (ImportError, ValueError):
        return None
    if found is None or found.origin is None or not Path(found.origin).is_file():
        return None
    return Path(found.origin).resolve()


def _module_file(root: Path, name: str) -> Path | None:
    base = root.joinpath(*name.split("."))
    for path in (base.with_suffix(".py"), base / _PACKAGE):
        if path.is_file():
            return path
    return None


@cache
def _read(path: Path, package: str) -> tuple[bytes, tuple[str, ...]]:
    """What a file holds, and dotted names that may be the modules it imports.

    `from a.b import c` yields both `a.b` and `a.b.c`; `from .b import c` is read as in a file of
    `package`. Found by the lines that look like imports, which takes a tenth of the time of
    parsing; one in a text is a name too many, and does no harm.
    """
    found, content = [], path.read_bytes()
    for origin, names, plain in _IMPORT.findall(content.decode(errors="replace")):
        if plain:
            found += [one.split()[0] for one in plain.split(",") if one.strip()]
            continue
        module = origin.lstrip(".")
        level = len(origin) - len(module)
        above = package.split(".")[: package.count(".") + 2 - level] if level else []
        parent = ".".join([*above, *([module] if module else [])])
        found.append(parent)
        kept = _COMMENT.sub("", names.strip("()"))
        found += [f"{parent}.{one.split()[0]}" for one in kept.split(",") if one.strip()]
    return content, tuple(found)

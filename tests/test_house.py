"""Promises about the shape of the code, read from its syntax trees."""

import ast
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FLOORS = ("configs", "model", "cluster", "stages", "pipeline")
"""From the ground up; a floor imports itself and what is below it."""
FILES = sorted(path for floor in FLOORS for path in (ROOT / floor).rglob("*.py"))
SCRIPTS = [path for path in FILES if "drivers" in path.parts]
"""Run under other programs' Python, whose names and order of imports are theirs."""
MODULES = [path for path in FILES if path not in SCRIPTS]
DOORS = {
    "mlflow": {
        f"pipeline/tracking/{name}.py" for name in ("server", "runs", "child", "shown", "models")
    },
    "fsspec": {"cluster/place.py"},
}
"""Libraries that only these files may import."""
BY_NAME = {
    *("pipeline/cli.py", "pipeline/loading.py", "pipeline/tracking/shown.py"),
    "pipeline/verbs/run.py",
}
"""May import what a string names: a verb when it is called, a plugin when it is planned, a stage's
body when a node is built, the plots when there is something to draw."""
DEVICES = re.compile(
    r"cuda|npu|torch_npu|nccl|hccl|gloo|hip|cublas"
    r"|(?:CUDA|ASCEND|HIP|NCCL|HCCL|GLOO|CUBLAS|TORCH_NCCL|PYTORCH|MALLOC)_\w+",
    re.IGNORECASE,
)
"""Devices, libraries of their collectives, and variables of either, as words of code."""
DEVICE_FILES = {"cluster/backend.py", "cluster/autoload.py"}
"""May name them: the table, and what keeps torch from loading."""
NOT_DEVICES = {
    # What a bundle is made for.
    "stages/artifacts.py": {"cuda"},
    "stages/export/variants.py": {"cuda"},
    "stages/export/layouts.py": {"cuda"},
    "stages/export/servers.py": {"cuda"},
    "stages/export/footprint.py": {"cuda"},
    "pipeline/verbs/verify.py": {"cuda"},
    "stages/export/programs.py": {"CUDA"},
    # Told to a reader.
    "stages/export/described.py": {"NPU"},
    "stages/export/emulator.py": {"NPU"},
    "stages/export/serving.py": {"cuda", "HCCL_OP_EXPANSION_MODE", "HCCL_BUFFSIZE"},
    # Recorded of this process, whatever it computes on.
    "pipeline/provenance.py": {"MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_"},
}
"""Words that mean something else there."""
NEVER = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), filename=str(path))


def imported(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """(dotted name, line) of everything imported; `from a import b` counts as `a.b`."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from ((alias.name, node.lineno) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                prefix = "." * level + (module or "")
                yield from ((f"{prefix}.{alias.name}", node.lineno) for alias in names)


def faults(path: Path) -> Iterator[str]:
    """Every way in which the imports of one file break the house."""
    name, tree = name_of(path), tree_of(path)
    floor = name.split("/")[0]
    allowed = FLOORS[: FLOORS.index(floor) + 1]
    for target, line in imported(tree):
        library, where = target.split(".")[0], f"{name}:{line} imports {target}"
        if not library:
            yield f"{where}: a relative import"
        if library in FLOORS and library not in allowed:
            yield f"{where}: {library} is above {floor}"
        if library in DOORS and name not in DOORS[library]:
            yield f"{where}: only {', '.join(sorted(DOORS[library]))} may"
        if library == "ray" and floor != "cluster":
            yield f"{where}: ray is for cluster"
        lent = lender(target)
        if lent and name not in DOORS.get(lent, {name}):
            yield f"{where}: a part of {lent}, which only {', '.join(sorted(DOORS[lent]))} may use"
        if floor == "model" and target.startswith("torch.distributed"):
            yield f"{where}: model is mathematics on one device"
        if library in NEVER:
            yield f"{where}: nothing is loaded by pickle"
        if floor == "stages" and library == "stages" and other_stage(name, target):
            yield f"{where}: no stage imports another"


def lender(target: str) -> str:
    """The library with doors from which a file of the house has what is imported from it, if any.

    `from stages.artifacts import AbstractFileSystem` goes around the doors of fsspec.
    """
    module, _, attribute = target.rpartition(".")
    path = ROOT / f"{module.replace('.', '/')}.py"
    if module.split(".")[0] in FLOORS and path.is_file():
        for found, _ in imported(tree_of(path)):
            if found.split(".")[0] in DOORS and found.split(".")[-1] == attribute:
                return found.split(".")[0]
    return ""


def other_stage(name: str, target: str) -> bool:
    home, folder = name.split("/")[1], target.split(".")[1]
    return (ROOT / "stages" / folder).is_dir() and folder != home


def distributed_attributes(tree: ast.Module) -> Iterator[int]:
    """Lines that reach `torch.distributed` through the package instead of by import."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name(id="torch"), attr="distributed"):
                yield node.lineno


def local_imports(tree: ast.Module) -> Iterator[int]:
    """Lines with an import statement inside a function."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for inner in ast.walk(node):
                if isinstance(inner, ast.Import | ast.ImportFrom):
                    yield inner.lineno


def imports_by_name(tree: ast.Module) -> Iterator[int]:
    """Lines that import what a string names."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"):
                yield node.lineno


def named_devices(path: Path) -> Iterator[str]:
    """Where a file names a device, its library or a variable of either.

    In names of code and in texts, but for docstrings; `stages.export.cuda` is a file of ours.
    """
    tree, name = tree_of(path), name_of(path)
    meant = NOT_DEVICES.get(name, set())
    prose = {
        id(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        match node:
            case ast.Constant(value=str(text)) if id(node) not in prose:
                words = re.findall(r"\w+", text)
            case ast.Name(id=word) | ast.Attribute(attr=word) | ast.arg(arg=word):
                words = [word]
            case ast.keyword(arg=str(word)):
                words = [word]
            case ast.FunctionDef(name=word) | ast.ClassDef(name=word):
                words = [word, *word.strip("_").split("_")]
            case ast.Import() | ast.ImportFrom():
                words = [w for target, _ in imported(node) for w in _of_others(target)]
            case _:
                continue
        line = getattr(node, "lineno", 0)
        yield from (f"{name}:{line} {w}" for w in words if DEVICES.fullmatch(w) and w not in meant)


def _of_others(target: str) -> list[str]:
    """The words of an imported name, unless it is one of ours."""
    return [] if target.split(".")[0] in FLOORS else target.split(".")


def test_devices_are_named_in_one_table() -> None:
    asked = [
        path for path in MODULES if name_of(path).startswith(("cluster", "stages", "pipeline"))
    ]
    found = [f for path in asked if name_of(path) not in DEVICE_FILES for f in named_devices(path)]
    assert found == []
    for name in DEVICE_FILES:
        assert any(named_devices(ROOT / name)), f"{name} names no device; it needs no exception"
    for name, meant in NOT_DEVICES.items():
        words = set(re.findall(r"\w+", (ROOT / name).read_text()))
        assert meant <= words, f"{name} needs no exception for {meant - words}"


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ('device = "cuda:0"', "cuda"),
        ("torch.npu.synchronize()", "npu"),
        ('group = "cpu:gloo,cuda:nccl"', "gloo"),
        ('os.environ["NCCL_SOCKET_IFNAME"] = "lo"', "NCCL_SOCKET_IFNAME"),
        ("import torch_npu", "torch_npu"),
        ('env = {"MALLOC_TOP_PAD_": "1"}', "MALLOC_TOP_PAD_"),
        ("def on_cuda(): ...", "cuda"),
        ('said = f"{n} CUDA devices"', "CUDA"),
        ('"""Prose may say cuda."""', None),
        ("from stages.export.cuda import Fp8Blocks", None),
    ],
)
def test_a_device_that_is_named_elsewhere_is_seen(
    code: str, word: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cluster" / "x.py"
    path.parent.mkdir()
    path.write_text(code)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    found = {one.split()[-1] for one in named_devices(path)}
    assert (word in found) if word else (found == set())


def test_every_file_keeps_to_the_staircase_and_the_doors() -> None:
    assert [fault for path in MODULES for fault in faults(path)] == []


def test_every_door_is_used_and_the_import_contracts_know_the_same_ones() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for library, doors in DOORS.items():
        (contract,) = (one for one in contracts["contracts"] if one["id"] == library)
        known = {line.split(" -> ")[0] for line in contract["ignore_imports"]}
        assert {f"{name.replace('.', '/')}.py" for name in known} == doors
        for door in doors:
            libraries = {target.split(".")[0] for target, _ in imported(tree_of(ROOT / door))}
            assert library in libraries, f"{door} does not import {library}; it needs no door"


def test_the_model_never_touches_process_groups() -> None:
    found = [
        f"{name_of(path)}:{line}"
        for path in MODULES
        if name_of(path).startswith("model/")
        for line in distributed_attributes(tree_of(path))
    ]
    assert found == []


def test_nothing_is_imported_inside_a_function() -> None:
    found = [f"{name_of(path)}:{n}" for path in MODULES for n in local_imports(tree_of(path))]
    assert found == []


def test_only_verbs_and_plugins_are_imported_by_name() -> None:
    found = {name_of(path) for path in MODULES for _ in imports_by_name(tree_of(path))}
    assert found <= BY_NAME


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_module_says_first_what_it_is_for(path: Path) -> None:
    first = (ast.get_docstring(tree_of(path)) or "").split("\n")[0]
    assert first.endswith((".", ":")), f"no sentence: {first!r}"
    assert "module" not in first.lower()


def test_packages_hold_a_docstring_and_at_most_the_names_they_offer() -> None:
    for path in MODULES:
        if path.name == "__init__.py":
            for statement in tree_of(path).body[1:]:
                offers = isinstance(statement, ast.ImportFrom) or (
                    isinstance(statement, ast.Assign)
                    and ast.unparse(statement.targets[0]) == "__all__"
                )
                assert offers, f"{name_of(path)} holds code"


def test_nothing_runs_through_a_shell_or_an_evaluator() -> None:
    found = []
    for path in FILES:
        for node in ast.walk(tree_of(path)):
            match node:
                case ast.keyword(arg="shell"):
                    found.append(f"{name_of(path)}:{node.lineno} shell=")
                case ast.Call(func=ast.Name(id="eval" | "exec")):
                    found.append(f"{name_of(path)}:{node.lineno} eval")
    assert found == []


@pytest.mark.parametrize(
    ("name", "code", "complaint"),
    [
        ("configs/x.py", "import model.moe", "model is above configs"),
        ("model/x.py", "from torch.distributed import all_reduce", "one device"),
        ("stages/data/x.py", "import ray", "ray is for cluster"),
        ("stages/data/x.py", "from stages.export import bundle", "no stage imports another"),
        ("stages/data/x.py", "from ray.data import read_text", "ray is for cluster"),
        ("stages/x.py", "import mlflow", "pipeline/tracking/models.py"),
        ("stages/x.py", "import fsspec", "cluster/place.py may"),
        ("pipeline/x.py", "from fsspec.core import url_to_fs", "cluster/place.py may"),
        ("pipeline/x.py", "from stages.door import Files", "a part of fsspec"),
        ("pipeline/x.py", "from pickle import loads", "by pickle"),
        ("pipeline/x.py", "from . import cli", "relative"),
    ],
)
def test_a_breach_is_seen(
    name: str, code: str, complaint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "stages" / "export").mkdir(parents=True)
    (tmp_path / "stages" / "door.py").write_text("from fsspec import Files")
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(code)
    monkeypatch.setattr(f"{__name__}.ROOT", tmp_path)
    assert [complaint in fault for fault in faults(path)] == [True]

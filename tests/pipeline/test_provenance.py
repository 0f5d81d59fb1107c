"""The source digest covers a stage's own code and what it imports of ours, and nothing else."""

import importlib
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from configs.parallel import ClusterConfig
from pipeline import provenance
from pipeline.provenance import _read, git_state, machine_facts, source_digest
from stages.contract import Stage
from tests.pipeline.fakes import gather

STAGE = """
from configs.base import Frozen
from stages.artifacts import Corpus
from stages.contract import Workspace, stage
from mine import helper

class Config(Frozen):
    pass

@stage(revision=1)
def made(config: Config, work: Workspace) -> Corpus:
    return helper.make()
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name, text in {"__init__": "", "helper": "", "other": "", "steps": STAGE}.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def digest(package: Path, name: str = "mine.steps") -> str:
    for loaded in [one for one in sys.modules if one.partition(".")[0] == "mine"]:
        del sys.modules[loaded]
    _read.cache_clear()
    module = importlib.import_module(name)
    stage: Stage[Any] = module.made
    return source_digest(stage)


def test_a_change_in_what_a_stage_imports_changes_its_digest(package: Path) -> None:
    before = digest(package)
    assert digest(package) == before
    (package / "helper.py").write_text("# changed\n")
    assert digest(package) != before


def test_a_change_elsewhere_does_not(package: Path) -> None:
    before = digest(package)
    (package / "other.py").write_text("# changed\n")
    assert digest(package) == before


@pytest.mark.parametrize("name", ["mine", "mine.inner"])
def test_a_stage_in_a_package_itself_is_digested(package: Path, name: str) -> None:
    folder = package.parent.joinpath(*name.split("."))
    folder.mkdir(exist_ok=True)
    (folder / "__init__.py").write_text(STAGE)
    before = digest(package, name)
    for changed in (folder / "__init__.py", package / "helper.py"):
        with changed.open("a") as file:
            file.write("# changed\n")
        assert digest(package, name) != before
        before = digest(package, name)


@pytest.mark.parametrize(
    "statement",
    [
        "from . import helper",
        "from .helper import make",
        "from .inner import deep",
        "from .inner.deep import make",
    ],
)
def test_relative_imports_count_too(package: Path, statement: str) -> None:
    (package / "inner").mkdir()
    (package / "inner" / "__init__.py").touch()
    (package / "inner" / "deep.py").write_text("from ..helper import make\n")
    (package / "helper.py").write_text("def make(): ...\n")
    (package / "steps.py").write_text(STAGE.replace("from mine import helper", statement))
    before = digest(package)
    (package / "helper.py").write_text("def make(): ... # changed\n")
    assert digest(package) != before


def test_a_file_that_is_no_python_is_digested_as_it_is(package: Path) -> None:
    (package / "helper.py").write_text("def make(): ...\n")
    before = digest(package)
    stage: Stage[Any] = importlib.import_module("mine.steps").made
    for text in ("def make(", "\0"):
        (package / "helper.py").write_text(text)
        _read.cache_clear()
        assert source_digest(stage) != before


def test_provenance_says_where_and_with_what() -> None:
    facts = machine_facts(ClusterConfig(trainers=3))
    assert facts["cluster"]["trainers"] == 3
    assert facts["python"] == sys.version.split()[0]
    assert len(source_digest(gather)) == 16


def test_provenance_says_which_libraries_built_and_on_what(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "0")
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    facts = machine_facts(ClusterConfig())
    for library in ("torch", "ray", "transformers", "tokenizers"):
        assert facts["versions"][library] == importlib.metadata.version(library)
    assert facts["allocator"]["MALLOC_MMAP_MAX_"] == "0"
    assert "LD_PRELOAD" not in facts["allocator"]
    assert facts["processor"]


def test_a_library_that_is_not_installed_has_no_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provenance, "LIBRARIES", ("no-such-library",))
    assert machine_facts(ClusterConfig())["versions"] == {"no-such-library": None}


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., str]]:
    """A folder that looks like ours to `git_state`; runs git in it."""
    (tmp_path / "pipeline").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "pipeline" / "provenance.py"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))

    def git(*words: str) -> str:
        names = ["-c", "user.name=t", "-c", "user.email=t@localhost"]
        done = subprocess.run(
            ["git", *names, *words], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        git_state.cache_clear()
        return done.stdout.strip()

    git_state.cache_clear()
    yield git
    git_state.cache_clear()


def test_a_checkout_is_known_by_its_commit_and_by_what_differs_from_it(
    checkout: Callable[..., str], tmp_path: Path
) -> None:
    assert git_state() is None
    checkout("init", "-q")
    file = tmp_path / "pipeline" / "code.py"
    file.write_text("one")
    checkout("add", "-A")
    assert git_state() is None  # No commit yet.
    checkout("commit", "-qm", "one")
    commit = checkout("rev-parse", "HEAD")
    assert git_state() == {"commit": commit, "dirty": False}
    assert machine_facts(ClusterConfig())["git"] == {"commit": commit, "dirty": False}
    for change in (lambda: file.write_text("two"), lambda: (tmp_path / "new.py").touch()):
        change()
        git_state.cache_clear()
        assert git_state() == {"commit": commit, "dirty": True}
        checkout("add", "-A")
        checkout("commit", "-qm", "more")
        commit = checkout("rev-parse", "HEAD")
        assert git_state() == {"commit": commit, "dirty": False}


def test_a_package_in_a_folder_within_a_project_is_no_checkout_of_that_project(
    checkout: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in `project/.venv/lib/...`: the project's commit says nothing of this code."""
    checkout("init", "-q")
    checkout("commit", "-q", "--allow-empty", "-m", "theirs")
    inner = tmp_path / ".venv" / "site-packages" / "pipeline" / "provenance.py"
    monkeypatch.setattr(provenance, "__file__", str(inner))
    git_state.cache_clear()
    assert git_state() is None


def test_a_commit_elsewhere_changes_nothing_and_is_not_disturbed(
    checkout: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As under a hook of another checkout, whose variables lead there."""
    checkout("init", "-q")
    file = tmp_path / "pipeline" / "code.py"
    file.write_text("one")
    checkout("add", "-A")
    checkout("commit", "-qm", "ours")
    commit, index = checkout("rev-parse", "HEAD"), tmp_path / ".git" / "index"
    before = index.read_bytes()
    # Git would note in the index that the file is as it was.
    os.utime(file, (1, 1))
    other = tmp_path.parent / f"{tmp_path.name}-other"
    subprocess.run(["git", "init", "-q", str(other)], check=True)
    monkeypatch.setenv("GIT_DIR", str(other / ".git"))
    assert git_state() == {"commit": commit, "dirty": False}
    assert index.read_bytes() == before


def test_without_git_the_rest_is_recorded(
    checkout: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkout("init", "-q")
    checkout("commit", "-q", "--allow-empty", "-m", "ours")
    monkeypatch.setenv("PATH", "/nowhere")
    git_state.cache_clear()
    facts = machine_facts(ClusterConfig())
    assert facts["git"] is None
    assert facts["python"]

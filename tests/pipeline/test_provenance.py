"""The source digest covers a stage's own code and what it imports of ours, and nothing else."""

import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

from configs.parallel import ClusterConfig
from pipeline.provenance import _imports, machine_facts, source_digest
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


def digest(package: Path) -> str:
    for name in [one for one in sys.modules if one.partition(".")[0] == "mine"]:
        del sys.modules[name]
    _imports.cache_clear()
    module = importlib.import_module("mine.steps")
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


def test_provenance_says_where_and_with_what() -> None:
    facts = machine_facts(ClusterConfig(trainers=3))
    assert facts["cluster"]["trainers"] == 3
    assert facts["python"] == sys.version.split()[0]
    assert len(source_digest(gather)) == 16

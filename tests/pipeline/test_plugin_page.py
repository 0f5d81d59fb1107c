"""The page on plugins is true: its files and commands, run as they stand."""

import re
import signal
from pathlib import Path

import pytest

from pipeline import cli

# MLflow's own use of SQLAlchemy is behind its deprecations.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "plugins.md").read_text()


def block(after: str, language: str) -> str:
    """The first fenced block of a language after some words."""
    begin = PAGE.index(after)
    found = re.search(rf"```{language}\n(.*?)```", PAGE[begin:], re.DOTALL)
    assert found is not None
    return found.group(1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty folder, and in it the files that the page writes."""
    package = tmp_path / "my_stages"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "lengths.py").write_text(block("`my_stages/lengths.py`", "python"))
    (tmp_path / "mine.toml").write_text(block("`mine.toml`", "toml"))
    return tmp_path


def test_the_pages_commands_do_what_it_says(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = block("## 3. Plan", "").splitlines()
    assert lines[0] == "export PYTHONPATH=$PWD"
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    # Tracking has its own tests; here nothing listens, which a run must survive.
    dead = ("--set", "tracking.uri='http://127.0.0.1:9'", "--set", "tracking.timeout_seconds=1")
    told = {}
    for line in lines[1:]:
        program, *words = line.split()
        assert program == "ingot"
        capsys.readouterr()
        assert cli.main([*words, *dead]) == 0
        told[" ".join(words[:3])] = capsys.readouterr().out
    assert re.search(r"lengths +build +never built", told["plan smoke @mine.toml"])
    shown = told["show lengths"]
    assert re.search(r"^  documents a row +\d", shown, re.M)
    assert "report.md" in shown
    assert re.search(r"rows: 50 -> 60", told["why lengths --set"])
    # A misspelt setting is told before anything starts.
    assert cli.main(["plan", "smoke", "@mine.toml", "--set", "nodes.lengths.config.rws=3"]) == 2
    said = capsys.readouterr().err
    assert "nodes.lengths.config" in said
    assert "did you mean 'rows'?" in said

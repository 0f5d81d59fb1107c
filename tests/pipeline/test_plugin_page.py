"""The page on plugins is true: its files and commands, run as they stand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_the_pages_commands_do_what_it_says(folder: Path) -> None:
    lines = block("## 3. Plan", "").splitlines()
    assert lines[0] == "export PYTHONPATH=$PWD"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{folder}:{ROOT}",
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
    }
    told = {}
    for line in lines[1:]:
        program, *words = line.split()
        assert program == "ingot"
        done = subprocess.run(
            [sys.executable, "-m", "pipeline.cli", *words, "--set", "tracking.timeout_seconds=1"],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told[" ".join(words[:3])] = done.stdout
    assert re.search(r"lengths +build +never built", told["plan smoke @mine.toml"])
    shown = told["show lengths"]
    assert re.search(r"^  documents a row +\d", shown, re.M)
    assert "report.md" in shown
    assert re.search(r"rows: 50 -> 60", told["why lengths --set"])


def test_a_misspelt_setting_of_a_plugin_is_told_before_anything_starts(folder: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pipeline.cli", "plan", "smoke", "@mine.toml"),
            *("--set", "nodes.lengths.config.rws=3"),
        ],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{folder}:{ROOT}"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert "nodes.lengths.config" in done.stderr
    assert "did you mean 'rows'?" in done.stderr

"""The whole line with its store in a place of objects, continued from one machine to the next.

Another machine is another cache folder and another working folder: what they share is the store.
"""

import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from cluster import place
from tests.line.runs import ingot, start, wait_for
from tests.objects import Objects, serving

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]

NODES = ("data", "pretrain", "posttrain", "evaluate", "export")


OVERLAY = """
[data.sources.stdlib]
share = 0
[data.sources.mine]
type = "files"
share = 0.5
glob = "{texts}/*.txt"
"""
"""Texts of one's own, that lie beside the recipe or in the bucket."""


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm") / "texts"
    folder.mkdir()
    for path in (Path(__file__).parents[2] / "pipeline").glob("*.py"):
        (folder / f"{path.stem}.txt").write_text(path.read_text())
    return folder


@pytest.fixture(scope="module")
def objects(texts: Path) -> Iterator[Objects]:
    with serving() as objects:
        for path in texts.iterdir():
            place.send(path, f"{objects.url}/texts/{path.name}")
        yield objects


@dataclass(frozen=True)
class Machine:
    """A folder to work in, and a cache."""

    folder: Path
    url: str

    def words(self) -> tuple[str, ...]:
        settings = (f"store.url={self.url}", "posttrain.steps=40")
        return ("run", "smoke", "@mine.toml", *(w for one in settings for w in ("--set", one)))

    def run(self) -> subprocess.CompletedProcess[str]:
        return ingot(self.folder, *self.words(), timeout_seconds=900)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objects: Objects) -> "Iterator[Any]":
    def make(name: str, store: str) -> Machine:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "mine.toml").write_text(OVERLAY.format(texts=f"{objects.url}/texts"))
        monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
        return Machine(folder, f"{objects.url}/{store}")

    yield make


def manifests(url: str) -> dict[str, dict[str, Any]]:
    """The manifest of each artifact in a store, by its folder."""
    found = [name for name in place.sizes(f"{url}/artifacts") if name.endswith("manifest.json")]
    return {name: json.loads(place.read(f"{url}/artifacts/{name}")) for name in found}


def steps(url: str, stage: str) -> int:
    """The newest save of a stage that is whole in the store."""
    names = place.sizes(f"{url}/artifacts/{stage}")
    whole = [name for name in names if name.endswith("complete.json")]
    return max((int(name.rpartition("step-")[2].partition("/")[0]) for name in whole), default=0)


@pytest.fixture(scope="module")
def calm(texts: Path) -> dict[str, str]:
    """The content of each artifact of a local store that nothing disturbed, by stage and target."""
    folder = texts.parent
    (folder / "mine.toml").write_text(OVERLAY.format(texts="texts"))
    settings = ("@mine.toml", "--set", "posttrain.steps=40")
    done = ingot(folder, "run", "smoke", *settings, timeout_seconds=900)
    assert done.returncode == 0, done.stdout + done.stderr
    return contents(str(folder / ".ingot"))


def contents(url: str) -> dict[str, str]:
    return {
        f"{one['stage']} {one['facts'].get('target', '')}": one["content"]
        for one in manifests(url).values()
    }


def test_the_line_makes_of_objects_byte_by_byte_what_it_makes_of_folders(
    machine: Any, calm: dict[str, str]
) -> None:
    one = machine("one", "whole")
    done = one.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert contents(one.url) == calm
    other = machine("other", "whole")
    again = other.run()
    assert again.returncode == 0, again.stdout + again.stderr
    assert "built in" not in again.stdout
    shown = ingot(other.folder, "show", "posttrain", "--recipe", "smoke", *other.words()[3:])
    assert shown.returncode == 0, shown.stderr


def test_a_driver_that_is_killed_in_training_is_continued_elsewhere_to_the_last_bit(
    machine: Any, calm: dict[str, str]
) -> None:
    first = machine("first", "killed")
    running = start(first.folder, *first.words())
    wait_for(lambda: steps(first.url, "pretrain") >= 8, "save of pretraining")
    running.send_signal(signal.SIGKILL)
    running.wait(30)
    second = machine("second", "killed")
    running = start(second.folder, *second.words())
    wait_for(lambda: steps(second.url, "posttrain") >= 2, "save of post-training")
    running.send_signal(signal.SIGKILL)
    running.wait(30)
    assert "pretrain: continues the interrupted build" in (second.folder / "output.txt").read_text()
    third = machine("third", "killed")
    done = third.run()
    assert done.returncode == 0, done.stdout + done.stderr
    assert "posttrain: continues the interrupted build" in done.stdout
    assert contents(third.url) == calm

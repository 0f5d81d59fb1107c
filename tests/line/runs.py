"""Runs the installed `ingot` command in a folder of its own, as a user would."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

INGOT = Path(sys.executable).with_name("ingot")


def environment() -> dict[str, str]:
    """The caller's, without what pytest adds for its own sake."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}


def ingot(
    folder: Path, *words: str, timeout_seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run `ingot words...` in `folder` to its end; standard output and error are kept."""
    return subprocess.run(
        [str(INGOT), *words],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=timeout_seconds,
    )


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """Start `ingot words...` in `folder`; output goes to `<folder>/output.txt`."""
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [str(INGOT), *words],
            cwd=folder,
            env=environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            text=True,
        )


def artifact(folder: Path, stage: str) -> tuple[Path, dict[str, Any]]:
    """The files and the manifest of the only committed artifact of `stage`."""
    (manifest,) = (folder / ".ingot" / "artifacts" / stage).glob("*/*/manifest.json")
    record = json.loads(manifest.read_text())
    return manifest.parent / record["address"], record


def history(folder: Path, stage: str) -> dict[str, Any]:
    """The losses and rewards that the only committed artifact of `stage` keeps."""
    files, _ = artifact(folder, stage)
    found: dict[str, Any] = json.loads((files / "history.json").read_text())
    return found


def bundles(folder: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The files and the facts of each bundle, by target; of several the newest generation's."""
    found = (folder / ".ingot" / "artifacts" / "export").glob("*/*/manifest.json")
    records = [(path.parent, json.loads(path.read_text())) for path in sorted(found)]
    return {
        record["facts"]["target"]: (parent / record["address"], record["facts"])
        for parent, record in records
    }


def step_log(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The step log of the newest builder of `stage`, finished or not.

    Step 0 is what was measured before the first.
    """
    found = sorted((folder / ".ingot" / "artifacts" / stage).glob("*/*/*/metrics.jsonl"))
    return [json.loads(line) for line in found[-1].read_text().split("\n")[:-1]] if found else []


def metrics(folder: Path, stage: str) -> list[dict[str, Any]]:
    """The same from the first step on."""
    return [line for line in step_log(folder, stage) if line["step"] > 0]


def wait_for(condition: Callable[[], bool], what: str, *, timeout_seconds: float = 240) -> None:
    """Poll until `condition` holds; AssertionError naming `what` when it does not in time."""
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"no {what} within {timeout_seconds:g} s"
        time.sleep(0.05)


def descendants(pid: int, name_part: str) -> list[psutil.Process]:
    """Processes started by `pid`, directly or not, whose command line holds `name_part`."""
    found = []
    for process in psutil.Process(pid).children(recursive=True):
        try:
            if name_part in " ".join(process.cmdline()):
                found.append(process)
        except psutil.Error:
            continue
    return found

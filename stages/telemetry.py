"""One voice: the builder appends one JSON line a step; the driver follows and alone reports.

A build that resumes at step k rewrites the file without the lines from k on, so that each step
stands in it once, however often it was computed.
"""

import json
import os
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from stages.contract import Tracker

METRICS = "metrics.jsonl"
_POLL_SECONDS = 0.25


class MetricsFile:
    """The step log in a slot, written by exactly one process at a time."""

    def __init__(self, folder: str | Path, *, resume_step: int = 0) -> None:
        """Open the log and drop what a previous build wrote after step `resume_step`."""
        self.path = Path(folder) / METRICS
        kept = [line for line in read_metrics(self.path) if line["step"] <= resume_step]
        draft = self.path.with_suffix(".draft")
        draft.write_text("".join(json.dumps(line) + "\n" for line in kept))
        os.replace(draft, self.path)

    def append(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Add the line of one step; on disk when this returns, as far as the OS is concerned."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")


def open_metrics(folder: str, resume_step: int) -> MetricsFile:
    """The log in `folder` for a build that continues after `resume_step`."""
    return MetricsFile(folder, resume_step=resume_step)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All complete lines of a step log; a line cut short by a crash is left out."""
    try:
        text = path.read_text()
    except FileNotFoundError:
        return []
    return [json.loads(line) for line in text.split("\n")[:-1]]


@contextmanager
def following(folder: str | Path, tracker: Tracker) -> Iterator[None]:
    """Report each step of the log in `folder` to `tracker` once, while the body runs.

    Lines already there are reported too: a resumed build shows its whole history. Steps that a
    restarted worker writes again have equal losses by construction and are not repeated; what a
    process observes anew, as FP8's alarms and how long a step took, stays as it was first told.
    """
    path = Path(folder) / METRICS
    done = threading.Event()
    thread = threading.Thread(target=_follow, args=(path, tracker, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _follow(path: Path, tracker: Tracker, done: threading.Event) -> None:
    last_step, offset, inode = 0, 0, -1
    while True:
        finishing = done.is_set()
        if path.exists():
            with path.open() as file:
                seen = os.fstat(file.fileno())
                if seen.st_ino != inode or seen.st_size < offset:
                    offset, inode = 0, seen.st_ino
                file.seek(offset)
                while (line := file.readline()).endswith("\n"):
                    offset = file.tell()
                    record = json.loads(line)
                    step = record.pop("step")
                    notes, tags = record.pop("notes", []), record.pop("tags", {})
                    # A worker that took over may compute by other means than the first.
                    for name, value in tags.items():
                        tracker.tag(name, value)
                    if step > last_step:
                        for message in notes:
                            tracker.note(f"step {step}: {message}")
                        tracker.log(record, step=step)
                        last_step = step
        if finishing:
            return
        time.sleep(_POLL_SECONDS)

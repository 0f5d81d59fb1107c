"""One voice: the builder appends one JSON line a step; the driver follows and alone reports.

Steps are numbered from 1; a line of step 0 holds what was measured before the first. A build that
continues after step k rewrites the file without the lines after k, so that each step stands in it
once, however often it was computed. Rates and times in it differ from build to build, so the log
lies beside the artifact; what later stages may read of it, losses, rewards and what was measured on
held-out data, goes into the artifact as `history.json`.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cluster.output import RESTART
from stages.contract import Tracker, Workspace
from stages.steps import METRICS, read_metrics

SAVES = "saves"
"""The folder of a training's sharded saves, below its resume state."""
HISTORY = "history.json"
"""A checkpoint's own losses and rewards: `step` and each figure's name to a list, one entry a step,
null where that step has none. What was measured on held-out data stands under `held_out` in a table
of the same form, of the steps at which it was."""
HELD_OUT = "held_out_"
"""Begins the names of figures that were measured on held-out data."""
BEST_STEP = "best_step"
"""At a measurement: the step with the best one so far."""
_POLL_SECONDS = 0.25


class MetricsFile:
    """The step log in a slot, written by exactly one process at a time."""

    def __init__(
        self, folder: str | Path, *, resume_step: int = 0, earlier: str | Path | None = None
    ) -> None:
        """Open the log of a build that continues after `resume_step`, 0 if it begins anew.

        Lines after it are dropped, and all of a build that begins anew, which measures again what
        there was before its first step. A log that does not exist yet begins with the lines of the
        `earlier` build's folder, up to the same step.
        """
        self.path = Path(folder) / METRICS
        source = self.path if earlier is None or self.path.exists() else Path(earlier) / METRICS
        lines = read_metrics(source) if resume_step else []
        kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= resume_step]
        draft = self.path.with_suffix(".draft")
        with draft.open("w") as file:
            file.writelines(kept)
            file.flush()
            # The lines would be lost if the name were on the disk before them.
            os.fsync(file.fileno())
        os.replace(draft, self.path)

    def append(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Add the line of one step; on the disk when this returns, before any save of the step."""
        with self.path.open("a") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def records(self) -> list[dict[str, Any]]:
        """All lines so far, each with its `step`."""
        return read_metrics(self.path)


def begin_metrics(work: Workspace, saved: tuple[Path, int] | None) -> MetricsFile:
    """The step log of a build that continues from the save `saved`, its own or an earlier one's."""
    folder, step = (None, 0) if saved is None else saved
    # `<builder>/resume/saves/step-...`
    earlier = None if folder is None else folder.parents[2]
    return MetricsFile(work.beside(), resume_step=step, earlier=earlier)


def open_metrics(folder: str, resume_step: int) -> MetricsFile:
    """The log in `folder` for a build that continues after `resume_step`."""
    return MetricsFile(folder, resume_step=resume_step)


def write_history(work: Workspace) -> list[dict[str, Any]]:
    """Write what the step log says of losses, rewards and held-out data into the artifact.

    Returns the log's records.
    """
    records = read_metrics(work.beside(METRICS))
    history: dict[str, Any] = _columns(
        [record for record in records if record["step"] > 0],
        lambda name: not is_held_out(name) and (name.endswith("loss") or name == "reward"),
    )
    measured = [record for record in records if any(map(is_held_out, record))]
    if measured:
        history["held_out"] = _columns(measured, is_held_out)
    work.path(HISTORY).write_text(json.dumps(history) + "\n")
    return records


def is_held_out(name: str) -> bool:
    """Whether a figure was measured on held-out data, or says of one such which is best."""
    return name.startswith(HELD_OUT) or name == BEST_STEP


def _columns(
    records: Sequence[Mapping[str, Any]], chosen: Callable[[str], bool]
) -> dict[str, list[Any]]:
    """The steps of some records, and each chosen figure that any of them has."""
    names = dict.fromkeys(name for record in records for name in record if chosen(name))
    return {name: [record.get(name) for record in records] for name in ("step", *names)}


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
    last_step, offset, inode = -1, 0, -1
    restarts: set[str] = set()
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
                    # Of a step that was told before, as those since the last save are.
                    restart = record.pop(RESTART, None)
                    if restart is not None and restart not in restarts:
                        restarts.add(restart)
                        tracker.note(restart)
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

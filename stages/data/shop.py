"""Where the steps of one build are done: what each task is called, and what is done already."""

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cluster.shards import Done, Task, in_order, run_tasks
from stages.contract import Workspace

_TELL_SECONDS = 30.0
_FOLDER = "data"
"""Of the resume state of a build."""
Make = Callable[[Path], Mapping[str, Any]]


@dataclass
class Shop:
    """Does the tasks of a build, with so many workers, and knows how long each step took."""

    work: Workspace
    workers: int
    seconds: dict[str, float] = field(default_factory=dict)
    """By step; of what was done already, next to nothing."""

    @property
    def _root(self) -> Path:
        return self.work.beside("resume", _FOLDER)

    def task(
        self,
        step: str,
        key: Mapping[str, Any],
        make: Make,
        *needs: Path,
        reads: Sequence[Path] = (),
    ) -> Task:
        """A task whose folder is named by all that bears on what it makes: `key`, and the names of
        the folders that it needs. It `reads` those too that these were made from."""
        said = json.dumps([step, key, [one.name for one in needs]], sort_keys=True)
        name = hashlib.sha256(said.encode()).hexdigest()[:32]
        return Task(step, self._root / step / name, make, needs, reads)

    def run(self, tasks: Sequence[Task], *, here: bool = False) -> list[Done]:
        """Do the tasks, those that are not done yet, and wait for all; `here` is in this process,
        for what is too small to travel."""
        if not tasks:
            return []
        begun, step = time.monotonic(), tasks[0].step
        self.work.lease.check()
        done = run_tasks(
            tasks,
            workers=1 if here or len(tasks) == 1 else self.workers,
            machines=self.work.machines,
            home=str(self.work.beside()),
            supply=self.work.supply,
            earlier=self.work.resumable(_FOLDER)[1:],
        )
        found = in_order(self._told(done, step, len(tasks)), len(tasks))
        self.seconds[step] = self.seconds.get(step, 0.0) + time.monotonic() - begun
        return found

    def _told(
        self, done: Iterable[tuple[int, Done]], step: str, total: int
    ) -> Iterator[tuple[int, Done]]:
        """The same, saying now and then how far a long step is."""
        said = time.monotonic()
        for count, one in enumerate(done, start=1):
            yield one
            if time.monotonic() - said > _TELL_SECONDS:
                said = time.monotonic()
                self.work.tracker.note(f"data, {step}: {count:,} of {total:,} shards")

    def one(self, step: str, key: Mapping[str, Any], make: Make, *needs: Path) -> Done:
        """Do a single task, in this process."""
        return self.run([self.task(step, key, make, *needs)], here=True)[0]

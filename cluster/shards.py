"""Work on shards of data: each a task of its own, in this process or as a stream of Ray Data.

What a task makes, it leaves in a folder that appears whole, under a name that says what it was made
from: a *completed* folder. Whoever asks for the same again is given it, so that a run which died
goes on where it was, and the order in which workers finish changes no byte.
"""

import json
import math
import os
import queue
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data
from ray.data import DataContext, TaskPoolStrategy

from cluster.files import sync_to_disk
from cluster.head import require_head
from cluster.session import LOOK_SECONDS, ray_cpus
from cluster.supply import Supply
from configs import errors
from configs.errors import DeadlineError, IngotError, MachineError
from configs.parallel import ClusterConfig

DONE = "done.json"
"""What a completed folder says of itself; written before the folder has its name."""
WORKER_BYTES = 1_000_000_000
"""What a worker is given of its machine's memory: Ray starts no more at a time than have room."""
SHARD_SECONDS = 3600.0
"""How long a stream may go without any shard being finished."""
_LAST_SECONDS = 10.0
"""How long a stream that is not wanted any more may take to end."""
_DRAFT = ".draft-"


@dataclass(frozen=True)
class Task:
    """One shard's part of a step. Travels to workers by value."""

    step: str
    """The step's name, for messages."""
    folder: Path
    """Where what it makes is to be; the name says of what, so that equal ones are made once."""
    make: Callable[[Path], Mapping[str, Any]]
    """Writes files into a folder, and returns what is to be known of them, as JSON values."""
    needs: tuple[Path, ...] = ()
    """Completed folders that it reads."""
    reads: Sequence[Path] = ()
    """Further ones, the same for all tasks of a step."""


@dataclass(frozen=True)
class Done:
    """A completed folder."""

    folder: Path
    facts: Mapping[str, Any]


def run_tasks(
    tasks: Sequence[Task],
    *,
    workers: int,
    machines: ClusterConfig,
    home: str,
    supply: Supply,
    earlier: Sequence[Path] = (),
) -> Iterator[tuple[int, Done]]:
    """Each task's number and what it made, as they are finished.

    What is completed already, in its place or in one of the `earlier` folders beside which the same
    name would stand, is not made again. With one worker the rest is made in this process, with more
    on Ray. The first error of a task ends the stream; what others made stays. MachineError as of
    `ray_cpus`; DeadlineError if for `SHARD_SECONDS` none is finished.
    """
    waiting = []
    for number, task in enumerate(tasks):
        found = next(filter(None, map(completed, (task.folder, *_beside(task, earlier)))), None)
        if found is None:
            waiting.append(number)
        else:
            supply.publish(found.folder, last=DONE)
            yield number, found
    if workers == 1:
        for number in waiting:
            yield number, complete(tasks[number])
            supply.publish(tasks[number].folder, last=DONE)
    elif waiting:
        asked = [tasks[number] for number in waiting]
        for at in _streamed(asked, workers, machines, home, supply):
            supply.fetch(asked[at].folder)
            done = completed(asked[at].folder)
            if done is None:
                raise MachineError(
                    f"{asked[at].step}: a worker finished {asked[at].folder}, which is not there; "
                    "mount that folder on every machine, or name a place of objects in store.url"
                )
            supply.publish(done.folder, last=DONE)
            yield waiting[at], done


def completed(folder: Path) -> Done | None:
    """What a folder holds, if it is completed and each file has the size it was given."""
    try:
        record = json.loads((folder / DONE).read_text())
        sizes = {name: (folder / name).stat().st_size for name in record["files"]}
    except (OSError, ValueError, KeyError):
        return None
    return Done(folder, record["facts"]) if sizes == record["files"] else None


def complete(task: Task) -> Done:
    """Do a task, and give its folder its name once all of it is on the disk."""
    parent = task.folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    if task.folder.exists():
        # Of a disk that lost some of it, or of a copy that was cut short.
        shutil.rmtree(task.folder, ignore_errors=True)
    draft = parent / f"{_DRAFT}{uuid.uuid4().hex}"
    draft.mkdir()
    try:
        facts = dict(task.make(draft))
        files = {}
        for path in sorted(draft.iterdir()):
            sync_to_disk(path)
            files[path.name] = path.stat().st_size
        record = json.dumps({"step": task.step, "files": files, "facts": facts}, sort_keys=True)
        (draft / DONE).write_text(record)
        sync_to_disk(draft / DONE)
        sync_to_disk(draft)
        try:
            os.rename(draft, task.folder)
        except OSError:
            # Another made the same meanwhile, as a worker does that was taken for dead.
            if completed(task.folder) is None:
                raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return Done(task.folder, facts)


def _beside(task: Task, earlier: Sequence[Path]) -> Iterator[Path]:
    """Where builds before this one would have what the task makes."""
    names = task.folder.parts[-2:]
    return (folder.joinpath(*names) for folder in earlier)


class _Crew:
    """Does a numbered task on a worker; its faults come back as words."""

    def __init__(self, tasks: Sequence[Task], supply: Supply) -> None:
        self.tasks, self.supply = tasks, supply

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        number = int(row["id"])
        task = self.tasks[number]
        fault = ""
        try:
            self.supply.arrive()
            for folder in (*task.needs, *task.reads) if self.supply.is_far else ():
                if completed(folder) is None:
                    self.supply.fetch(folder)
            complete(task)
            for path in sorted(task.folder.iterdir(), key=lambda path: path.name == DONE):
                self.supply.send(path)
        except IngotError as error:
            fault = json.dumps([type(error).__name__, str(error)])
        except MemoryError:
            fault = json.dumps(["MachineError", f"{task.step}: {socket.gethostname()} is full"])
        return {"id": number, "fault": fault}


def _streamed(
    tasks: Sequence[Task], workers: int, machines: ClusterConfig, home: str, supply: Supply
) -> Iterator[int]:
    """The numbers of the tasks, as Ray's workers finish them."""
    with ray_cpus(machines, home, cpus=workers):
        said: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
        over = threading.Event()
        drain = threading.Thread(
            target=_drain, args=(tasks, workers, supply, said, over), name="shards", daemon=True
        )
        drain.start()
        try:
            while (found := _hear(said, tasks[0].step)) is not None:
                if isinstance(found, IngotError):
                    raise found
                if isinstance(found, BaseException):
                    raise MachineError(
                        f"{tasks[0].step}: Ray lost the work on shards: {_first_line(found)}; run "
                        "again, and it goes on from the shards that are done"
                    ) from found
                yield found
        finally:
            over.set()
            # Who closes Ray behind a stream that is read still ends the process.
            drain.join(_LAST_SECONDS)


def _drain(
    tasks: Sequence[Task],
    workers: int,
    supply: Supply,
    said: "queue.SimpleQueue[int | BaseException | None]",
    over: threading.Event,
) -> None:
    """Tell of each task of the stream as it ends, then nothing."""
    try:
        context = DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        # Numbers alone pass through Ray's memory: a task reads and writes files.
        stream = ray.data.range(len(tasks), override_num_blocks=len(tasks)).map(
            _Crew(tasks, supply).__call__,
            compute=TaskPoolStrategy(size=workers),
            num_cpus=1,
            memory=WORKER_BYTES,
        )
        for row in stream.iter_rows():
            if over.is_set():
                return
            fault = json.loads(row["fault"]) if row["fault"] else None
            said.put(getattr(errors, fault[0])(fault[1]) if fault else int(row["id"]))
        said.put(None)
    except BaseException as error:  # whatever ends the thread must end the wait for it
        said.put(error)


def _hear(
    said: "queue.SimpleQueue[int | BaseException | None]", step: str
) -> int | BaseException | None:
    """What the stream says next; an interrupt is noticed meanwhile, and the loss of the head."""
    deadline = time.monotonic() + SHARD_SECONDS
    while time.monotonic() < deadline:
        require_head()
        try:
            return said.get(timeout=LOOK_SECONDS)
        except queue.Empty:
            continue
    raise DeadlineError(
        f"{step}: no worker has finished a shard for {SHARD_SECONDS:g} s; lower data.shard_bytes, "
        "and divide files that are larger"
    )


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


def workers_for(machines: ClusterConfig, total_bytes: int, *, least_bytes: int) -> int:
    """How many workers prepare so many bytes: one, which is this process, below `least_bytes`."""
    if machines.data_workers is not None:
        return machines.data_workers
    if total_bytes < least_bytes:
        return 1
    return max(1, min(os.cpu_count() or 1, math.ceil(total_bytes / least_bytes) * 2))


def in_order(results: Iterable[tuple[int, Done]], count: int) -> list[Done]:
    """What numbered tasks made, in the order of their numbers."""
    found = dict(results)
    return [found[number] for number in range(count)]

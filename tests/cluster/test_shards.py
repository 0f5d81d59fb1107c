"""Tasks on shards: what is completed is not done again, and what is half done is not taken."""

import json
import os
import signal
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import ray

from cluster import shards
from cluster.shards import DONE, Done, Task, complete, completed, run_tasks
from cluster.supply import Supply
from configs.errors import DataError, DeadlineError
from configs.parallel import ClusterConfig
from tests.supplies import local


def write(out: Path, *, text: str, log: Path) -> Mapping[str, Any]:
    """Leave a file, and a line for each time that it was called."""
    (out / "text.txt").write_text(text)
    with log.open("a") as file:
        file.write(f"{text}\n")
    return {"chars": len(text)}


def tasks(root: Path, *texts: str, builder: str = "new") -> list[Task]:
    return [
        Task("step", root / builder / "step" / text, partial(write, text=text, log=root / "log"))
        for text in texts
    ]


def run(some: list[Task], *earlier: Path) -> dict[int, Done]:
    return dict(
        run_tasks(
            some,
            workers=1,
            machines=ClusterConfig(),
            home="/",
            supply=local(some[0].folder.parents[1]),
            earlier=earlier,
        )
    )


def logged(root: Path) -> list[str]:
    return (root / "log").read_text().split() if (root / "log").exists() else []


def test_a_task_leaves_its_files_its_facts_and_no_draft(tmp_path: Path) -> None:
    (task,) = tasks(tmp_path, "one")
    assert run([task]) == {0: Done(task.folder, {"chars": 3})}
    assert completed(task.folder) == Done(task.folder, {"chars": 3})
    assert sorted(os.listdir(task.folder)) == [DONE, "text.txt"]
    assert os.listdir(task.folder.parent) == ["one"]


def test_what_is_completed_is_not_done_again(tmp_path: Path) -> None:
    run(tasks(tmp_path, "one"))
    found = run(tasks(tmp_path, "one", "two"))
    assert logged(tmp_path) == ["one", "two"]
    assert [found[n].facts["chars"] for n in (0, 1)] == [3, 3]


def test_an_earlier_builders_folder_is_taken_where_it_lies(tmp_path: Path) -> None:
    run(tasks(tmp_path, "one", builder="old"))
    found = run(tasks(tmp_path, "one", "two"), tmp_path / "none", tmp_path / "old")
    assert logged(tmp_path) == ["one", "two"]
    assert found[0].folder == tmp_path / "old" / "step" / "one"


@dataclass(frozen=True)
class Told(Supply):
    """Remembers which folders were to be in the store."""

    published: list[Path] = field(default_factory=list)

    def publish(self, folder: Path, *, last: str) -> None:
        assert last == DONE
        self.published.append(folder)


def test_what_an_earlier_builder_completed_is_in_the_store_too(tmp_path: Path) -> None:
    """It may have died between the two; workers elsewhere have it from there."""
    run(tasks(tmp_path, "one", builder="old"))
    some = tasks(tmp_path, "one", "two")
    plain = local(some[0].folder.parents[1])
    told = Told(**{one.name: getattr(plain, one.name) for one in fields(plain)})
    earlier = [tmp_path / "old"]
    machines = ClusterConfig()
    dict(run_tasks(some, workers=1, machines=machines, home="/", supply=told, earlier=earlier))
    assert told.published == [tmp_path / "old" / "step" / "one", some[1].folder]


@pytest.mark.parametrize("harm", ["cut", "gone", "no record", "other record"])
def test_a_damaged_folder_is_made_anew(tmp_path: Path, harm: str) -> None:
    (task,) = tasks(tmp_path, "one")
    run([task])
    match harm:
        case "cut":
            (task.folder / "text.txt").write_text("on")
        case "gone":
            (task.folder / "text.txt").unlink()
        case "no record":
            (task.folder / DONE).unlink()
        case _:
            (task.folder / DONE).write_text("{")
    assert completed(task.folder) is None
    run([task])
    assert logged(tmp_path) == ["one", "one"]
    assert (task.folder / "text.txt").read_text() == "one"


def test_who_fails_leaves_nothing_and_what_was_done_before_stays(tmp_path: Path) -> None:
    def fail(out: Path) -> Mapping[str, Any]:
        (out / "half").write_text("x")
        raise DataError("broken")

    good, last = tasks(tmp_path, "one", "three")
    bad = Task("step", tmp_path / "new" / "step" / "two", fail)
    with pytest.raises(DataError, match="broken"):
        run([good, bad, last])
    assert os.listdir(good.folder.parent) == ["one"]
    assert logged(tmp_path) == ["one"]


def test_two_that_make_the_same_at_once_agree(tmp_path: Path, monkeypatch: Any) -> None:
    (task,) = tasks(tmp_path, "one")
    rename = os.rename

    def late(source: Path, target: Path) -> None:
        monkeypatch.setattr("cluster.shards.os.rename", rename)
        complete(task)
        rename(source, target)

    monkeypatch.setattr("cluster.shards.os.rename", late)
    complete(task)
    assert os.listdir(task.folder.parent) == ["one"]
    assert completed(task.folder) is not None


def test_the_record_is_written_before_the_folder_has_its_name(
    tmp_path: Path, monkeypatch: Any
) -> None:
    (task,) = tasks(tmp_path, "one")
    rename, seen = os.rename, []

    def look(source: Path, target: Path) -> None:
        seen.append(json.loads((source / DONE).read_text())["files"])
        rename(source, target)

    monkeypatch.setattr("cluster.shards.os.rename", look)
    complete(task)
    assert seen == [{"text.txt": 3}]


def test_how_many_workers_prepare() -> None:
    def asked(total: int, **settings: Any) -> int:
        return shards.workers_for(ClusterConfig(**settings), total, least_bytes=100)

    assert (asked(99), asked(99, data_workers=3), asked(10**9, data_workers=1)) == (1, 3, 1)
    assert asked(10**9) == (os.cpu_count() or 1)


def on_ray(some: list[Task], machines: ClusterConfig, root: Path) -> dict[int, Done]:
    return dict(
        run_tasks(
            some,
            workers=2,
            machines=machines,
            home=str(root),
            supply=local(some[0].folder.parents[1]),
        )
    )


def test_workers_of_ray_do_what_this_process_would_and_ray_stays_open(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    run(tasks(tmp_path, "two"))
    found = on_ray(tasks(tmp_path, "one", "two", "three"), machines, tmp_path)
    assert [found[n].facts["chars"] for n in range(3)] == [3, 3, 5]
    assert sorted(logged(tmp_path)) == ["one", "three", "two"]
    assert ray.is_initialized()


def die_once(out: Path, *, mark: Path) -> Mapping[str, Any]:
    """End the worker's process the first time."""
    (out / "half").write_text("x")
    if not mark.exists():
        mark.write_text("died")
        os.kill(os.getpid(), signal.SIGKILL)
    (out / "half").unlink()
    (out / "whole").write_text("y")
    return {}


def test_a_worker_that_is_killed_costs_its_own_shard(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    dies = Task(
        "step", tmp_path / "new" / "step" / "dies", partial(die_once, mark=tmp_path / "mark")
    )
    on_ray([*tasks(tmp_path, "one"), dies], machines, tmp_path)
    assert (tmp_path / "mark").exists()
    assert sorted(os.listdir(dies.folder)) == [DONE, "whole"]
    assert logged(tmp_path) == ["one"]


def refuse(out: Path) -> Mapping[str, Any]:
    raise DataError("data.sources.mine: the field, its value and a remedy")


def test_a_fault_of_a_source_comes_back_as_it_was_said(
    machines: ClusterConfig, tmp_path: Path
) -> None:
    bad = Task("step", tmp_path / "new" / "step" / "bad", refuse)
    with pytest.raises(DataError, match="the field, its value and a remedy"):
        on_ray([bad, *tasks(tmp_path, "one")], machines, tmp_path)
    assert completed(tmp_path / "new" / "step" / "one") is not None


def test_a_stream_that_stands_still_is_told_of(
    machines: ClusterConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "SHARD_SECONDS", 0.0)
    with pytest.raises(DeadlineError, match="step: no worker has finished a shard for 0 s"):
        on_ray(tasks(tmp_path, "one"), machines, tmp_path)

"""The data stage in shards: what it made before it died is used, and changes no byte."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from configs.data import DataConfig, DataSpec
from configs.errors import DataError
from stages.artifacts import Corpus
from stages.contract import Workspace
from stages.data.loop import data
from tests.conftest import Recorder, workspace_at
from tests.stages.prose import prose

FILES = 24


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of prose of which some repeat, whole, nearly or by a paragraph."""
    folder = tmp_path / "text"
    folder.mkdir()
    notice = "Copyright of the foundry. " * 12
    for number in range(FILES):
        text = f"{notice}\n\n{prose(number, 300)}\n\n{prose(100 + number, 60)}"
        (folder / f"{number:02}.txt").write_text(text)
    (folder / "90.txt").write_text((folder / "03.txt").read_text())
    (folder / "91.txt").write_text(f"{(folder / '04.txt').read_text()} and that is all")
    (folder / "92.txt").write_text("too short")
    (folder / "93.txt").write_bytes(b"broken \xff text of some length that goes on for a while")
    return folder


def spec(folder: Path, **settings: Any) -> DataSpec:
    """A corpus of some ten shards of a source, and problems."""
    files = {"type": "files", "glob": str(folder / "*.txt"), "split_documents": False}
    sources = {
        "books": {**files, "share": 0.6, "max_broken_share": 0.5},
        "sums": {"type": "arithmetic", "share": 0.4, "max_problems": 400},
    }
    base = {
        "sources": sources,
        "train_tokens": 16_000,
        "sequence_tokens": 64,
        "shard_bytes": 16_000,
        "dedup": {"paragraphs": True},
        "tokenizer": {"vocab_size": 300},
    }
    return DataSpec(seed=0, data=DataConfig.model_validate({**base, **settings}))


def digests(corpus: Corpus) -> dict[str, str]:
    """The hash of every file of a corpus."""
    root = Path(corpus.uri)
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


class Killed(BaseException):
    """The end of a process, as far as a test can have it."""


class Tasks:
    """Counts the tasks that are done, and ends the process in the middle of one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[str] = []
        self.last: int | None = None
        rename = os.rename

        def count(source: Path, target: Path) -> None:
            if self.last is not None and len(self.done) == self.last:
                raise Killed
            rename(source, target)
            self.done.append(Path(target).parent.name)

        monkeypatch.setattr("cluster.shards.os.rename", count)


@pytest.fixture
def tasks(monkeypatch: pytest.MonkeyPatch) -> Tasks:
    return Tasks(monkeypatch)


def test_whichever_task_was_the_last_the_rerun_redoes_that_one_and_no_byte_differs(
    folder: Path, tmp_path: Path, recorder: Recorder, tasks: Tasks
) -> None:
    whole = digests(data(spec(folder), workspace_at(tmp_path / "whole", recorder)))
    every = tasks.done
    assert Counter(every)["read"] >= 4
    assert {"dedup", "decide", "clean", "tokenizer", "encode", "draw", "order", "rows"} < {*every}
    # The second task of each step, where it has one, and all that there is only one of.
    chosen = {step: at for at, step in reversed(list(enumerate(every)))}
    chosen |= {
        step: every.index(step, at + 1) for step, at in chosen.items() if every.count(step) > 1
    }
    for last in sorted(chosen.values()):
        tasks.done, tasks.last = [], last
        died = workspace_at(tmp_path / f"died-{last}", recorder)
        with pytest.raises(Killed):
            data(spec(folder), died)
        tasks.done, tasks.last = [], None
        again = workspace_at(tmp_path / f"again-{last}", recorder, earlier=(str(died.beside()),))
        assert digests(data(spec(folder), again)) == whole, every[last]
        assert tasks.done == every[last:], every[last]


def test_a_file_that_changed_costs_its_own_shard_and_what_follows_from_it(
    folder: Path, tmp_path: Path, recorder: Recorder, tasks: Tasks
) -> None:
    first = workspace_at(tmp_path / "first", recorder)
    data(spec(folder), first)
    text = (folder / "12.txt").read_text()
    (folder / "12.txt").write_text(text.replace("ingot", "tulip"))
    tasks.done = []
    data(
        spec(folder),
        workspace_at(tmp_path / "second", recorder, earlier=(str(first.beside()),)),
    )
    assert Counter(tasks.done)["read"] == 1


def test_how_a_source_is_divided_moves_documents_and_loses_none(
    folder: Path, make_workspace: Callable[..., Workspace]
) -> None:
    fine, coarse = (
        data(spec(folder, shard_bytes=size), make_workspace(str(size))) for size in (3_000, 10**6)
    )
    kept = []
    for corpus in (fine, coarse):
        tables = [pq.read_table(path) for path in sorted(corpus.path("documents").iterdir())]
        kept.append([one for table in tables for one in table.column("document").to_pylist()])
    assert len(list(fine.path("documents").iterdir())) > 20
    assert len(list(coarse.path("documents").iterdir())) == 1
    assert kept[0] == kept[1] and len(kept[0]) == FILES


def test_a_source_that_changes_while_it_is_read_is_named(
    folder: Path, workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename = os.rename
    changed: list[Path] = []

    def change(source: Path, target: Path) -> None:
        rename(source, target)
        if not changed:
            changed.append(target)
            (folder / "20.txt").write_text("another text " * 40)

    monkeypatch.setattr("cluster.shards.os.rename", change)
    with pytest.raises(DataError, match=r"20\.txt changed while the source was read"):
        data(spec(folder), workspace)


def test_more_that_is_broken_than_may_be_fails_with_the_first_place(
    folder: Path, workspace: Workspace
) -> None:
    sources = spec(folder).model_dump()["data"]["sources"]
    sources["books"]["max_broken_share"] = 0.0001
    with pytest.raises(DataError, match=r"max_broken_share = 0\.0001.*93\.txt.*0xff at offset 7"):
        data(spec(folder, sources=sources), workspace)


def test_each_fate_is_counted_and_adds_up(folder: Path, workspace: Workspace) -> None:
    from_file = data(spec(folder), workspace).path("statistics.json").read_text()

    books = json.loads(from_file)["sources"]["books"]
    dropped = books["documents_dropped"]
    assert dropped["exact_duplicate"] == dropped["min_chars"] == dropped["broken_encoding"] == 1
    assert dropped["near_duplicate"] == 1
    assert books["documents_cut"]["repeated_paragraph"] >= FILES // 2
    left = books["train_documents"] + books["held_out_documents"]
    gone = sum(count for rule, count in dropped.items() if rule != "broken_encoding")
    assert books["documents_read"] == left + gone


def test_ids_that_are_not_unique_are_counted_and_told(
    tmp_path: Path, workspace: Workspace, recorder: Recorder
) -> None:
    rows = [{"text": prose(n, 200), "url": f"page-{min(n, 30)}"} for n in range(40)]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {"type": "files", "glob": str(path), "id_field": "url", "share": 1.0}
    corpus = data(spec(tmp_path, sources={"mine": files}, train_tokens=2_000), workspace)
    facts = json.loads(corpus.path("statistics.json").read_text())["sources"]["mine"]
    assert facts["repeated_ids"] == 9
    assert any("sources.mine.id_field = 'url': 9 documents bear" in one for one in recorder.notes)


def test_keys_fill_the_range_that_buckets_divide(folder: Path, workspace: Workspace) -> None:
    """Windows are sampled by their hashes, of which the smallest are taken."""
    data(spec(folder), workspace)
    for name in ("sketch", "bands", "paragraphs"):
        found = workspace.beside().glob(f"resume/data/read/*/{name}_keys.npy")
        keys = np.concatenate([np.load(path) for path in found])
        assert len(keys) > 20
        assert np.median(keys) == pytest.approx(2.0**63, rel=0.3)

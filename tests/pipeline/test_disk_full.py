"""A disk that fills up in the middle of a stage: one sentence, and the next run goes on."""

import errno
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.files import says_disk_is_full
from configs.errors import DataError, MachineError, StoreError
from configs.parallel import StoreConfig
from pipeline.graph import make_graph
from stages.artifacts import Corpus
from stages.contract import Workspace, stage
from tests.pipeline.fakes import FakeConfig, World, failed, gather, outcomes

BLOCK = b"x" * 64 * 1024


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount(folder, "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=30)


def mount(folder: Path, *words: str) -> None:
    done = subprocess.run(
        ["mount", *words, str(folder)], capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode:
        pytest.skip(f"no disk can be mounted here: {done.stderr.strip()}")


@stage(revision=1)
def large(config: FakeConfig, work: Workspace) -> Corpus:
    """Saves a step to resume from, then writes more than the small disk holds."""
    (mine, *earlier) = work.resumable("step.json")
    work.path("resumed.txt").write_text("".join(path.read_text() for path in earlier))
    mine.parent.mkdir()
    mine.write_text("step 7")
    with work.path("text.bin").open("wb", buffering=0) as file:
        for _ in range(32):
            file.write(BLOCK)
    return gather.run(FakeConfig(), work)


@stage(revision=1)
def other(config: FakeConfig, work: Workspace) -> Corpus:
    """A corpus of one file."""
    return gather.run(config, work)


def test_a_disk_that_fills_up_ends_the_node_with_one_sentence_and_the_next_run_goes_on(
    small: Path,
) -> None:
    world = World(StoreConfig(url=str(small / "store"), min_free_bytes=0))
    line = {"first": other(FakeConfig()), "large": large(FakeConfig())}
    graph = make_graph(line, world.store.hashes)
    run = world.run(graph=graph)
    assert outcomes(run) == {"first": "built", "large": "failed"}
    assert not run.succeeded
    error = failed(run, "large").error
    assert f"; no room left on the disk of {world.store.root} (" in error
    assert error.endswith("and the same command goes on from them")
    mount(small, "-o", "remount,size=16m")
    again = world.run(graph=graph)
    assert outcomes(again) == {"first": "reused", "large": "built"}
    # What was saved before the disk was full is what the next builder begins with.
    assert (world.files(again, "large") / "resumed.txt").read_text() == "step 7"


def test_a_store_that_cannot_be_opened_on_a_full_disk_says_so(small: Path) -> None:
    with pytest.raises(OSError, match="No space left"), (small / "all").open("wb", 0) as file:
        while file.write(BLOCK):
            pass
    world = World(StoreConfig(url=str(small / "store"), min_free_bytes=0))
    with pytest.raises(StoreError, match="free some"):
        world.run(graph=make_graph({"first": other(FakeConfig())}, world.store.hashes))


def test_the_systems_words_are_known_wherever_they_stand() -> None:
    words = os.strerror(errno.ENOSPC)
    assert says_disk_is_full(OSError(errno.ENOSPC, "whatever"))
    assert says_disk_is_full(OSError(errno.EDQUOT, "whatever"))
    assert says_disk_is_full(MachineError(f"trainer 0: SafetensorError: I/O error: {words}"))
    noted = MachineError("training workers failed")
    assert not says_disk_is_full(noted)
    # What a worker printed on its way may be of any disk.
    noted.add_note(f"the last lines of trainer-0.log:\n  OSError: {words}")
    assert not says_disk_is_full(noted)
    behind = DataError("cannot be written")
    behind.__cause__ = OSError(errno.ENOSPC, words)
    assert says_disk_is_full(behind)
    assert not says_disk_is_full(OSError(errno.EACCES, os.strerror(errno.EACCES)))

"""Hashes of files outside: each version is read once, and no stale hash is ever believed."""

import hashlib
import io
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem

from cluster import place
from stages import hashing
from stages.hashing import HashedReader, Hashes, hash_whole
from stages.manifest import FileEntry

SETTLED_SECONDS = hashing._SETTLED_SECONDS


def entry_of(data: bytes) -> FileEntry:
    return FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each file was read to be hashed."""
    counted: Counter[str] = Counter()
    real = hash_whole

    def count(path: str) -> FileEntry:
        counted[Path(path).name] += 1
        return real(path)

    monkeypatch.setattr(hashing, "hash_whole", count)
    return counted


@pytest.fixture(autouse=True)
def _fine_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here times of change have ticks of milliseconds: what is judged long ago need not be long."""
    monkeypatch.setattr(hashing, "_SETTLED_SECONDS", 0.1)


def settled(path: Path, data: bytes) -> Path:
    """A file that was last changed long enough ago."""
    path.write_bytes(data)
    time.sleep(hashing._SETTLED_SECONDS * 1.5)
    return path


def test_a_file_is_read_once_by_all_that_share_a_store(tmp_path: Path, reads: Counter[str]) -> None:
    file = settled(tmp_path / "text.txt", b"text")
    for _ in range(3):
        one = Hashes(tmp_path / "store" / "hashes")
        assert one.of(str(file)) == one.of(str(file)) == entry_of(b"text")
    assert reads == {"text.txt": 1}


def test_without_a_folder_it_is_remembered_in_the_process_alone(
    tmp_path: Path, reads: Counter[str]
) -> None:
    file = settled(tmp_path / "text.txt", b"text")
    one, other = Hashes(), Hashes()
    for hashes in (one, one, other):
        assert hashes.of(str(file)) == entry_of(b"text")
    assert reads["text.txt"] == 2


def rewrite(file: Path) -> None:
    file.write_bytes(b"TEXT")


def rewrite_with_the_old_time(file: Path) -> None:
    found = file.stat()
    file.write_bytes(b"TEXT")
    os.utime(file, ns=(found.st_atime_ns, found.st_mtime_ns))


def replace_with_the_old_time(file: Path) -> None:
    found = file.stat()
    other = file.with_name("other")
    other.write_bytes(b"TEXT")
    os.utime(other, ns=(found.st_atime_ns, found.st_mtime_ns))
    other.replace(file)


def copy_over_with_all_its_times(file: Path) -> None:
    other = file.with_name("other")
    other.write_bytes(b"TEXT")
    shutil.copystat(file, other)
    file.unlink()
    shutil.copy2(other, file)


@pytest.mark.parametrize(
    "change",
    [
        rewrite,
        rewrite_with_the_old_time,
        replace_with_the_old_time,
        copy_over_with_all_its_times,
    ],
)
def test_a_file_of_equal_size_and_time_is_no_equal_file(
    tmp_path: Path, change: Callable[[Path], None]
) -> None:
    file = settled(tmp_path / "text.txt", b"text")
    folder = tmp_path / "hashes"
    assert Hashes(folder).of(str(file)) == entry_of(b"text")
    change(file)
    assert Hashes(folder).of(str(file)) == entry_of(b"TEXT")


def test_a_touched_file_is_read_again_and_is_what_it_was(
    tmp_path: Path, reads: Counter[str]
) -> None:
    file = settled(tmp_path / "text.txt", b"text")
    hashes = Hashes(tmp_path / "hashes")
    before = hashes.of(str(file))
    os.utime(file)
    assert hashes.of(str(file)) == before
    assert reads["text.txt"] == 2


def test_what_changed_a_moment_ago_is_not_remembered(tmp_path: Path, reads: Counter[str]) -> None:
    """A second change within the same tick of the clock would leave the same stamp."""
    file, hashes = tmp_path / "text.txt", Hashes(tmp_path / "hashes")
    file.write_bytes(b"text")
    for _ in range(2):
        assert hashes.of(str(file)) == entry_of(b"text")
    assert reads["text.txt"] == 2
    assert not (tmp_path / "hashes").exists()


@pytest.mark.parametrize(("age_seconds", "reads_needed"), [(2.1, 2), (2.6, 1)])
def test_a_tick_may_last_two_seconds(
    tmp_path: Path,
    reads: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    age_seconds: float,
    reads_needed: int,
) -> None:
    monkeypatch.setattr(hashing, "_SETTLED_SECONDS", SETTLED_SECONDS)
    file, hashes = tmp_path / "text.txt", Hashes()
    file.write_bytes(b"text")
    later_ns = file.stat().st_ctime_ns + int(age_seconds * 1e9)
    monkeypatch.setattr(time, "time_ns", lambda: later_ns)
    for _ in range(2):
        hashes.of(str(file))
    assert reads["text.txt"] == reads_needed


def test_two_changes_in_one_tick_between_which_a_file_is_hashed_are_not_confused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once it is hashed, the first change is long ago."""
    file, hashes = tmp_path / "text.txt", Hashes(tmp_path / "hashes")
    file.write_bytes(b"text")
    real_hash, real_stamp = hash_whole, place.stamp
    stamp = real_stamp(str(file))

    def slow(path: str) -> FileEntry:
        entry = real_hash(path)
        file.write_bytes(b"TEXT")
        time.sleep(hashing._SETTLED_SECONDS * 1.5)
        return entry

    monkeypatch.setattr(place, "stamp", lambda path: stamp)
    monkeypatch.setattr(hashing, "hash_whole", slow)
    hashes.of(str(file))
    monkeypatch.setattr(hashing, "hash_whole", real_hash)
    assert hashes.of(str(file)) == entry_of(b"TEXT")


def test_a_file_that_changes_while_it_is_hashed_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, hashes = settled(tmp_path / "text.txt", b"text"), Hashes(tmp_path / "hashes")
    real = hash_whole

    def change(path: str) -> FileEntry:
        entry = real(path)
        file.write_bytes(b"other")
        return entry

    monkeypatch.setattr(hashing, "hash_whole", change)
    hashes.of(str(file))
    monkeypatch.setattr(hashing, "hash_whole", real)
    assert hashes.of(str(file)) == entry_of(b"other")


@pytest.mark.parametrize("text", ["", "[]", '{"stamp": {}}', '{"stamp": 1, "entry": {}}'])
def test_a_memory_that_is_damaged_costs_a_read_and_nothing_else(
    tmp_path: Path, reads: Counter[str], text: str
) -> None:
    file, folder = settled(tmp_path / "text.txt", b"text"), tmp_path / "hashes"
    Hashes(folder).of(str(file))
    (memory,) = folder.iterdir()
    memory.write_text(text)
    assert Hashes(folder).of(str(file)) == entry_of(b"text")
    assert reads["text.txt"] == 2
    assert json.loads(memory.read_text())["entry"]["bytes"] == 4


def test_a_store_that_cannot_be_written_only_forgets(tmp_path: Path, reads: Counter[str]) -> None:
    file = settled(tmp_path / "text.txt", b"text")
    (tmp_path / "hashes").write_text("a file")
    for _ in range(2):
        assert Hashes(tmp_path / "hashes").of(str(file)) == entry_of(b"text")
    assert reads["text.txt"] == 2


class Tagged(MemoryFileSystem):
    """Files elsewhere, with or without what tells their versions apart."""

    cachable = False
    tag: str | None = None

    def info(self, path: str, **kwargs: object) -> dict[str, object]:
        found = dict(super().info(path, **kwargs))
        return {**found, "ETag": self.tag} if self.tag else found


@pytest.mark.parametrize(("tags", "read"), [(("a", "a"), 1), (("a", "b"), 2), ((None, None), 2)])
def test_elsewhere_an_etag_says_whether_a_file_is_the_same(
    tmp_path: Path,
    reads: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
    tags: tuple[str | None, str | None],
    read: int,
) -> None:
    fs, hashes = Tagged(), Hashes(tmp_path / "hashes")
    monkeypatch.setattr(place, "_open", lambda address: (fs, "/text.txt"))
    fs.pipe_file("/text.txt", b"text")
    for tag in tags:
        fs.tag = tag
        assert hashes.of("memory://text.txt") == entry_of(b"text")
    assert reads["text.txt"] == read


def test_a_reader_hashes_what_it_reads() -> None:
    data = b"one\ntwo\r\nthree" * 200_000
    chunks = HashedReader(io.BytesIO(data))
    first = next(chunks.chunks())
    assert chunks.entry == entry_of(first) != entry_of(data)
    assert first + b"".join(chunks.chunks()) == data
    assert chunks.entry == entry_of(data)


def test_a_local_path_may_hold_two_colons(tmp_path: Path) -> None:
    folder = tmp_path / "zip::x"
    folder.mkdir()
    file = settled(folder / "text.txt", b"text")
    assert Hashes(tmp_path / "hashes").of(str(file)) == entry_of(b"text")

"""Promises of reading raw text: what is read, and what is said when it cannot be."""

import hashlib
import itertools
import json
import platform
import sysconfig
import time
import tracemalloc
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.local import LocalFileSystem
from hypothesis import given
from hypothesis import strategies as st

from configs.data import ArithmeticSource, FilesSource, StdlibSource
from configs.errors import DataError
from stages.data.files import split_text
from stages.data.reads import identify
from stages.hashing import Hashes
from stages.manifest import FileEntry
from tests.stages.reading import read_files, read_source, read_stdlib


def source(glob: object, **settings: object) -> FilesSource:
    return FilesSource.model_validate({"share": 1.0, "glob": str(glob), **settings})


def complaint(files: FilesSource) -> str:
    with pytest.raises(DataError) as caught:
        read_files("mine", files, Hashes())
    said = str(caught.value)
    assert said.startswith(f"data.sources.mine.glob = {files.glob!r}: ")
    assert "; " in said, "no remedy"
    return said


def broken(files: FilesSource) -> str:
    """What is said of a source of which more is broken than may be."""
    with pytest.raises(DataError) as caught:
        read_files("mine", files, Hashes())
    said = str(caught.value)
    assert said.startswith("data.sources.mine.max_broken_share = 0.01: ")
    assert f"data.sources.mine.glob = {files.glob!r}" in said
    assert "; " in said, "no remedy"
    assert said.endswith("; or raise the limit")
    return said


def test_the_library_is_read_whole_file_by_whole_file() -> None:
    library = Path(sysconfig.get_paths()["stdlib"])
    documents = read_stdlib("stdlib", StdlibSource(share=1, max_bytes=300_000), seed=0).documents
    assert len(documents) > 3
    for document in documents:
        assert document.text == (library / document.id).read_text(encoding="utf-8")
        assert not {"site-packages", "test", "idlelib"} & set(Path(document.id).parts)


def test_the_library_keeps_to_its_budget_and_fills_it() -> None:
    reading = read_stdlib("stdlib", StdlibSource(share=1, max_bytes=300_000), seed=0)
    total = sum(len(document.text.encode()) for document in reading.documents)
    assert 290_000 < total <= 300_000
    whole = read_stdlib("stdlib", StdlibSource(share=1, max_bytes=10**9), seed=0)
    assert (whole.unread_files, whole.unread_bytes) == (0, 0)
    assert reading.unread_files == len(whole.documents) - len(reading.documents)
    assert reading.unread_bytes > 20 * 300_000


def test_the_seed_decides_which_files_of_the_library_are_read() -> None:
    small = StdlibSource(share=1, max_bytes=200_000)
    first, again, other = (
        [document.id for document in read_stdlib("stdlib", small, seed=seed).documents]
        for seed in (0, 0, 1)
    )
    assert first == again
    assert set(first) != set(other)


def test_text_lines_and_tables_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffplain é", encoding="utf-8")
    records = [{"body": "one"}, {"body": "half \ud800 pair"}]
    (tmp_path / "b.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    pq.write_table(pa.table({"body": ["two", None], "n": [1, 2]}), tmp_path / "c.parquet")
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "d.txt").write_text("three")
    found = read_files("mine", source(tmp_path / "**" / "*.*", text_field="body"), Hashes())
    assert [(document.id, document.text) for document in found.documents] == [
        ("a.txt", "plain é"),
        ("b.jsonl", "one"),
        ("b.jsonl#1", "half ��� pair"),
        ("c.parquet", "two"),
        ("c.parquet#1", ""),
        ("deep/d.txt", "three"),
    ]


def test_files_are_read_up_to_the_budget(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    for max_bytes, read, unread_files in ((250, ["a.txt", "b.txt"], 1), (199, ["a.txt"], 2)):
        found = read_files("mine", source(tmp_path / "*.txt", max_bytes=max_bytes), Hashes())
        assert [document.id for document in found.documents] == read
        assert (found.unread_files, found.unread_bytes) == (unread_files, 100 * unread_files)


def test_a_budget_that_just_suffices_cuts_nothing(tmp_path: Path) -> None:
    for name in "abc":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    found = read_files("mine", source(tmp_path / "*.txt", max_bytes=300), Hashes())
    assert (len(found.documents), found.unread_files, found.unread_bytes) == (3, 0, 0)


@pytest.mark.parametrize("event", ["rewritten", "removed", "added"])
def test_a_file_that_changes_while_the_source_is_read_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, event: str
) -> None:
    for name in "ab":
        (tmp_path / f"{name}.txt").write_text(name * 100)
    changed = tmp_path / ("c.txt" if event == "added" else "a.txt")

    def split(parts: Iterable[str]) -> Iterator[str]:
        if event == "removed":
            changed.unlink(missing_ok=True)
        else:
            changed.write_text("z" * 100)
        yield from parts

    monkeypatch.setattr("stages.data.files.split_text", split)
    said = complaint(source(tmp_path / "*.txt"))
    assert f"{changed.name} changed while the source was read: " in said
    assert ("no file before" in said, "no file after" in said) == (
        event == "added",
        event == "removed",
    )


def test_a_glob_that_matches_nothing_is_an_error(tmp_path: Path) -> None:
    assert "matches no file" in complaint(source(tmp_path / "*.txt"))


@pytest.mark.parametrize("glob", ["nosuch://bucket/*.txt", "s3//", "http://[bad/*.txt"])
def test_an_address_that_cannot_be_read_is_an_error(glob: str) -> None:
    complaint(source(glob))


def test_an_unknown_kind_of_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.pdf").write_text("x")
    assert "a.pdf ends in 'pdf'" in complaint(source(tmp_path / "*"))


def test_a_file_that_cannot_be_opened_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.txt").write_text("x")

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError("permission denied")

    monkeypatch.setattr("fsspec.implementations.local.LocalFileSystem.open", refuse)
    assert "cannot be read: permission denied" in complaint(source(tmp_path / "*.txt"))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_undecodable_bytes_are_an_error_with_their_place(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": 1}\n'[:0] + b"abc\xff")
    assert f"{name} has byte 0xff at offset 3" in broken(source(tmp_path / "*"))


def test_a_later_line_that_is_undecodable_is_placed_in_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "x"}\n\xfe\n')
    assert "byte 0xfe at offset 14" in broken(source(tmp_path / "*"))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"body": "x"}', "line 2 has no text in 'text', only: body"),
        ('{"text": 3}', "line 2 has no text in 'text', only: text"),
        ("[1]", "line 2 has no text in 'text', only: list"),
        ('{"text": ', "line 2 is not JSON"),
    ],
)
def test_a_line_without_the_field_is_an_error(tmp_path: Path, line: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line)
    assert said in broken(source(tmp_path / "*.jsonl"))


def test_a_table_without_the_column_is_an_error(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": [1], "body": ["x"]}), tmp_path / "a.parquet")
    said = broken(source(tmp_path / "*.parquet"))
    assert "no text column 'text', only: text (int64), body (string)" in said
    assert "data.sources.mine.text_field" in said


def test_a_damaged_table_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1 nothing of the kind")
    assert "a.parquet is not readable Parquet" in broken(source(tmp_path / "*.parquet"))


@given(
    st.text(alphabet=st.sampled_from("ab \n\r"), max_size=300),
    st.integers(5, 40),
    st.lists(st.integers(0, 300), max_size=6),
)
def test_pieces_do_not_depend_on_how_the_text_comes(
    text: str, size: int, places: list[int]
) -> None:
    ends = sorted({0, *(place for place in places if place < len(text)), len(text)})
    parts = [text[start:end] for start, end in itertools.pairwise(ends)]
    whole = list(split_text([text], piece_chars=size))
    assert list(split_text(parts, piece_chars=size)) == whole


@given(st.text(alphabet=st.sampled_from("ab \n\r"), max_size=200), st.integers(5, 40))
def test_pieces_joined_are_the_text_without_its_empty_stretches(text: str, size: int) -> None:
    pieces = list(split_text([text], piece_chars=size))
    assert all(len(piece) <= size and piece.strip() for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    rest = text
    for piece in pieces:
        _, found, rest = rest.partition(piece)
        assert found


def test_pieces_end_at_blank_lines_where_they_can() -> None:
    paragraphs = [f"{n} " * 30 + "\n\n" for n in range(40)]
    pieces = list(split_text(["".join(paragraphs)], piece_chars=200))
    assert all(piece.endswith("\n\n") for piece in pieces)
    assert "".join(pieces) == "".join(paragraphs)


def test_a_large_file_is_read_no_further_than_needed_and_hashed_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.txt"
    line = "a line of some length that says nothing at all\n"
    with path.open("w") as file:
        for _ in range(40):
            file.write(line * 20_000)
    size = path.stat().st_size
    monkeypatch.setattr("stages.hashing._SETTLED_SECONDS", 0.1)
    time.sleep(0.2)  # A file that changed a moment ago may change again unseen.
    read: list[int] = []
    opened = LocalFileSystem.open

    def count(self: LocalFileSystem, name: str, *args: Any, **kwargs: Any) -> Any:
        file = opened(self, name, *args, **kwargs)
        plain = file.read

        def reading(length: int = -1) -> bytes:
            data: bytes = plain(length)
            read.append(len(data))
            return data

        file.read = reading
        return file

    monkeypatch.setattr(LocalFileSystem, "open", count)
    tracemalloc.start()
    hashes = Hashes(tmp_path / "hashes")
    given_source = source(path, max_bytes=1_000_000)
    for _ in range(3):
        identify("mine", given_source, hashes)
    found = read_files("mine", given_source, hashes)
    identify("mine", given_source, Hashes(tmp_path / "hashes"))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (found.unread_files, found.unread_bytes) == (1, size)
    assert size <= sum(read) <= size + 4_000_000
    assert max(read) <= 1 << 20
    assert peak < 12_000_000


def test_what_was_read_is_what_was_hashed(tmp_path: Path) -> None:
    class Stale(Hashes):
        """Remembers a hash that no longer holds, as a clock or a file system may make it do."""

        def of(self, path: str, fs: Any = None) -> FileEntry:
            return FileEntry(bytes=3, sha256=hashlib.sha256(b"old").hexdigest())

    for name in ("a.txt", "a.jsonl"):
        (tmp_path / name).write_text('{"text": "new"}\n')
        with pytest.raises(DataError, match=f"{name} changed while the source was read: 3 bytes"):
            read_files("mine", source(tmp_path / name), Stale())


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.parquet"])
def test_a_git_lfs_pointer_is_an_error_that_says_how_to_fetch_the_file(
    tmp_path: Path, name: str
) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / name).write_text(pointer)
    said = complaint(source(tmp_path / "*"))
    assert f"{name} is a git-lfs pointer" in said
    assert "git lfs pull" in said


@pytest.mark.parametrize("chunk", [1, 2, 3, 5])
def test_letters_cut_by_the_reading_are_whole_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int
) -> None:
    monkeypatch.setattr("stages.hashing._CHUNK_BYTES", chunk)
    (tmp_path / "a.txt").write_bytes("\ufeffé🙂漢 x".encode())
    (document,) = read_files("mine", source(tmp_path / "*.txt"), Hashes()).documents
    assert document.text == "é🙂漢 x"
    (tmp_path / "a.txt").write_bytes("\ufeffé🙂".encode() + b"\xff")
    assert "byte 0xff at offset 9" in broken(source(tmp_path / "*.txt"))


def test_files_enter_identity_by_name_and_content_not_by_place(tmp_path: Path) -> None:
    for folder in ("here", "there"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("same")
    here, there = (
        identify("mine", source(tmp_path / name / "*.txt"), Hashes()) for name in ("here", "there")
    )
    assert here == there
    assert list(here) == ["a.txt"]
    (tmp_path / "there" / "a.txt").write_text("else")
    assert identify("mine", source(tmp_path / "there" / "*.txt"), Hashes()) != here


def test_the_library_enters_identity_by_version_and_arithmetic_not_at_all() -> None:
    assert identify("a", StdlibSource(share=1), Hashes()) == {"python": platform.python_version()}
    assert identify("a", ArithmeticSource(share=1), Hashes()) == {}


@pytest.mark.parametrize("max_bytes", [0, 99, 250, 300, 350, 1_000])
def test_what_is_read_does_not_depend_on_how_files_are_divided(
    tmp_path: Path, max_bytes: int
) -> None:
    for name in "abcdef":
        (tmp_path / f"{name}.txt").write_text("".join(f"{name}{n:08}\n" for n in range(10)))
    given = source(tmp_path / "*.txt", max_bytes=max(1, max_bytes))
    one, many = (read_source("mine", given, Hashes(), shard_bytes=size) for size in (10**6, 250))
    assert one == many
    assert sum(len(one.text) for one in many.documents) <= max(1, max_bytes)
    assert len(many.documents) == min(6, max_bytes // 100)
    assert many.unread_files == 6 - len(many.documents)

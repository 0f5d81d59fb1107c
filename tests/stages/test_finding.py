"""Promises of finding files: which ones a glob names, and what is said of those that are none."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest

from configs.data import FilesSource
from configs.errors import DataError
from stages.data.reads import identify
from stages.hashing import Hashes
from tests.stages.reading import read_files

pytestmark = pytest.mark.timeout(30)
ODD_NAMES = [
    "a[1]",
    "[ab]",
    "a::b",
    "zip::x",
    "what?",
    "n#1",
    "a b",
    "a%20b",
    "žluť 漢",
    "~who",
    "*",
]


def source(glob: object) -> FilesSource:
    return FilesSource(share=1.0, glob=str(glob))


def labels(glob: object) -> list[str]:
    """The names under which the files that `glob` names are read, and enter identity."""
    planned = list(identify("mine", source(glob), Hashes()))
    read = [document.id for document in read_files("mine", source(glob), Hashes()).documents]
    assert read == planned
    return planned


def planned(glob: object) -> list[str]:
    return list(identify("mine", source(glob), Hashes()))


def complaint(glob: object) -> str:
    with pytest.raises(DataError) as caught:
        identify("mine", source(glob), Hashes())
    said = str(caught.value)
    assert said.startswith(f"data.sources.mine.glob = {str(glob)!r}: ")
    assert "; " in said, "no remedy"
    assert said.count("data.sources.mine") == 1, "an error within an error"
    said.encode()
    return said


def write(path: Path, text: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_path_that_exists_as_written_is_that_file(tmp_path: Path, name: str) -> None:
    write(tmp_path / f"{name}.txt")
    for other in ("a1.txt", "a.txt", "whatx.txt", "b.txt"):
        write(tmp_path / other)
    assert labels(tmp_path / f"{name}.txt") == [f"{name}.txt"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_folder_that_exists_as_written_begins_a_pattern(tmp_path: Path, name: str) -> None:
    write(tmp_path / name / f"{name}.txt")
    write(tmp_path / name / name / "deep.txt")
    for other in ("a1", "a", "whatx", "b"):
        write(tmp_path / other / "other.txt")
    assert labels(tmp_path / name / "*.txt") == [f"{name}.txt"]
    assert labels(tmp_path / name / "**" / "*.txt") == sorted([f"{name}.txt", f"{name}/deep.txt"])
    assert labels(tmp_path / name / name / "*.txt") == ["deep.txt"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_file_of_any_name_is_found_by_a_pattern(tmp_path: Path, name: str) -> None:
    write(tmp_path / "x" / f"{name}.txt")
    for glob in ("*/*.txt", "**/*.txt", "x/*"):
        assert [one.rpartition("/")[2] for one in labels(tmp_path / glob)] == [f"{name}.txt"]


def test_a_local_address_is_read_as_a_path(tmp_path: Path) -> None:
    write(tmp_path / "a[1]" / "n#1?.txt")
    assert labels(f"file://{tmp_path}/a[1]/*.txt") == ["n#1?.txt"]
    assert labels(f"file://{tmp_path}/a[1]/n#1?.txt") == ["n#1?.txt"]


def test_what_does_not_exist_as_written_is_a_pattern(tmp_path: Path) -> None:
    for name in ("a1", "a2", "b1", "ax"):
        write(tmp_path / name / "t.txt")
    assert labels(tmp_path / "a[12]" / "t.txt") == ["a1/t.txt", "a2/t.txt"]
    assert labels(tmp_path / "a[!1]" / "?.txt") == ["a2/t.txt", "ax/t.txt"]
    assert labels(tmp_path / "?1" / "*") == ["a1/t.txt", "b1/t.txt"]


def test_two_stars_stand_for_folders_of_any_depth(tmp_path: Path) -> None:
    for name in ("a.txt", "x/b.txt", "x/y/c.txt", "x/y/z.txt/d.txt", "w/y/e.txt"):
        write(tmp_path / name)
    everything = ["a.txt", "w/y/e.txt", "x/b.txt", "x/y/c.txt", "x/y/z.txt/d.txt"]
    for glob in ("**", "**/*", "**/*.txt", "**/**/*.txt"):
        assert labels(tmp_path / glob) == everything
    assert labels(tmp_path / "**" / "y" / "*.txt") == ["w/y/e.txt", "x/y/c.txt"]
    assert labels(tmp_path / "x" / "**" / "[b-d].txt") == ["b.txt", "y/c.txt", "y/z.txt/d.txt"]


def test_two_stars_beside_other_letters_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "x" / "a.txt")
    assert "'**.txt'" in complaint(tmp_path / "**.txt")


def test_a_folder_stands_for_all_that_can_be_read_below_it(tmp_path: Path) -> None:
    for name in ("c.txt", "b/d.jsonl.gz", "b/e.PY", "b/deep/f.parquet", "x/g.md"):
        write(tmp_path / "a" / name, "")
    for name in ("LICENSE", "b/h.png", "b/.i.txt", ".j/k.txt", "_SUCCESS"):
        write(tmp_path / "a" / name, "")
    every = ["b/d.jsonl.gz", "b/deep/f.parquet", "b/e.PY", "c.txt", "x/g.md"]
    for glob in (f"{tmp_path}/a", f"{tmp_path}/a/"):
        assert planned(glob) == every
    assert planned(tmp_path / "a" / "[bx]") == [one for one in every if "/" in one]
    assert planned(tmp_path / "*") == [f"a/{one}" for one in every]
    assert planned(tmp_path / "a" / "*") == ["LICENSE", *every], "named, so taken"
    assert planned(tmp_path / "a" / "**" / "[cd]*") == ["b/d.jsonl.gz", "c.txt"]
    write(tmp_path / "none" / "h.png")
    assert "is a folder without a file whose suffix" in complaint(tmp_path / "none")


def test_linked_folders_are_taken_once_where_folders_are_named(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.txt")
    (tmp_path / "also").symlink_to("real")
    (tmp_path / "real" / "up").symlink_to("..")
    assert planned(tmp_path / "*") == ["real/a.txt"]
    assert planned(tmp_path) == ["real/a.txt"]
    assert planned(tmp_path / "also") == ["a.txt"]


def test_a_folder_of_an_address_stands_for_what_is_below_it() -> None:
    fs = fsspec.filesystem("memory")
    for name in ("all/b.txt", "all/c/d.jsonl", "all/c/e.png", "all/.git/f.txt"):
        fs.pipe(f"/{name}", b"text")
    try:
        for glob in ("memory://all", "memory://all/"):
            assert planned(glob) == ["b.txt", "c/d.jsonl"]
        assert planned("memory://all/*") == ["b.txt", "c/d.jsonl"]
        assert planned("memory://al*") == ["all/b.txt", "all/c/d.jsonl"]
    finally:
        fs.rm("/all", recursive=True)


def test_hidden_files_and_folders_are_left_out_unless_they_are_named(tmp_path: Path) -> None:
    for name in (".git/a.txt", "x/.cache/b.txt", "x/.c.txt", "x/d.txt", "lost+found/e.txt"):
        write(tmp_path / name)
    assert labels(tmp_path / "**" / "*.txt") == ["x/d.txt"]
    assert labels(tmp_path / "*" / "*.txt") == ["x/d.txt"]
    assert labels(tmp_path / "x" / "*" / ".." / "*.txt") == ["d.txt"]
    assert labels(tmp_path / ".git" / "*.txt") == ["a.txt"]
    assert labels(tmp_path / ".g*" / "**" / "*.txt") == [".git/a.txt"]
    assert labels(tmp_path / "x" / ".c.txt") == [".c.txt"]
    assert labels(tmp_path / "**" / ".*.txt") == ["x/.c.txt"]


def test_hidden_folders_of_an_address_are_left_out_too() -> None:
    fs = fsspec.filesystem("memory")
    for name in ("docs/.git/a.txt", "docs/b.txt", "docs/c/d.txt", "docs/c/.e.txt"):
        fs.pipe(f"/{name}", b"text")
    try:
        assert labels("memory://docs/**/*.txt") == ["b.txt", "c/d.txt"]
        assert labels("memory://docs/**") == ["b.txt", "c/d.txt"]
        assert labels("memory://docs/.git/*.txt") == ["a.txt"]
        assert labels("memory://docs/*") == ["b.txt", "c/d.txt"]
    finally:
        fs.rm("/docs", recursive=True)


def test_the_store_is_left_out_however_it_is_reached(tmp_path: Path) -> None:
    write(tmp_path / "all" / "a.txt")
    store = tmp_path / "all" / "store"
    write(store / "artifacts" / "made.txt")
    (tmp_path / "all" / "link").symlink_to(store)
    (tmp_path / "all" / "part").symlink_to(store / "artifacts")

    def found(glob: Path) -> list[str]:
        return list(identify("mine", source(glob), Hashes(store / "hashes", store=store)))

    assert found(tmp_path / "all" / "**" / "*.txt") == ["a.txt"]
    write(tmp_path / "all" / "b" / "c.txt")
    assert found(tmp_path / "all" / "**" / "*.txt") == ["a.txt", "b/c.txt"]
    assert found(tmp_path / "*" / "*.txt") == ["all/a.txt"]
    assert found(tmp_path / "all") == found(tmp_path / "all" / "*") == ["a.txt", "b/c.txt"]
    assert found(store / "artifacts" / "*.txt") == ["made.txt"], "asked for by name"
    with pytest.raises(DataError, match="is the store, which grows with each run; "):
        found(store / "**" / "*.txt")


def test_linked_folders_are_followed_once_and_without_loops(tmp_path: Path) -> None:
    outside = write(tmp_path / "outside" / "o.txt").parent
    (outside / "again").symlink_to(outside)
    top = tmp_path / "top"
    write(top / "real" / "a.txt")
    write(top / "real" / "sub" / "b.txt")
    (top / "also").symlink_to(top / "real")
    (top / "real" / "up").symlink_to("..")
    (top / "out").symlink_to(outside)
    (top / "out2").symlink_to("../outside", target_is_directory=True)
    assert labels(top / "**" / "*.txt") == ["out/o.txt", "real/a.txt", "real/sub/b.txt"]
    assert labels(top / "*" / "*.txt") == ["out/o.txt", "real/a.txt"]
    assert labels(top / "also" / "*.txt") == ["a.txt"], "named, so taken"
    assert labels(top / "al*" / "*.txt") == ["also/a.txt"]


def test_a_link_leads_to_files_that_the_folder_itself_does_not_match(tmp_path: Path) -> None:
    write(tmp_path / "real" / "a.txt")
    (tmp_path / "sub").symlink_to("real")
    assert labels(tmp_path / "**" / "sub" / "*.txt") == ["sub/a.txt"]


def test_a_folder_keeps_its_own_name_where_a_link_sorts_before_it(tmp_path: Path) -> None:
    write(tmp_path / "b" / "c" / "t.txt")
    (tmp_path / "a").symlink_to("b/c")
    assert labels(tmp_path / "**" / "*.txt") == ["b/c/t.txt"]


def test_linked_files_are_read(tmp_path: Path) -> None:
    write(tmp_path / "blob" / "3f9a", "words")
    (tmp_path / "a.txt").symlink_to("blob/3f9a")
    assert labels(tmp_path / "*.txt") == ["a.txt"]


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _broken(path: Path) -> None:
    path.symlink_to("nowhere")


def _endless(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (_pipe, "a named pipe"),
        (_socket, "a socket"),
        (_device, "a device"),
        (_broken, "a link that leads nowhere"),
        (_endless, "a link that leads nowhere"),
    ],
)
def test_what_is_no_file_is_an_error_that_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], None], word: str
) -> None:
    write(tmp_path / "a.txt")
    monkeypatch.chdir(tmp_path)  # The address of a socket must be short.
    make(Path("b.txt"))
    for glob in ("b.txt", "*.txt", "**/*.txt", "**"):
        assert f"{tmp_path}/b.txt is {word}, not a file; " in complaint(tmp_path / glob)
    assert labels(tmp_path / "a*.txt") == ["a.txt"], "nobody asked for it"


@pytest.mark.parametrize("glob", ["*.txt", "**/*.txt"])
def test_a_name_that_is_not_utf8_is_an_error_that_shows_it(tmp_path: Path, glob: str) -> None:
    write(tmp_path / "a.txt")
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9.txt")).write_text("text")
    said = complaint(tmp_path / glob)
    assert rf"{tmp_path}/\xe9t\xe9.txt, whose name is not UTF-8; rename it" in said
    assert labels(tmp_path / "a*.txt") == ["a.txt"]


def test_a_folder_that_may_not_be_listed_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.txt")
    write(tmp_path / "shut" / "b.txt")
    listed = os.scandir

    def refuse(path: str) -> object:
        if str(path).endswith("shut"):
            raise PermissionError(13, "Permission denied", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", refuse)
    said = complaint(tmp_path / "**" / "*.txt")
    assert f"{tmp_path}/shut cannot be read: Permission denied; " in said
    assert labels(tmp_path / "*.txt") == ["a.txt"]

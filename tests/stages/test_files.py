"""Files in odd but legal forms are read as what they hold; damaged ones are called damaged."""

import gzip
import io
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import FilesSource
from configs.errors import DataError
from stages.data.faults import Globbed
from stages.data.finding import Match, matches
from stages.data.inputs import inputs_of
from stages.hashing import Hashes
from stages.manifest import FileEntry
from tests.stages.reading import read_files


def source(glob: Path) -> FilesSource:
    return FilesSource(share=1.0, glob=str(glob))


def complaint(files: FilesSource) -> str:
    with pytest.raises(DataError) as caught:
        read_files("mine", files, Hashes())
    return str(caught.value)


def test_a_table_with_a_damaged_page_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [f"text {n}" for n in range(1000)]}), path)
    body = bytearray(path.read_bytes())
    body[4:64] = b"\xff" * 60  # the header of the first page
    path.write_bytes(body)
    said = complaint(source(tmp_path / "*.parquet"))
    assert "a.parquet is not readable Parquet" in said
    assert "; write it again; or raise the limit" in said
    assert "\n" not in said


def test_a_table_that_the_system_stops_reading_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pq.write_table(pa.table({"text": ["x"]}), tmp_path / "a.parquet")

    def refuse(*_: object, **__: object) -> None:
        raise OSError(5, "input/output error")

    monkeypatch.setattr("pyarrow.parquet.ParquetFile.iter_batches", refuse)
    assert "cannot be read: [Errno 5]" in complaint(source(tmp_path / "*.parquet"))


@pytest.mark.parametrize("index", [pa.int8(), pa.int32()])
@pytest.mark.parametrize("value", [pa.string(), pa.large_string()])
def test_text_in_a_dictionary_is_text(
    tmp_path: Path, index: pa.DataType, value: pa.DataType
) -> None:
    texts = ["a", "b", "a", None]
    column = pa.array(texts).cast(pa.dictionary(index, value))
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    found = read_files("mine", source(tmp_path / "*.parquet"), Hashes())
    assert [document.text for document in found.documents] == ["a", "b", "a", ""]


def test_a_number_beside_the_text_may_be_of_any_length(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"id": {"9" * 5000}, "text": "fine"}}\n')
    (document,) = read_files("mine", source(tmp_path / "*.jsonl"), Hashes()).documents
    assert document.text == "fine"
    (tmp_path / "a.jsonl").write_text(f'{{"text": {"9" * 5000}}}\n')
    assert "line 1 has no text in 'text', only: text" in complaint(source(tmp_path / "*.jsonl"))


def parquet(texts: list[str]) -> bytes:
    made = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), made)
    return made.getvalue()


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


TEXTS = ["a text with é", "another"]
PLAIN = b"plain words, \xc3\xa9 among them"


@pytest.mark.parametrize("name", ["part-00000", "page", "a.b/part-00000"])
@pytest.mark.parametrize(
    ("content", "texts"),
    [
        (lines(TEXTS), TEXTS),
        (b"\xef\xbb\xbf" + lines(TEXTS), TEXTS),
        (b"\n  \n" + lines(TEXTS), TEXTS),
        (b'{ "text" : "x" }', ["x"]),
        (parquet(TEXTS), TEXTS),
        (PLAIN, [PLAIN.decode()]),
        (b'{\n  "text": "of many lines"\n}\n', ['{\n  "text": "of many lines"\n}\n']),
        (b"{text}", ["{text}"]),
        (b"", []),
    ],
)
def test_a_file_without_a_suffix_is_read_as_what_it_holds(
    tmp_path: Path, name: str, content: bytes, texts: list[str]
) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    (tmp_path / "z.txt").write_text("z")
    found = read_files("mine", source(tmp_path / "**"), Hashes())
    assert [document.text for document in found.documents] == [*texts, "z"]


@pytest.mark.parametrize("chunk", [1, 7, 1 << 20])
@pytest.mark.parametrize(
    ("name", "content", "texts"),
    [
        ("a.txt.gz", PLAIN, [PLAIN.decode()]),
        ("a.txt", PLAIN, [PLAIN.decode()]),
        ("a.jsonl.gz", lines(TEXTS), TEXTS),
        ("A.JSONL.GZ", lines(TEXTS), TEXTS),
        ("part-00000.gz", lines(TEXTS), TEXTS),
        ("part-00000", PLAIN, [PLAIN.decode()]),
        ("a.txt.gz", b"", []),
    ],
)
def test_a_packed_file_is_unpacked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    name: str,
    content: bytes,
    texts: list[str],
) -> None:
    monkeypatch.setattr("stages.hashing._CHUNK_BYTES", chunk)
    monkeypatch.setattr("stages.data.content._CHUNK_BYTES", chunk)
    # Packed in two parts, as what was appended to is.
    packed = gzip.compress(content[:9]) + gzip.compress(content[9:])
    (tmp_path / name).write_bytes(packed)
    found = read_files("mine", source(tmp_path / "*"), Hashes())
    assert [document.text for document in found.documents] == texts
    assert len({document.id for document in found.documents}) == len(texts)


def test_what_is_unpacked_is_what_was_hashed(tmp_path: Path) -> None:
    class Stale(Hashes):
        """Remembers a hash that no longer holds."""

        def of(self, path: str, fs: object = None) -> FileEntry:
            return FileEntry(bytes=3, sha256="0" * 64)

    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(PLAIN))
    with pytest.raises(DataError, match=r"a\.txt\.gz changed while the source was read: 3 bytes"):
        read_files("mine", source(tmp_path / "*"), Stale())


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz", "part-00000"])
def test_a_damaged_packed_file_is_an_error(tmp_path: Path, name: str) -> None:
    whole = gzip.compress(lines([f"text {n}" for n in range(500)]))
    no_block = whole[:10] + b"\xff" * 20 + whole[30:]
    for broken in (no_block, whole[:-20], whole[:-4] + b"\0\0\0\0", whole + b"rest"):
        (tmp_path / name).write_bytes(broken)
        said = complaint(source(tmp_path / "*"))
        assert f"{name} " in said
        assert "is damaged where gzip packed it" in said
        assert "; " in said


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a.pdf", "a.pdf ends in 'pdf'; "),
        ("a.tar.gz", "a.tar.gz ends in 'tar'; "),
        ("a.tar.zst", "a.tar.zst ends in 'tar'; "),
    ],
)
def test_a_suffix_that_is_not_known_is_an_error(tmp_path: Path, name: str, said: str) -> None:
    content = PLAIN if not name.endswith(".gz") else gzip.compress(PLAIN)
    (tmp_path / name).write_bytes(content)
    assert said in complaint(source(tmp_path / "*"))
    assert "unpack" in complaint(source(tmp_path / "*"))


def test_a_git_lfs_pointer_without_a_suffix_is_not_text(tmp_path: Path) -> None:
    pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
    (tmp_path / "part-00000").write_text(pointer)
    assert "part-00000 is a git-lfs pointer" in complaint(source(tmp_path / "*"))


def test_what_spark_writes_beside_its_tables_is_left_out(tmp_path: Path) -> None:
    for name in ("part-00000-c000.snappy.parquet", "part-00001-c000.snappy.parquet"):
        (tmp_path / name).write_bytes(parquet([name]))
        (tmp_path / f".{name}.crc").write_bytes(b"crc\0\0\0\0\xff")
    (tmp_path / "_SUCCESS").write_bytes(b"")
    pq.write_metadata(
        pa.schema({"text": pa.string()}),
        tmp_path / "_metadata",
        [pq.read_metadata(tmp_path / "part-00000-c000.snappy.parquet")],
    )
    (tmp_path / "_started_12").write_text("{}")
    for glob in ("*", "**"):
        found = read_files("mine", source(tmp_path / glob), Hashes())
        assert [document.id[:10] for document in found.documents] == ["part-00000", "part-00001"]
    (tmp_path / "_words").write_text("asked for")
    (tmp_path / "_own.txt").write_text("a name like others")
    assert texts_of(tmp_path / "_w*") == ["asked for"]
    assert texts_of(tmp_path / "_words") == ["asked for"]
    assert texts_of(tmp_path / "*.txt") == ["a name like others"]


def texts_of(glob: Path) -> list[str]:
    return [one.text for one in read_files("mine", source(glob), Hashes()).documents]


@pytest.mark.parametrize("change", ["appears", "vanishes"])
def test_files_that_come_and_go_while_they_are_listed_are_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text("some text")
    other = tmp_path / ("zz.txt" if change == "appears" else "b.txt")

    def later(name: str, asked: Globbed, store: Path | None) -> list[Match]:
        if change == "appears":
            other.write_text("late")
        else:
            other.unlink()
        return matches(name, asked, store)

    monkeypatch.setattr("stages.data.inputs.matches", later)
    with pytest.raises(DataError) as caught:
        inputs_of("mine", source(tmp_path / "*.txt"), Hashes(), shard_bytes=100, seed=0)
    said = str(caught.value)
    assert said.startswith("data.sources.mine.glob = ")
    assert f"{other.name} changed while the source was read: " in said
    assert ("no file before, 4 bytes of" in said) == (change == "appears")
    assert ("no file after" in said) == (change == "vanishes")
    assert said.endswith("; run again when nothing writes to it")

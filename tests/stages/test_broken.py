"""Promises of reading what is damaged, hostile or huge: it is counted, and the rest is read."""

import gzip
import http.server
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from configs.data import DataSpec, EvaluationSet, FilesSource, ProblemsSource
from configs.errors import DataError
from stages.data.faults import Broken, require_whole
from stages.data.files import Document, read_documents
from stages.data.formats import is_readable, kind_of
from stages.data.reads import identify, reads
from stages.data.rows import lines
from stages.hashing import Hashes
from tests.stages.reading import read_files

MIB = 1 << 20


def source(glob: object, **settings: object) -> FilesSource:
    return FilesSource.model_validate({"share": 1.0, "glob": str(glob), **settings})


def packed_by(kind: str, data: bytes) -> bytes:
    return gzip.compress(data) if kind == "gz" else bytes(pa.compress(data, "zstd", asbytes=True))


def read(path: Path, **settings: object) -> tuple[list[Document], list[Broken]]:
    one = source(path, **settings)
    known = identify("mine", one, Hashes())[path.name]
    found = list(read_documents("mine", one, str(path), path.name, known))
    return (
        [each for each in found if isinstance(each, Document)],
        [each for each in found if isinstance(each, Broken)],
    )


def texts(documents: Sequence[Document]) -> list[str]:
    return [one.text for one in documents]


def test_broken_lines_are_set_aside_one_by_one(tmp_path: Path) -> None:
    rows = [
        b'{"text": "one"}',
        b"{oops",
        b'{"text": "\xff"}',
        b'{"body": 1}',
        b"",
        b'{"text": "two"}',
        b"[" * 100_000,
        b'{"text": "three"}',
    ]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join(rows))
    documents, broken = read(path)
    assert [(one.id, one.text) for one in documents] == [
        ("a.jsonl", "one"), ("a.jsonl#1", "two"), ("a.jsonl#2", "three"),
    ]  # fmt: skip
    assert [(one.place, one.rule, one.bytes) for one in broken] == [
        ("a.jsonl line 2", "broken_row", len(rows[1]) + 1),
        ("a.jsonl line 3", "broken_encoding", len(rows[2]) + 1),
        ("a.jsonl line 4", "broken_row", len(rows[3]) + 1),
        ("a.jsonl line 7", "broken_row", len(rows[6]) + 1),
    ]
    offset = len(rows[0]) + len(rows[1]) + 2 + rows[2].index(b"\xff")
    assert f"a.jsonl has byte 0xff at offset {offset}, which is not UTF-8" in broken[1].reason
    assert all("; " in one.reason and "\n" not in one.reason for one in broken)
    assert {one.source for one in broken} == {"mine"}


@given(
    st.lists(st.binary(max_size=12).map(lambda b: b.replace(b"x", b"\n")), max_size=8),
    st.integers(1, 10),
)
def test_lines_do_not_depend_on_how_the_bytes_come(chunks: list[bytes], most: int) -> None:
    whole = b"".join(chunks)
    expected = [
        (bare if len(bare := line.removesuffix(b"\n")) <= most else None, len(line))
        for line in whole.split(b"\n")[:-1]
        for line in [line + b"\n"]
    ]
    if last := whole.rpartition(b"\n")[2]:
        expected.append((last if len(last) <= most else None, len(last)))
    assert list(lines(chunks, max_bytes=most)) == expected


def test_a_line_beyond_all_bounds_takes_no_memory_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.data.rows.lines", partial(lines, max_bytes=MIB))
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(b'{"text": "one"}\n{"text": "')
        for _ in range(24):
            file.write(b"y" * MIB)
        file.write(b'"}\n{"text": "two"}\n')
    one = source(path)
    known = identify("mine", one, Hashes())["a.jsonl"]
    tracemalloc.start()
    found = list(read_documents("mine", one, str(path), "a.jsonl", known))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    first, broken, last = found
    assert isinstance(first, Document) and isinstance(last, Document)
    assert (first.text, last.text, last.id) == ("one", "two", "a.jsonl#1")
    assert isinstance(broken, Broken)
    assert "a.jsonl line 2 is longer than" in broken.reason
    assert broken.bytes == 24 * MIB + len('{"text": ""}\n')
    assert peak < 8 * MIB


def test_a_text_of_one_line_is_read_in_pieces_without_holding_it(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with path.open("wb") as file:
        for _ in range(24):
            file.write(b"y" * MIB)
    one = source(path)
    known = identify("mine", one, Hashes())["a.txt"]
    tracemalloc.start()
    chars = sum(
        len(each.text)
        for each in read_documents("mine", one, str(path), "a.txt", known)
        if isinstance(each, Document)
    )
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert chars == 24 * MIB
    assert peak < 8 * MIB


@pytest.mark.parametrize("splits", [True, False])
def test_text_is_read_up_to_the_byte_that_is_no_letter(tmp_path: Path, splits: bool) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("é fine\n".encode() + b"\xff and more text")
    documents, (broken,) = read(path, split_documents=splits)
    # Half of what should be one document is none.
    assert texts(documents) == (["é fine\n"] if splits else [])
    assert (broken.place, broken.rule) == ("a.txt", "broken_encoding")
    assert broken.bytes == (15 if splits else 23)
    assert "byte 0xff at offset 8" in broken.reason


@pytest.mark.parametrize("size", [0, 1, 2])
def test_a_letter_that_the_end_cuts_is_broken(tmp_path: Path, size: int) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine" + "漢".encode()[:size])
    documents, broken = read(path)
    assert texts(documents) == ["fine"]
    assert [one.bytes for one in broken] == ([size] if size else [])


def test_undivided_text_is_one_document_of_bounded_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.py"
    body = "def f() -> int:\n    return 1\n\n" * 1000
    path.write_text(body)
    assert texts(read(path, split_documents=False)[0]) == [body]
    assert len(read(path)[0]) > 1
    monkeypatch.setattr("stages.data.files.MAX_HELD_BYTES", 10_000)
    documents, (broken,) = read(path, split_documents=False)
    assert documents == []
    assert (broken.rule, broken.bytes) == ("broken_file", len(body))
    assert "set data.sources.mine.split_documents = true" in broken.reason


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.py", "part-00000"])
def test_what_is_packed_is_read_as_if_it_were_not(tmp_path: Path, kind: str, name: str) -> None:
    if name in ("a.jsonl", "part-00000"):
        data = "".join(json.dumps({"text": f"é {n}"}) + "\n" for n in range(3000)).encode()
    else:
        data = "".join(f"line é {n}\n" for n in range(3000)).encode()
    (tmp_path / name).write_bytes(data)
    plain = texts(read(tmp_path / name)[0])
    packed = tmp_path / f"{name}.{kind}"
    # Packed in two parts, as what was appended to is.
    packed.write_bytes(packed_by(kind, data[:999]) + packed_by(kind, data[999:]))
    documents, broken = read(packed)
    assert (texts(documents), broken) == (plain, [])
    assert len({one.id for one in documents}) == len(documents) > 1


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize(
    ("kind", "fault"),
    # zstd without a checksum does not see that letters are others.
    [("gz", "cut"), ("gz", "garbled"), ("gz", "followed"), ("zst", "cut"), ("zst", "followed")],
)
def test_a_damaged_packed_file_gives_what_comes_before(
    tmp_path: Path, kind: str, name: str, fault: str
) -> None:
    words = [f"{n * 7919 % 1_000_003} {n * 104_729 % 999_983}" for n in range(60_000)]
    rows = [json.dumps({"text": word}) if name == "a.jsonl" else word for word in words]
    data = ("\n".join(rows) + "\n").encode()
    whole, path = packed_by(kind, data), tmp_path / f"{name}.{kind}"
    half = len(whole) // 2
    damaged = {
        "cut": whole[:half],
        "garbled": whole[:half] + b"\xff" * 999 + whole[half + 999 :],
        "followed": whole + b"something else",
    }[fault]
    path.write_bytes(damaged)
    documents, broken = read(path)
    assert broken[-1].rule == "broken_file"
    assert f"{path.name} is damaged where " in broken[-1].reason
    assert "; fetch it again" in broken[-1].reason
    assert 0 < broken[-1].bytes <= len(damaged)
    found = texts(documents)
    if fault != "garbled":
        assert len(broken) == 1, "the line that is cut is part of the damage"
    if name == "a.jsonl":
        assert found == words[: len(found)] or fault == "garbled"
        assert len(found) > 1000
    elif fault == "cut":
        assert data.decode().startswith("".join(found))
        assert len("".join(found)) > 100_000
    with pytest.raises(DataError, match=r"max_broken_share = 0\.01: "):
        read_files("mine", source(path), Hashes())


@pytest.mark.parametrize("kind", ["gz", "zst"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_what_unpacks_without_end_is_not_unpacked_to_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.setattr("stages.data.content.MAX_HELD_BYTES", 2 * MIB)
    path = tmp_path / f"{name}.{kind}"
    path.write_bytes(packed_by(kind, b"y" * 300 * MIB))
    size = path.stat().st_size
    assert size * 200 < 300 * MIB
    one = source(path)
    known = identify("mine", one, Hashes())[path.name]
    chars, broken = 0, []
    tracemalloc.start()
    for each in read_documents("mine", one, str(path), path.name, known):
        if isinstance(each, Broken):
            broken.append(each)
        else:
            chars += len(each.text)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [one.rule for one in broken] == ["broken_file"]
    assert "unpacks to more than 200 times its" in broken[0].reason
    assert chars <= max(200 * size, 2 * MIB)
    assert peak < (80 if name == "a.jsonl" else 8) * MIB
    # What unpacks to little is none, whatever the ratio.
    path.write_bytes(packed_by(kind, b"y" * MIB))
    assert read(path)[1] == [] or name == "a.jsonl"


def test_nulls_are_letters_like_others(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\0b")
    assert texts(read(tmp_path / "a.txt")[0]) == ["a\0b"]


def test_files_of_other_columns_are_counted_by_their_size(tmp_path: Path) -> None:
    for name in "abcdefgh":
        column = "body" if name == "b" else "text"
        pq.write_table(pa.table({column: [name * 500]}), tmp_path / f"{name}.parquet")
    size = (tmp_path / "b.parquet").stat().st_size
    with pytest.raises(DataError) as caught:
        read_files("mine", source(tmp_path), Hashes())
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    said = str(caught.value)
    assert f"in 1 place: {size:,} of {total:,} bytes. b.parquet has no text column 'text'" in said
    found = read_files("mine", source(tmp_path, max_broken_share=0.5), Hashes())
    assert texts(found.documents) == [name * 500 for name in "acdefgh"]
    assert [one.document for one in found.broken] == ["b.parquet"]


def test_a_table_that_is_damaged_in_the_middle_gives_what_comes_before(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    rows = [f"row {n} " * 20 for n in range(4000)]
    pq.write_table(pa.table({"text": rows}), path, row_group_size=1000, use_dictionary=False)
    body = bytearray(path.read_bytes())
    at = pq.read_metadata(path).row_group(2).column(0).data_page_offset
    body[at : at + 40] = b"\xff" * 40
    path.write_bytes(body)
    documents, (broken,) = read(path)
    assert texts(documents) == rows[:2000]
    assert broken.rule == "broken_file"
    assert broken.bytes == pytest.approx(len(body) / 2, abs=2)


def test_a_table_of_one_repeated_value_is_read_in_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    column = pa.DictionaryArray.from_arrays(np.zeros(20_000, np.int32), ["y" * 100_000])
    pq.write_table(pa.table({"text": column}), path, store_schema=False)
    documents = broken = 0
    one = source(path)
    known = identify("mine", one, Hashes())["a.parquet"]
    assert known["bytes"] < 2_000_000
    pool = pa.default_memory_pool()
    before, peak = pool.bytes_allocated(), 0
    for each in read_documents("mine", one, str(path), "a.parquet", known):
        peak = max(peak, pool.bytes_allocated() - before)
        documents += isinstance(each, Document)
        broken += isinstance(each, Broken)
    assert peak < 100 * MIB
    assert broken == 1 and documents < 20_000, "more than 200 times its size is a bomb"


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_document_knows_its_name_licence_and_time(tmp_path: Path, form: str) -> None:
    rows = [
        {"text": "a", "meta": {"id": 7, "when": "2020-01-02"}, "lic": ["MIT", "BSD"]},
        {"text": "b", "meta": {"id": 12345678901234567, "when": None}, "lic": None},
        {"text": "c", "meta": None, "lic": ["CC0"]},
    ]
    path = tmp_path / f"a.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    settings = {
        "id_field": "meta.id", "timestamp_field": "meta.when", "licence_field": "lic",
    }  # fmt: skip
    documents, broken = read(path, **settings, licence="unknown")
    assert broken == []
    assert [(one.key, one.timestamp, one.licence) for one in documents] == [
        ("7", "2020-01-02", "MIT, BSD"),
        ("12345678901234567", "", "unknown"),
        ("", "", "CC0"),
    ]
    assert [(one.key, one.licence) for one in read(path, id_field="none.such")[0]] == [("", "")] * 3


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (1_600_000_000, "2020-09-13T12:26:40+00:00"),
        (1_600_000_000_000, "2020-09-13T12:26:40+00:00"),
        (1e300, "1e+300"),
        ("spring", "spring"),
        (True, "True"),
    ],
)
def test_a_number_is_a_time_in_seconds_or_milliseconds(
    tmp_path: Path, value: object, said: str
) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "x", "t": value}) + "\n")
    (document,) = read(tmp_path / "a.jsonl", timestamp_field="t")[0]
    assert document.timestamp == said


def test_times_of_tables_are_written_as_times(tmp_path: Path) -> None:
    when = pa.array([0], pa.timestamp("us", "UTC"))
    pq.write_table(pa.table({"text": ["x"], "t": when}), tmp_path / "a.parquet")
    (document,) = read(tmp_path / "a.parquet", timestamp_field="t")[0]
    assert document.timestamp == "1970-01-01T00:00:00+00:00"


@pytest.mark.parametrize(
    ("label", "start", "kind"),
    [
        ("x/a.PY.gz", b"", "text"),
        ("a.html", b"", "text"),
        ("a.ndjson.zst", b"", "lines"),
        ("a.json", b'{"text": 1}\n{"text"', "lines"),
        ("a.json", b'{\n "name": 1\n}', "text"),
        ("a.json", b'[{"text": 1}]', "array"),
        ("a.png", b"", None),
        ("a.tar.gz", b"", None),
        ("a.d/part", b"PAR1", "table"),
    ],
)
def test_what_a_file_is(label: str, start: bytes, kind: str | None) -> None:
    assert kind_of(label, start) == kind
    assert is_readable(label) == (kind is not None and label != "a.d/part")


def test_an_array_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[{"text": "x"},\n{"text": "y"}]')
    documents, (broken,) = read(tmp_path / "a.json")
    assert documents == []
    assert "is one array of JSON; write one object a line" in broken.reason


def test_the_limit_is_the_share_of_bytes() -> None:
    one = source("x", max_broken_share=0.25)
    firsts = [Broken("mine", f"a line {n}", "broken_row", f"fault {n}; mend", 5) for n in range(5)]
    require_whole("mine", one, 25, 100, firsts)
    require_whole("mine", one, 0, 0, [])
    with pytest.raises(DataError) as caught:
        require_whole("mine", one, 26, 100, firsts, count=1234)
    said = str(caught.value)
    assert said.startswith("data.sources.mine.max_broken_share = 0.25: 26.00% of ")
    assert "in 1,234 places: 26 of 100 bytes. fault 0; mend. fault 1; mend. fault 2; mend." in said
    assert "1,231 more" in said and "fault 3" not in said
    with pytest.raises(DataError):
        require_whole("mine", source("x", max_broken_share=0), 1, 10**12, firsts[:1])


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.txt.gz", "a.parquet"])
def test_a_file_that_became_another_is_said_to_have_changed_not_to_be_broken(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes(b"\xff\xfe nothing that could be read")
    known = {"bytes": 3, "sha256": "0" * 64}
    with pytest.raises(DataError, match=f"{name} changed while the source was read"):
        list(read_documents("mine", source(path), str(path), name, known))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """The address of a server of `tmp_path` that gives no parts of files."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

    handler: Callable[..., Quiet] = partial(Quiet, directory=str(tmp_path))
    made = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()
    made.server_close()
    thread.join()


def test_an_address_of_a_page_is_read(tmp_path: Path, server: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "a.txt").write_text("é" * 9000)
    rows = b'{"text": "x"}\n{"text": "y"}\n'
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(rows))
    pq.write_table(pa.table({"text": [f"row {n}" for n in range(9)]}), tmp_path / "c.parquet")
    found = read_files("mine", source(f"{server}/deep/a.txt"), Hashes())
    assert ("".join(texts(found.documents)), found.documents[0].id) == ("é" * 9000, "a.txt")
    found = read_files("mine", source(f"{server}/b.jsonl.gz?download=true"), Hashes())
    assert texts(found.documents) == ["x", "y"]
    found = read_files("mine", source(f"{server}/c.parquet"), Hashes())
    assert len(found.documents) == 9
    with pytest.raises(DataError, match=r"none\.txt cannot be read: it is not there; correct"):
        read_files("mine", source(f"{server}/none.txt"), Hashes())


@pytest.mark.parametrize(
    ("address", "package"),
    [("hf://datasets/a/b/c.jsonl", "huggingface_hub"), ("https://a.test/c.jsonl", "aiohttp")],
)
def test_a_package_that_is_lacking_is_named(
    monkeypatch: pytest.MonkeyPatch, address: str, package: str
) -> None:
    def lack(*_: object, **__: object) -> None:
        raise ImportError("a name that says little")

    monkeypatch.setattr(fsspec, "filesystem", lack)
    with pytest.raises(DataError, match=f"is not installed; pip install {package}"):
        identify("mine", source(address), Hashes())


def test_problems_and_evaluations_enter_identity_by_what_names_them(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl", "c.jsonl"):
        (tmp_path / name).write_text(json.dumps({"text": name}) + "\n")
    problems = ProblemsSource(
        share=1, glob=str(tmp_path / "a*"), held_out_glob=str(tmp_path / "b*")
    )
    found = identify("mine", problems, Hashes())
    assert {field: list(files) for field, files in found.items()} == {
        "glob": ["a.jsonl"],
        "held_out_glob": ["b.jsonl"],
    }
    config = DataSpec.model_validate(
        {
            "seed": 0,
            "data": {
                "train_tokens": 1000,
                "sources": {"mine": problems.model_dump()},
                "evaluations": {"mine": EvaluationSet(glob=str(tmp_path / "c*")).model_dump()},
            },
        }
    )
    assert {name: sorted(facts) for name, facts in reads(config, Hashes()).items()} == {
        "mine": ["glob", "held_out_glob"],
        "evaluations/mine": ["c.jsonl"],
    }
    lost = problems.model_copy(update={"held_out_glob": str(tmp_path / "z*")})
    with pytest.raises(DataError, match=r"data\.sources\.mine\.held_out_glob = .*matches no file"):
        identify("mine", lost, Hashes())
    with pytest.raises(DataError, match=r"data\.evaluations\.odd\.glob = .*matches no file"):
        identify("evaluations/odd", EvaluationSet(glob=str(tmp_path / "z*")), Hashes())

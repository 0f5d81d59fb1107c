"""Promises of reading rows: the text of each, wherever it stands, alike in both forms."""

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import DataSpec, FilesSource
from configs.errors import DataError
from stages.contract import Workspace
from stages.data.files import worded
from stages.data.loop import data
from stages.data.tables import read_drops
from stages.hashing import Hashes
from tests.stages.reading import read_files

FORMS = ("jsonl", "parquet")


def write(folder: Path, form: str, rows: Sequence[dict[str, Any]]) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"a.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def source(path: Path, **settings: Any) -> FilesSource:
    return FilesSource.model_validate({"share": 1.0, "glob": str(path), **settings})


def texts(path: Path, **settings: Any) -> list[str]:
    found = read_files("mine", source(path, **settings), Hashes())
    return [document.text for document in found.documents]


def complaint(path: Path, **settings: Any) -> str:
    with pytest.raises(DataError) as caught:
        read_files("mine", source(path, **settings), Hashes())
    said = str(caught.value)
    assert said.startswith("data.sources.mine.max_broken_share = 0.01: ")
    assert f"data.sources.mine.glob = {str(path)!r} " in said
    assert f"{path.name} " in said
    assert "; " in said, "no remedy"
    said.encode()
    return said


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_a_value_is_an_empty_text(tmp_path: Path, form: str) -> None:
    rows: list[dict[str, Any]] = [{"text": "one"}, {"text": None}, {"text": "two"}]
    assert texts(write(tmp_path, form, rows)) == ["one", "", "two"]
    assert texts(write(tmp_path, form, [{"text": None}, {"text": None}])) == ["", ""]


@pytest.mark.parametrize("form", FORMS)
def test_rows_without_a_value_are_dropped_with_a_reason(
    tmp_path: Path, workspace: Workspace, form: str
) -> None:
    rows = [{"text": " ".join(f"word{n}x{m}" for m in range(60))} for n in range(60)]
    path = write(tmp_path, form, [*rows, {"text": None}])
    spec = {
        "train_tokens": 5000,
        "sequence_tokens": 64,
        "tokenizer": {"vocab_size": 300},
        "sources": {"mine": source(path).model_dump()},
    }
    corpus = data(DataSpec.model_validate({"seed": 0, "data": spec}), workspace)
    (dropped,) = read_drops(corpus.path("drops", "mine-00000.parquet"))
    assert (dropped.document, dropped.rule, dropped.value) == (
        f"{path.name}#60",
        "min_chars",
        0,
    )
    counted = json.loads(corpus.path("statistics.json").read_text())["sources"]["mine"]
    assert counted["documents_dropped"] == {"min_chars": 1}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [12, 1.5, True, ["a"], {"a": "b"}])
def test_a_value_that_is_no_text_is_an_error(tmp_path: Path, form: str, value: Any) -> None:
    said = complaint(write(tmp_path, form, [{"text": value, "body": "x"}]))
    assert "'text', only: text" in said
    assert "; set data.sources.mine.text_field to the " in said


@pytest.mark.parametrize("form", FORMS)
def test_text_is_found_inside_other_fields(tmp_path: Path, form: str) -> None:
    rows: list[dict[str, Any]] = [
        {"meta": {"text": "one", "more": {"deep": "1"}}},
        {"meta": {"text": None, "more": None}},
        {"meta": None},
        {"meta": {"text": "two", "more": {"deep": "2"}}},
    ]
    path = write(tmp_path, form, rows)
    assert texts(path, text_field="meta.text") == ["one", "", "", "two"]
    assert texts(path, text_field="meta.more.deep") == ["1", "", "", "2"]
    empty = write(tmp_path / "empty", form, [{"meta": None}])
    assert texts(empty, text_field="meta.text") == [""]
    for field in ("meta.none", "meta.text.more", "meta", "meta.more", "text", "meta.", ".text"):
        assert f"{field!r}, only: meta" in complaint(path, text_field=field)


@pytest.mark.parametrize("form", FORMS)
def test_a_name_with_a_dot_comes_before_a_field_inside(tmp_path: Path, form: str) -> None:
    row = {"meta.text": "outer", "meta": {"text": "inner", "a.b": "odd"}}
    for rows in ([row], [dict(reversed(row.items()))]):
        path = write(tmp_path, form, rows)
        assert texts(path, text_field="meta.text") == ["outer"]
        assert texts(path, text_field="meta.a.b") == ["odd"]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
def test_text_of_every_layout_is_text(tmp_path: Path, kind: pa.DataType) -> None:
    long = "a text that does not fit into a view of twelve bytes"
    column = pa.array(["é", long, None], kind)
    nested = pa.StructArray.from_arrays([column], ["text"])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": column, "meta": nested}), path)
    assert pq.read_schema(path).field("text").type == kind
    assert texts(path) == texts(path, text_field="meta.text") == ["é", long, ""]


def test_two_columns_of_one_name_are_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text"] * 2), path)
    assert "only: text (string), text (string); " in complaint(path)


def test_a_page_that_differs_from_its_checksum_is_an_error(tmp_path: Path) -> None:
    path, word = tmp_path / "a.parquet", b"unmistakable"
    table = pa.table({"text": [word.decode()]})
    pq.write_table(
        table, path, compression="none", use_dictionary=False, write_statistics=False,
        write_page_checksum=True,
    )  # fmt: skip
    body = path.read_bytes()
    assert texts(path) == [word.decode()]
    path.write_bytes(body.replace(word, b"unmistakeable"[:12]))
    assert "is not readable Parquet" in complaint(path)


def test_a_line_that_nests_too_deep_is_an_error_with_its_place(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    for deep in ("[" * 200_000, "[" * 200_000 + "]" * 200_000, '{"a":' * 200_000):
        path.write_text(f'{{"text": "fine"}}\n{{"text": "fine", "more": {deep}}}\n')
        assert "line 2 nests deeper than can be read; " in complaint(path)


def test_the_fields_of_a_line_can_be_printed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    names = ", ".join(f'"field{n}": {n}' for n in range(1000))
    path.write_text(f'{{"half \\ud800 pair": 1, {names}}}\n')
    said = complaint(path)
    assert r"only: half \ud800 pair, field0, " in said
    assert ", and 991 more; " in said


@pytest.mark.parametrize("half", ["\ud800", "\udc00 x"])
def test_what_a_row_says_of_itself_can_be_written(tmp_path: Path, half: str) -> None:
    path = tmp_path / "a.jsonl"
    more = {"id": [half, {"a": half}], "lic": ["MIT", [half]], "when": [half]}
    path.write_text(json.dumps({"text": "fine", **more}) + "\n")
    fields = {"id_field": "id", "licence_field": "lic", "timestamp_field": "when"}
    (document,) = read_files("mine", source(path, **fields), Hashes()).documents
    shown = half.encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    assert document.licence == f"MIT, {shown}"
    assert document.timestamp == shown
    assert document.key.startswith(f"{shown}, {{'a': ")


def test_what_nests_too_deep_to_be_told_is_not_told(tmp_path: Path) -> None:
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    assert worded(deep) == ""
    assert worded([["a"], "b", None, 3]) == "a, b, , 3"


@pytest.mark.parametrize("number", ["1" + "0" * 400, "-1" + "0" * 400, "NaN", "1e400"])
def test_a_number_that_is_no_time_is_told_as_it_is(tmp_path: Path, number: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "fine", "t": {number}}}\n')
    found = read_files("mine", source(tmp_path / "a.jsonl", timestamp_field="t"), Hashes())
    assert [one.timestamp for one in found.documents] == [str(json.loads(number))]


@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("field", ["id_field", "licence_field", "timestamp_field"])
@pytest.mark.parametrize(
    ("kind", "odd"),
    [
        (pa.date32(), 2**31 - 1),
        (pa.date32(), -(2**31)),
        (pa.timestamp("ms"), 2**62),
        (pa.timestamp("us", "UTC"), 2**62),
        (pa.duration("s"), 2**62),
        (pa.timestamp("us", "No/Where"), 1),
    ],
)
def test_a_time_that_python_cannot_hold_is_left_out_and_its_row_kept(
    tmp_path: Path, kind: pa.DataType, odd: int, field: str, is_inside: bool
) -> None:
    stored = pa.int32() if pa.types.is_date32(kind) else pa.int64()
    column = pa.array([0, odd, None], stored).cast(kind)
    if is_inside:
        column = pa.StructArray.from_arrays([column], ["t"])
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b", "c"], "m": column}), path)
    asked = source(path, **{field: "m.t" if is_inside else "m"})
    found = read_files("mine", asked, Hashes())
    assert (texts(path), found.broken) == (["a", "b", "c"], [])
    kept = {"id_field": "key", "licence_field": "licence", "timestamp_field": "timestamp"}[field]
    said = [getattr(one, kept) for one in found.documents]
    assert said[1:] == ["", ""]
    assert said[0].startswith(("1970-01-01", "0:00:00")) or kind.equals(
        pa.timestamp("us", "No/Where")
    )


def test_a_name_that_is_no_utf8_is_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    bad = pa.Array.from_buffers(
        pa.string(), 1, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0"), pa.py_buffer(b"\xff")]
    )
    pq.write_table(pa.table({"text": ["a"], "id": bad}), path)
    assert "is not readable Parquet" in complaint(path, id_field="id")


def test_a_packed_table_is_an_error_that_says_so(tmp_path: Path) -> None:
    path = write(tmp_path, "parquet", [{"text": "x"}])
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(DataError, match=r"a\.parquet is packed by gzip; unpack it"):
        texts(path)

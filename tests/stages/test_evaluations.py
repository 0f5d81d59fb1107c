"""Promises of reading evaluation sets: every item is read, or it is said why not."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import EvaluationSet
from configs.errors import DataError
from stages.data.evaluations import read_items
from stages.data.files import read_rows
from stages.data.finding import matches
from stages.hashing import Hashes
from stages.overlap import LEAST_CHARS, Windows

FORMS = ("jsonl", "parquet")


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def read(path: Path, *fields: str) -> tuple[list[str], int]:
    one = EvaluationSet(glob=str(path), text_fields=fields or ("text",))
    return read_items("exam", one, Hashes())


def complaint(path: Path, *fields: str, field: str = "glob") -> str:
    with pytest.raises(DataError) as caught:
        read(path, *fields)
    said = str(caught.value)
    value = list(fields or ("text",)) if field == "text_fields" else str(path)
    assert said.startswith(f"data.evaluations.exam.{field} = {value!r}: ")
    assert "; " in said and "\n" not in said
    return said


@pytest.mark.parametrize("form", FORMS)
def test_each_text_of_each_row_is_an_item(tmp_path: Path, form: str) -> None:
    rows = [
        {"q": f"question {n}", "more": {"a": None if n % 3 else f"answer {n}"}, "id": n}
        for n in range(600)
    ]
    write(tmp_path / f"a.{form}", rows)
    write(
        tmp_path / f"b.{form}",
        [{"q": "without the other field", "more": None}, {"q": " ", "more": {"a": "z"}}],
    )
    expected = [
        text for n in range(600) for text in (f"question {n}", *([] if n % 3 else [f"answer {n}"]))
    ]
    items, _ = read(tmp_path / f"*.{form}", "q", "more.a", "none")
    assert items == [*expected, "without the other field", "z"]


def test_a_file_without_rows_is_one_item_whatever_the_fields(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("an item\n\nof two paragraphs " * 400)
    (tmp_path / "b.txt").write_text("")
    items, _ = read(tmp_path, "q", "a")
    assert items == [(tmp_path / "a.txt").read_text()]


def test_items_that_are_not_searched_for_are_counted(tmp_path: Path) -> None:
    texts = [
        *("x" * size for size in range(1, 2 * LEAST_CHARS)),
        "a b " * (LEAST_CHARS // 2 - 1) + "c",
        "\u0130 " * LEAST_CHARS,
        "漢\u3000" * (LEAST_CHARS - 1),
    ]
    items, short = read(write(tmp_path / "a.jsonl", [{"text": text} for text in texts]))
    assert items == texts
    # Such are the items that no text is found to hold, itself included.
    assert short == sum(not Windows.of([text]).look(text) for text in texts)
    assert short == LEAST_CHARS - 1 + 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{oops", "a.jsonl line 2 is not JSON: "),
        (b"[" * 100_000, "a.jsonl line 2 nests deeper than can be read; "),
        (b'{"text": "\xff"}', "a.jsonl has byte 0xff at offset 34, which is not UTF-8; "),
        (b'{"body": "x"}', "a.jsonl row 2 has text in none of ['text']; "),
        (b'{"text": null}', "a.jsonl row 2 has text in none of ['text']; "),
        (b'{"text": " \\n"}', "a.jsonl row 2 has text in none of ['text']; "),
        (b'["text"]', "a.jsonl row 2 has text in none of ['text']; "),
        (b'{"text": ["x"]}', "a.jsonl row 2 has no text in 'text', but list; "),
        (b'{"text": 12}', "a.jsonl row 2 has no text in 'text', but int; "),
    ],
)
def test_a_row_that_is_none_is_an_error_with_its_place(
    tmp_path: Path, line: bytes, said: str
) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a first row"}\n' + line + b'\n{"text": "a last row"}\n')
    assert said in complaint(path)


def test_what_is_no_text_beside_text_is_an_error(tmp_path: Path) -> None:
    for form in FORMS:
        path = write(tmp_path / f"a.{form}", [{"q": "x", "choices": ["a", "b"]}])
        said = complaint(path, "q", "choices")
        assert (
            f"a.{form} row 1 has no text in 'choices', but list; set data.evaluations.exam." in said
        )
        assert read(path, "q")[0] == ["x"]


@pytest.mark.parametrize("name", ["a.txt", "a.json", "a.jsonl.gz", "a.parquet"])
def test_a_broken_file_is_an_error(tmp_path: Path, name: str) -> None:
    broken = {
        "a.txt": b"fine, and then \xff",
        "a.json": b'[{"text": "x"}]',
        "a.jsonl.gz": b"\x1f\x8b\x08 nothing that unpacks",
        "a.parquet": b"PAR1 no table PAR1",
    }
    (tmp_path / name).write_bytes(broken[name])
    write(tmp_path / "z.jsonl", [{"text": "an item that can be read"}])
    assert f": {name} " in complaint(tmp_path)


@pytest.mark.parametrize("form", FORMS)
def test_a_set_without_items_is_an_error(tmp_path: Path, form: str) -> None:
    path = write(tmp_path / f"a.{form}", [{"body": "x"}, {"body": "y"}])
    assert "no row of " in complaint(path, field="text_fields")
    path.write_text("") if form == "jsonl" else pq.write_table(pa.table({"text": [""]})[:0], path)
    assert "has text there; name the columns" in complaint(path, field="text_fields")


def test_a_text_without_end_is_not_told_to_be_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.data.files.MAX_HELD_BYTES", 10)
    (tmp_path / "a.txt").write_text("more than ten letters")
    said = complaint(tmp_path)
    assert "bytes of text in one document; divide it, or leave it out of the glob" in said


def test_a_table_that_unpacks_without_end_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.data.rows.MAX_HELD_BYTES", 1000)
    pq.write_table(pa.table({"q": ["y" * 10_000] * 1000}), tmp_path / "a.parquet")
    assert "a.parquet unpacks to more than 200 times" in complaint(tmp_path / "a.parquet", "q")


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
@pytest.mark.parametrize("when", ["before", "behind"])
def test_a_file_that_changes_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, when: str
) -> None:
    path = write(tmp_path / name, [{"text": "as it was"}])

    def changing(*asked: Any, **more: Any) -> Iterator[Any]:
        if when == "before":
            # As a writer leaves it that is not done yet.
            path.write_bytes(path.read_bytes()[:-3])
        yield from read_rows(*asked, **more)
        if when == "behind":
            write(path, [{"text": "as it is now"}])

    monkeypatch.setattr("stages.data.evaluations.read_rows", changing)
    assert f"{name} changed while the source was read: " in complaint(path)


def test_a_file_that_appears_while_the_set_is_listed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", [{"text": "as it was"}])

    def later(*asked: Any) -> list[tuple[str, str]]:
        write(tmp_path / "zz.jsonl", [{"text": "late"}])
        return matches(*asked)

    monkeypatch.setattr("stages.data.inputs.matches", later)
    assert "zz.jsonl changed while the source was read: no file before" in complaint(tmp_path)

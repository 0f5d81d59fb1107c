"""Files in odd but legal forms are read, and damaged ones are called damaged."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import FilesSource
from configs.errors import DataError
from stages.data.ingest import read_files
from stages.hashing import Hashes


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
    assert said.endswith("; write it again")
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

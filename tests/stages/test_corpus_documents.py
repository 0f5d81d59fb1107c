"""Documents found by name: against a plain look at every row, and with what people mistype."""

import difflib
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from stages.data.drops import Drop
from stages.data.tables import read_drops, write_drops
from stages.documents import (
    REPEATS_SHOWN,
    Known,
    count_documents,
    find_documents,
    lists_documents,
    nearest,
)
from tests.listed import DROPS, HOSTILE, KEPT, MEASURES, write_corpus, write_documents


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "files")


def looked_up(folder: Path, name: str) -> Iterator[tuple[str, Any, list[Drop]]]:
    """The slow twin: full name, row of `documents/` and drops of all that are called so."""
    names: dict[tuple[str, str], str] = {}
    rows: dict[tuple[str, str], Any] = {}
    drops: dict[tuple[str, str], list[Drop]] = {}
    for path in sorted((folder / "documents").iterdir()):
        for row in pq.ParquetFile(path).read().to_pylist():
            rows[row["source"], row["document"]] = row
            names[row["source"], row["document"]] = row["key"]
    for path in sorted((folder / "drops").iterdir()):
        for drop in read_drops(path):
            drops.setdefault((drop.source, drop.document), []).append(drop)
            names[drop.source, drop.document] = drop.key
    for (source, document), key in sorted(names.items()):
        if name and name in (f"{source}/{document}", document, key):
            both = (source, document)
            yield f"{source}/{document}", rows.get(both), drops.get(both, [])


@pytest.mark.parametrize(
    "name",
    [
        *("a.txt", "books/a.txt", "B-1", "books/b.txt", "c.txt", "d.txt", "B-5", "books/f.txt"),
        *("K", "dir/y.jsonl#4", "web/dir/y.jsonl#4", "dir/x.jsonl line 7", "dir/x.jsonl#3"),
        *(HOSTILE, f"web/{HOSTILE}", "", "nothing", "books/", "/", "web/B-1", "A.TXT"),
    ],
)
def test_what_is_called_so_is_found_with_all_that_is_known_of_it(corpus: Path, name: str) -> None:
    found = find_documents(corpus, name)
    for one, (full, row, drops) in zip(found, looked_up(corpus, name), strict=True):
        assert one.name == full
        known = {"rule", "value", "threshold", "start", "of", "cut_chars", "reason"}
        wanted = [{k: v for k, v in asdict(drop).items() if k in known} for drop in drops]
        assert [asdict(reason) for reason in one.reasons] == wanted
        assert (one.stayed is None) == (row is None)
        if one.stayed is not None:
            assert one.stayed.measures == MEASURES[one.source] == row["measures"]
            assert one.stayed.is_held_out == (row["side"] == "held_out")
            assert (one.stayed.chars, one.stayed.licence) == (row["chars"], row["licence"])
            assert one.stayed.timestamp == row["timestamp"]


def one(folder: Path, name: str) -> Known:
    (found,) = find_documents(folder, name)
    return found


def test_a_document_names_those_that_repeat_it(corpus: Path) -> None:
    found = one(corpus, "books/a.txt")
    assert found.repeats == 2
    assert [(r.document, r.rule, r.jaccard) for r in found.first_repeats] == [
        ("books/c.txt", "near_duplicate", 0.9142),
        ("web/dir/x.jsonl#3", "exact_duplicate", 1.0),
    ]
    assert one(corpus, "web/a.txt").repeats == 0


def test_of_very_many_repeats_the_first_are_named_and_all_are_counted(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "files")
    count = 70_000
    table = {"kept": ["books/a.txt", "books/b.txt"] * (count // 2), "jaccard": [0.9] * count}
    table |= {"document": [f"web/{n}" for n in range(count)], "rule": ["near_duplicate"] * count}
    pq.write_table(pa.table(table), folder / "duplicates.parquet", row_group_size=1000)
    found = one(folder, "books/b.txt")
    assert found.repeats == count // 2
    assert [r.document for r in found.first_repeats] == [
        f"web/{2 * n + 1}" for n in range(REPEATS_SHOWN)
    ]


def test_documents_are_counted_once_however_many_reasons_they_have(corpus: Path) -> None:
    kept = sum(map(len, KEPT.values()))
    gone = {(d.source, d.document) for some in DROPS.values() for d in some if d.cut_chars is None}
    assert count_documents(corpus) == kept + len(gone)


def test_a_corpus_without_text_has_no_documents(tmp_path: Path) -> None:
    assert not lists_documents(tmp_path)
    for kind in ("documents", "drops"):
        (tmp_path / kind).mkdir()
    assert lists_documents(tmp_path)
    assert (find_documents(tmp_path, "x"), count_documents(tmp_path)) == ([], 0)
    assert nearest(tmp_path, "x") == []


def test_files_without_a_row_are_read_too(tmp_path: Path) -> None:
    folder = write_corpus(tmp_path / "files")
    write_documents(folder / "documents" / "more-00000.parquet", "more", [], {"min_chars": 1.0})
    write_drops(folder / "drops" / "more-00000.parquet", [])
    assert one(folder, "B-1").name == "books/a.txt"
    assert nearest(folder, "b-1")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a million documents, in groups of rows as small as the data stage writes them."""
    folder = tmp_path_factory.mktemp("large")
    for kind in ("documents", "drops"):
        (folder / kind).mkdir()
    count = 50_000
    for shard in range(10):
        names = [f"crawl/part-{shard:04}.jsonl#{n}" for n in range(count)]
        struct = pa.struct([("min_chars", pa.float64())])
        measures = pa.array([{"min_chars": 100.0}] * count, struct)
        plain = dict.fromkeys(("licence", "timestamp"), [""] * count)
        table = {"source": ["web"] * count, "document": names, "measures": measures, **plain}
        table |= {"key": [f"id-{shard}-{n}" for n in range(count)], "chars": [100] * count}
        table |= {"side": ["train"] * count}
        path = folder / "documents" / f"web-{shard:05}.parquet"
        pq.write_table(pa.table(table), path, row_group_size=1024)
    write_drops(folder / "drops" / "web-00000.parquet", [Drop("web", "lost.txt", "min_chars", 1.0)])
    return folder


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("web/crawl/part-0007.jsonl#4321x", "web/crawl/part-0007.jsonl#4321"),
        ("crawl/prt-0007.jsonl#43210", "web/crawl/part-0007.jsonl#43210"),
        ("CRAWL/part-0007.jsonl#43210", "web/crawl/part-0007.jsonl#43210"),
        ("part-0007.jsonl#43210", "web/crawl/part-0007.jsonl#43210"),
        ("lots.txt", "web/lost.txt"),
        ("LOST.TXT", "web/lost.txt"),
        ("id-9-49998-", "web/crawl/part-0009.jsonl#49998"),
    ],
)
def test_a_mistyped_name_is_recognised_among_very_many(large: Path, typed: str, meant: str) -> None:
    assert find_documents(large, typed) == []
    assert meant in nearest(large, typed)


def test_what_is_like_nothing_has_no_nearest(large: Path) -> None:
    assert nearest(large, "%%%") == []
    assert nearest(large, "") == []


def test_the_nearest_are_as_near_as_those_of_a_plain_look(corpus: Path) -> None:
    names = [f"{d.source}/{d.document}" for some in DROPS.values() for d in some]
    names += [f"{name.rpartition('-')[0]}/{d['document']}" for name in KEPT for d in KEPT[name]]
    (best,) = difflib.get_close_matches("books/aa.txt", sorted(set(names)), n=1)
    assert nearest(corpus, "books/aa.txt")[0] == best


def test_one_of_very_many_documents_is_found_without_reading_them_as_python_does(
    large: Path,
) -> None:
    find_documents(large, "warm")
    begun = time.process_time()
    assert one(large, "id-7-43210").document == "crawl/part-0007.jsonl#43210"
    assert one(large, "web/crawl/part-0003.jsonl#17").key == "id-3-17"
    assert one(large, "lost.txt").reasons[0].rule == "min_chars"
    # It takes a quarter of a second; a loop over the rows would take a dozen.
    assert time.process_time() - begun < 3

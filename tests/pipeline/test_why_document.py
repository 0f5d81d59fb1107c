"""`why --document` and `show` of a corpus: what became of documents, from its files alone."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import cli
from stages.data.drops import Drop
from stages.data.tables import write_drops
from stages.manifest import MANIFEST
from tests.listed import DROPS, HOSTILE, write_artifact, write_corpus


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(tmp_path_factory.mktemp("corpus") / "g1")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(tmp_path)
    yield


def why(corpus: Path, name: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert cli.main(["why", str(corpus), "--document", name]) == 0
    return capsys.readouterr().out


def show(corpus: Path, *words: str) -> int:
    return cli.main(["show", str(corpus), *words])


def test_a_document_that_went_is_told_the_rule_the_number_and_the_threshold(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert why(corpus, "books/d.txt", capsys).splitlines()[:2] == [
        "books/d.txt (key B-4) was dropped by min_chars",
        "  min_chars: measured 12, asked for at least 64",
    ]
    told = why(corpus, HOSTILE, capsys)
    assert "was dropped by gopher_max_top_2gram_chars" in told
    assert "measured 0.25, asked for at most 0.2\n    begins: spam spam\n" in told


def test_a_duplicate_is_told_what_it_repeats_and_how_like_it_is(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = why(corpus, "c.txt", capsys)
    assert "books/c.txt (key B-3) was dropped by near_duplicate" in told
    assert (
        "Jaccard similarity 0.9142 with books/a.txt, where 0.8 or more counts as a repeat" in told
    )
    assert "equal to books/a.txt but for" in why(corpus, "dir/x.jsonl#3", capsys)


def test_a_document_that_stayed_is_told_all_that_was_measured_of_it(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert why(corpus, "B-1", capsys).splitlines() == [
        "books/a.txt (key B-1) is kept, to be trained on",
        "  2 documents were dropped as repeats of it, as",
        "    books/c.txt (near_duplicate 0.9142)",
        "    web/dir/x.jsonl#3 (exact_duplicate 1)",
        "  1,400 characters before any cut, licence CC0, written 2020-02-29T00:00:00",
        "  measured by the rules that it passed",
        "    min_chars         400",
        "    min_letter_share  0.75",
    ]


def test_cuts_are_told_with_what_they_cut(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = why(corpus, "e.txt", capsys)
    assert "is kept, to be trained on, without 370 characters" in told
    assert "  held_out_passage: 2 passages of held-out text (310 characters)\n" in told
    assert "    the first begins: It was\n" in told
    assert "  evaluation_item: 1 passage of evaluation gsm (60 characters)\n" in told
    gone = why(corpus, "f.txt", capsys).splitlines()
    assert gone[:2] == [
        "books/f.txt (key B-6) was dropped by held_out_remnant",
        "  held_out_remnant: characters left of it 8, asked for at least 64",
    ]
    assert "  held_out_problem: 1 statement of a held-out problem (90 characters)" in gone


def test_what_is_held_out_is_said_to_be(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "books/b.txt (key B-2) is held out" in why(corpus, "books/b.txt", capsys)


def test_what_could_not_be_read_is_told_with_the_remedy(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = why(corpus, "dir/x.jsonl line 7", capsys)
    assert "was dropped by broken_row\n  broken_row: no JSON; mend the row\n" in told


def test_all_that_are_called_so_are_shown(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, found in (("a.txt", ["books/a.txt", "web/a.txt"]), ("books/a.txt", ["books/a.txt"])):
        told = why(corpus, name, capsys)
        assert re.findall(r"^(\S+) .*is kept", told, re.M) == found
    assert re.findall(r"^(\S+) ", why(corpus, "K", capsys), re.M) == [
        "web/a.txt",
        "web/dir/y.jsonl#4",
    ]


def test_a_terminal_is_not_steered_by_a_document(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = why(corpus, "d.txt", capsys) + why(corpus, HOSTILE, capsys)
    assert show(corpus, "--samples", "min_chars") == 0
    told += capsys.readouterr().out
    assert cli.main(["why", str(corpus), "--document", f"{HOSTILE}x"]) == 2
    told += capsys.readouterr().err
    assert told.count("<script>") == 5
    assert not {"\x1b", "\u202e"} & set(told)


def test_a_name_that_nothing_has_is_one_error_with_the_nearest(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["why", str(corpus), "--document", "books/aa.txt"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert "none of 11 documents of this corpus is called so; the nearest are books/a.txt" in told
    assert cli.main(["why", str(corpus), "--document", "%%%"]) == 2
    assert "`ingot show --samples` names some" in capsys.readouterr().err


def test_a_corpus_that_lists_none_and_what_is_no_corpus_are_told_apart(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def bare(files: Path) -> Path:
        files.mkdir(parents=True)
        (files / "tokenizer.json").write_text("{}")
        return files

    old = write_artifact(tmp_path / "old", bare)
    assert cli.main(["why", str(old), "--document", "a"]) == 1
    assert "build it again: ingot run --force data" in capsys.readouterr().err
    assert show(old) == 0
    assert "documents\n" not in capsys.readouterr().out
    assert show(old, "--samples") == 2
    assert "holds no samples of documents" in capsys.readouterr().err
    manifest = (old / MANIFEST).read_text()
    (old / MANIFEST).write_text(manifest.replace('"kind":"corpus"', '"kind":"report"'))
    assert cli.main(["why", str(old), "--document", "a"]) == 2
    assert "is a report, which has no documents" in capsys.readouterr().err


def test_show_tells_of_each_source_and_of_all(
    corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert show(corpus) == 0
    told = capsys.readouterr().out
    rows = [line.split() for line in told.splitlines()]
    assert ["books", "6", "1", "1", "1", "1", "2", "16,000"] in rows
    assert ["web", "4", "1", "1", "0", "0", "2", "8,000"] in rows
    assert ["all", "65", "2", "2", "16", "1", "44", "32,000"] in rows
    assert re.search(r"^  near_duplicate +1  1.54% of those read  books 1$", told, re.M)


def test_samples_are_shown_by_rule(corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert show(corpus, "--samples") == 0
    rules = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert rules[:2] == ["rule", "kept"]
    assert set(rules[1:]) == {"kept", *(one.rule for some in DROPS.values() for one in some)}
    assert show(corpus, "--samples", "near_duplicate") == 0
    assert capsys.readouterr().out.splitlines() == [
        "books/c.txt",
        "  Jaccard similarity 0.9142 with books/a.txt, where 0.8 or more counts as a repeat",
        "  | Once",
        "",
    ]
    assert show(corpus, "--samples", "near_duplicates") == 2
    assert "did you mean 'near_duplicate'?" in capsys.readouterr().err


def test_very_many_shards_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def sharded(files: Path) -> Path:
        write_corpus(files)
        (files / "train").mkdir()
        (files / "train" / "index.json").write_text("{}")
        for number in range(300):
            (files / "train" / f"{number:05}.arrow").write_bytes(b"x" * 7)
        return files

    assert show(write_artifact(tmp_path / "g1", sharded)) == 0
    told = capsys.readouterr().out
    assert re.search(r"^  train/\*\.arrow +2,100 bytes in 300 files$", told, re.M)
    assert re.search(r"^  train/index\.json +2 bytes$", told, re.M)
    assert re.search(r"^  drops/web-00001\.parquet +[\d,]+ bytes$", told, re.M)
    assert "train/00000.arrow" not in told


def test_it_is_said_where_no_more_was_packed_than_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_artifact(tmp_path / "g1")
    (path,) = corpus.rglob("statistics.json")
    facts = json.loads(path.read_text())
    facts["sources"]["books"]["epochs"] = 0.25
    path.write_text(json.dumps(facts))
    assert "  of what is kept of books, 25% is packed: data.train_tokens" in why(
        corpus, "books/a.txt", capsys
    )
    assert "is packed" not in why(corpus, "books/b.txt", capsys)


def test_a_document_that_is_too_short_to_be_packed_was_dropped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corpus = write_artifact(tmp_path / "g1")
    (folder,) = corpus.rglob("drops")
    short = Drop("books", "a.txt", "min_document_tokens", 90.0, 150.0, "It was")
    write_drops(folder / "too-short-00000.parquet", [short])
    assert "books/a.txt was dropped by min_document_tokens\n" in why(corpus, "books/a.txt", capsys)

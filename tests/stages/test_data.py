"""Promises of the data stage as a whole."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from configs.data import DataConfig, DataSpec
from configs.errors import DataError, LeaseLost
from stages.artifacts import Corpus
from stages.contract import Workspace
from stages.data import face
from stages.data.drops import Drop
from stages.data.loop import data
from stages.data.reads import reads
from stages.data.tables import read_drops
from stages.framing import BOS_ID, EOS_ID
from stages.hashing import Hashes
from stages.shards import Rows
from stages.verifiers import Problem, find_statements, read_problems, verify
from tests.conftest import Recorder, steal

TEXT_SHARE = 0.4


@pytest.fixture
def text_folder(tmp_path: Path) -> Path:
    """40 documents of about 800 characters: enough for 60 rows of 64 tokens and more."""
    folder = tmp_path / "text"
    folder.mkdir()
    rng = np.random.default_rng(0)
    words = ["pour", "ingot", "mould", "the", "of", "furnace", "cools", "slowly", "12", "at"]
    for number in range(40):
        lines = [" ".join(rng.choice(words, size=8)) for _ in range(20)]
        (folder / f"{number:02}.txt").write_text("\n".join(lines) + "\n")
    return folder


def spec(folder: Path, *, seed: int = 0, **settings: Any) -> DataSpec:
    sources = {
        "books": {"type": "files", "share": TEXT_SHARE, "glob": str(folder / "*.txt")},
        "sums": {"type": "arithmetic", "share": 1 - TEXT_SHARE, "max_problems": 1_000},
    }
    base = {"train_tokens": 9_600, "sequence_tokens": 64, "sources": sources}
    tokenizer = {"vocab_size": 300}
    return DataSpec(
        seed=seed, data=DataConfig.model_validate({**base, "tokenizer": tokenizer, **settings})
    )


@pytest.fixture
def built(text_folder: Path, workspace: Workspace) -> Corpus:
    return data(spec(text_folder), workspace)


def tokenizer_of(corpus: Corpus) -> Tokenizer:
    return Tokenizer.from_file(str(corpus.path("tokenizer.json")))


def drops_of(corpus: Corpus) -> list[Drop]:
    """Every reason, in order."""
    files = sorted(corpus.path("drops").iterdir())
    return [drop for path in files for drop in read_drops(path)]


def rows_of(corpus: Corpus, *names: str) -> np.ndarray:
    rows = Rows(corpus.path(*names))
    return rows.take(np.arange(len(rows)))


def is_sum(row: np.ndarray, tokenizer: Tokenizer) -> bool:
    return "=" in tokenizer.decode(row.tolist())


def test_the_facts_are_what_lies_on_disk(built: Corpus) -> None:
    train = rows_of(built, "train")
    assert train.shape == (built.train_rows, built.sequence_tokens) == (150, 64)
    assert tokenizer_of(built).get_vocab_size() == built.vocab_size <= 300
    assert set(built.held_out_rows) == {"books", "sums"}
    for name, count in built.held_out_rows.items():
        assert len(Rows(built.path("held_out", name))) == count > 0
    assert len(read_problems(built.path("problems", "train.parquet"))) == built.train_problems
    held_out = read_problems(built.path("problems", "held_out.parquet"))
    assert len(held_out) == built.held_out_problems
    assert built.train_problems + built.held_out_problems == 1_000


@pytest.mark.parametrize("prefix_rows", [25, 75, 150])
def test_every_prefix_of_the_training_rows_holds_the_mixture(
    built: Corpus, prefix_rows: int
) -> None:
    tokenizer = tokenizer_of(built)
    prefix = rows_of(built, "train")[:prefix_rows]
    share = sum(not is_sum(row, tokenizer) for row in prefix) / prefix_rows
    assert abs(share - TEXT_SHARE) <= 2 / prefix_rows


def test_the_mixture_of_the_whole_is_within_one_percent(built: Corpus) -> None:
    statistics = json.loads(built.path("statistics.json").read_text())
    shares = {name: source["share"] for name, source in statistics["sources"].items()}
    assert shares == pytest.approx({"books": 0.4, "sums": 0.6}, abs=0.01)


@pytest.mark.parametrize("slip_share", [0.0, 0.95])
def test_training_never_shows_a_held_out_problem(
    text_folder: Path, workspace: Workspace, slip_share: float
) -> None:
    """Neither as it is nor mirrored, with whatever answer; each row is read by itself."""
    sources = spec(text_folder).model_dump()["data"]["sources"]
    sources["sums"]["slip_share"] = slip_share
    corpus = data(spec(text_folder, sources=sources), workspace)
    tokenizer = tokenizer_of(corpus)
    rows = [tokenizer.decode(row, False) for row in rows_of(corpus, "train").tolist()]
    begun = re.compile(r"<\|begin_of_text\|>(\d\d)\+(\d\d)=")
    shown = {tuple(sorted(found)) for row in rows for found in begun.findall(row)}
    train, held_out = (
        {tuple(operands(one)) for one in read_problems(corpus.path("problems", f"{side}.parquet"))}
        for side in ("train", "held_out")
    )
    assert len(shown) > 100
    assert shown <= train
    assert not shown & held_out


def test_held_out_text_is_whole_and_training_never_shows_it(
    built: Corpus, text_folder: Path
) -> None:
    tokenizer = tokenizer_of(built)
    stream = rows_of(built, "held_out", "books").reshape(-1).tolist()
    decoded = tokenizer.decode(stream, False).split("<|end_of_text|>")
    held_out = [text.removeprefix("<|begin_of_text|>") for text in decoded[:-1]]
    files = {path.read_text() for path in text_folder.iterdir()}
    assert held_out and set(held_out) <= files
    train = tokenizer.decode(rows_of(built, "train").reshape(-1).tolist(), False)
    assert not any(line in train for text in held_out for line in text.splitlines())
    assert stream[-1] in {BOS_ID, EOS_ID}


def test_every_problem_is_right_by_its_own_verifier(built: Corpus) -> None:
    """And by plain arithmetic, which says of no other answer that it is right."""
    for problem in read_problems(built.path("problems", "held_out.parquet")):
        right = sum(map(int, operands(problem)))
        assert verify(problem, problem.answer).reward == 1.0
        assert verify(problem, f"{right:03}"[::-1]).reward == 1.0
        assert verify(problem, f"{right + 1:03}"[::-1]).reward == 0.0


def test_equal_inputs_give_equal_bytes(
    text_folder: Path, make_workspace: Callable[..., Workspace]
) -> None:
    folders = []
    for name in ("first", "second"):
        folders.append(Path(data(spec(text_folder), make_workspace(name)).uri))
    first, second = (
        {
            path.relative_to(folder): path.read_bytes()
            for path in folder.rglob("*")
            if path.is_file()
        }
        for folder in folders
    )
    assert {"statistics.json", "data_card.html", "duplicates.parquet"} <= {*map(str, first)}
    assert first == second


def test_another_seed_gives_another_corpus(
    built: Corpus, text_folder: Path, make_workspace: Callable[..., Workspace]
) -> None:
    other = data(spec(text_folder, seed=1), make_workspace("other"))
    assert not np.array_equal(rows_of(other, "train"), rows_of(built, "train"))


def test_each_drop_is_written_with_its_reason(text_folder: Path, workspace: Workspace) -> None:
    (text_folder / "short.txt").write_text("too short")
    (text_folder / "twice.txt").write_text((text_folder / "00.txt").read_text().upper())
    corpus = data(spec(text_folder), workspace)
    assert [(drop.document, drop.rule, drop.value, drop.of) for drop in drops_of(corpus)] == [
        ("short.txt", "min_chars", 9, ""),
        ("twice.txt", "exact_duplicate", 1, "books/00.txt"),
    ]
    books = json.loads(corpus.path("statistics.json").read_text())["sources"]["books"]
    assert books["documents_dropped"] == {"exact_duplicate": 1, "min_chars": 1}
    assert (
        books["documents_read"] == 42 == books["train_documents"] + books["held_out_documents"] + 2
    )


def test_text_that_runs_out_shrinks_the_corpus_and_says_so(
    text_folder: Path, workspace: Workspace, recorder: Recorder
) -> None:
    corpus = data(spec(text_folder, train_tokens=1_000_000), workspace)
    statistics = json.loads(corpus.path("statistics.json").read_text())
    assert statistics["train_tokens"] == corpus.train_rows * 64 < 1_000_000
    assert statistics["train_tokens_missing"] == 1_000_000 - statistics["train_tokens"]
    assert statistics["sources"]["books"]["share"] == pytest.approx(TEXT_SHARE, abs=0.01)
    assert len(recorder.notes) == 1
    assert "data.train_tokens = 1,000,000" in recorder.notes[0]
    assert "for want of books; give more text there" in recorder.notes[0]


def test_a_source_cut_by_its_budget_says_so(
    text_folder: Path, workspace: Workspace, recorder: Recorder
) -> None:
    files = sorted(path.stat().st_size for path in text_folder.iterdir())
    sources = spec(text_folder).model_dump()["data"]["sources"]
    sources["books"]["max_bytes"] = sum(files) - 1
    corpus = data(spec(text_folder, sources=sources), workspace)
    statistics = json.loads(corpus.path("statistics.json").read_text())["sources"]
    last = (text_folder / "39.txt").stat().st_size
    assert {n: s["truncated"] for n, s in statistics.items()} == {"books": True, "sums": False}
    assert (statistics["books"]["unread_files"], statistics["books"]["unread_bytes"]) == (1, last)
    (said,) = recorder.notes
    assert f"data.sources.books: max_bytes = {sum(files) - 1:,} is reached; 1 files of" in said
    assert f"1 files of {last} bytes are left out" in said


def test_slips_are_recorded_and_the_held_out_sums_have_none(
    text_folder: Path, workspace: Workspace
) -> None:
    sources = spec(text_folder).model_dump()["data"]["sources"]
    sources["sums"]["slip_share"] = 0.36
    corpus = data(spec(text_folder, sources=sources), workspace)
    statistics = json.loads(corpus.path("statistics.json").read_text())["sources"]
    assert statistics["sums"]["slip_share"] == 0.35  # as met, in twentieths
    assert "slip_share" not in statistics["books"]
    text = tokenizer_of(corpus).decode(rows_of(corpus, "held_out", "sums").reshape(-1).tolist())
    sums = re.findall(r"(\d\d)\+(\d\d)=(\d{3})", text)
    assert len(sums) > 50
    assert all(int(a) + int(b) == int(answer[::-1]) for a, b, answer in sums)


def test_progress_reaches_its_end(built: Corpus, recorder: Recorder) -> None:
    assert recorder.started == [(6, "phase")]
    assert [step for step, _ in recorder.logged] == [1, 2, 3, 4, 5, 6]
    assert recorder.notes == []


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"train_tokens": 300}, r"fill 4 rows.*needs 8; data\.train_tokens = 300 is too small"),
        ({"quality": {"min_chars": 9_999}}, r"glob = .*0 usable documents of 40 read.*40 by min_c"),
    ],
)
def test_a_corpus_too_small_to_train_on_is_an_error(
    text_folder: Path, workspace: Workspace, settings: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(DataError, match=complaint):
        data(spec(text_folder, **settings), workspace)


def test_a_source_too_short_for_its_share_is_named(text_folder: Path, workspace: Workspace) -> None:
    for path in sorted(text_folder.iterdir())[2:]:
        path.unlink()
    with pytest.raises(DataError, match=r"data\.sources\.books has text for \d rows of its share"):
        data(spec(text_folder, sequence_tokens=256), workspace)


def test_of_two_short_sources_that_which_lacks_most_is_named(
    text_folder: Path, workspace: Workspace, tmp_path: Path
) -> None:
    notes = tmp_path / "notes"
    notes.mkdir()
    files = sorted(text_folder.iterdir())
    for path in files[8:11]:
        path.rename(notes / path.name)
    for path in files[11:]:
        path.unlink()
    sources = spec(text_folder).model_dump()["data"]["sources"]
    sources["books"]["share"], sources["sums"]["share"] = 0.8, 0.1
    sources["notes"] = {"type": "files", "share": 0.1, "glob": str(notes / "*.txt")}
    with pytest.raises(DataError, match=r"data\.sources\.books has text for \d rows of its share"):
        data(spec(text_folder, sequence_tokens=256, sources=sources), workspace)


def test_problems_count_as_documents_that_were_read(built: Corpus) -> None:
    sums = json.loads(built.path("statistics.json").read_text())["sources"]["sums"]
    assert sums["documents_read"] == sums["train_documents"] + sums["held_out_documents"] == 1_000


def test_nothing_is_written_without_the_lease(text_folder: Path, workspace: Workspace) -> None:
    steal(workspace)
    with pytest.raises(LeaseLost):
        data(spec(text_folder), workspace)
    assert list(Path(workspace.out).iterdir()) == []


def schoolbook(folder: Path, sums: list[str]) -> None:
    """A file of sums with their answers, in the usual order of digits, between lines of prose."""
    solved = [one.rstrip("=").split("+") for one in sums]
    lines = [f"{int(b)} + {int(a)} = {int(a) + int(b)}" for a, b in solved]
    prose = [f"Lesson {n} takes apples, and counts them one by one." for n in range(len(lines))]
    (folder / "schoolbook.txt").write_text(
        "\n".join(line for pair in zip(prose, lines, strict=True) for line in pair)
    )


def test_a_schoolbook_puts_no_held_out_problem_into_training_rows(
    text_folder: Path, make_workspace: Callable[..., Workspace], recorder: Recorder
) -> None:
    # With this seed the schoolbook is trained on.
    first = data(spec(text_folder, seed=1), make_workspace("first"))
    every = read_problems(first.path("problems", "held_out.parquet"))
    held_out = every[:20]
    # A sum tells its mirrored one too.
    taught = [operands(one) for one in held_out]
    told = sum(operands(one) in taught for one in every)
    schoolbook(text_folder, [problem.prompt for problem in held_out])
    corpus = data(spec(text_folder, seed=1), make_workspace("second"))
    assert read_problems(corpus.path("problems", "held_out.parquet"))[:20] == held_out
    shown = tokenizer_of(corpus).decode(rows_of(corpus, "train").reshape(-1).tolist(), False)
    find = find_statements(held_out)
    assert list(find(schoolbook_text(text_folder)))
    assert list(find(shown)) == []
    statistics = json.loads(corpus.path("statistics.json").read_text())["held_out_in_training"]
    assert statistics["problems_in_training_before"] == told >= 20
    assert statistics["problems_in_training_after"] == 0
    assert [(cut.document, cut.rule, cut.value) for cut in drops_of(corpus)] == [
        ("schoolbook.txt", "held_out_problem", 20)
    ]
    assert any(f"{told} of" in note and "held-out problems" in note for note in recorder.notes)


def operands(problem: Problem) -> list[str]:
    """The two numbers of a sum, whichever comes first."""
    return sorted(problem.prompt.rstrip("=").split("+"))


def schoolbook_text(folder: Path) -> str:
    """What `schoolbook` wrote."""
    return (folder / "schoolbook.txt").read_text()


def test_a_notice_in_every_file_leaves_no_trace_of_itself_in_training_rows(
    text_folder: Path, workspace: Workspace
) -> None:
    notice = " ".join(f"clause{n} of the licence binds whoever pours it;" for n in range(12))
    for path in text_folder.iterdir():
        path.write_text(f"{notice}\n{path.read_text()}")
    corpus = data(spec(text_folder), workspace)
    shown = tokenizer_of(corpus).decode(rows_of(corpus, "train").reshape(-1).tolist(), False)
    held_out = tokenizer_of(corpus).decode(
        rows_of(corpus, "held_out", "books").reshape(-1).tolist(), False
    )
    assert notice in held_out
    assert not any(notice[start : start + 100] in shown for start in range(len(notice) - 100))
    statistics = json.loads(corpus.path("statistics.json").read_text())
    found = statistics["held_out_in_training"]
    assert found["text_share_in_training_before"] > 0.2
    assert found["text_share_in_training_after"] == 0
    assert found["cuts"]["held_out_passage"] == statistics["sources"]["books"]["train_documents"]
    assert statistics["sources"]["books"]["documents_cut"] == found["cuts"]


def test_text_that_is_nothing_but_copies_is_an_error(tmp_path: Path, workspace: Workspace) -> None:
    page = " ".join(f"word{n}" for n in range(100))
    for number in range(10):
        (tmp_path / f"{number}.txt").write_text(f"{page} {number}")
    with pytest.raises(DataError, match=r"1 usable documents of 10 read.*9 by near_duplicate"):
        data(spec(tmp_path), workspace)
    with pytest.raises(DataError, match=r"sources\.books: all of its training text stands in"):
        data(spec(tmp_path, dedup={"near": False}), workspace)


def test_the_smallest_corpus_still_has_everything(tmp_path: Path, workspace: Workspace) -> None:
    (tmp_path / "own.txt").write_text("".join(f"Line {n} of my own text.\n\n" for n in range(400)))
    corpus = data(spec(tmp_path, tokenizer={"vocab_size": 1024}), workspace)
    assert 258 < corpus.vocab_size <= 1024
    assert min(corpus.held_out_rows.values()) >= 1


def test_identity_reads_the_content_of_the_files(text_folder: Path) -> None:
    before = reads(spec(text_folder), Hashes())
    assert list(before) == ["books"]
    assert set(before["books"]) == {f"{number:02}.txt" for number in range(40)}
    (text_folder / "00.txt").write_text("changed")
    assert reads(spec(text_folder), Hashes()) != before


def test_the_stage_declares_what_it_reads() -> None:
    found = face.data
    assert (found.name, dict(found.takes), found.makes, found.reads) == ("data", {}, Corpus, reads)

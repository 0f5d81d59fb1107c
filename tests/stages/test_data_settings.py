"""The data stage under settings of its own: what each of them does to the rows."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer

from configs.data import DataConfig, DataSpec
from configs.errors import DataError
from stages.artifacts import Corpus
from stages.contract import Workspace
from stages.data.drops import Drop
from stages.data.loop import data
from stages.data.tables import read_drops
from stages.framing import BOS_ID, EOS_ID
from stages.shards import Rows
from stages.verifiers import read_problems
from tests.conftest import Recorder
from tests.stages.prose import prose

ROW = 64


def rows_file(folder: Path, rows: list[dict[str, Any]], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def files(glob: str, share: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"type": "files", "glob": glob, "share": share, **more}


def spec(sources: dict[str, Any], **settings: Any) -> DataSpec:
    base = {
        "sources": sources,
        "train_tokens": 8_000,
        "sequence_tokens": ROW,
        "tokenizer": {"vocab_size": 300},
    }
    return DataSpec(seed=0, data=DataConfig.model_validate({**base, **settings}))


def train(corpus: Corpus) -> np.ndarray:
    rows = Rows(corpus.path("train"))
    return rows.take(np.arange(len(rows)))


def facts(corpus: Corpus) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(corpus.path("statistics.json").read_text())
    return found


def drops(corpus: Corpus) -> list[Drop]:
    return [drop for path in sorted(corpus.path("drops").iterdir()) for drop in read_drops(path)]


def texts(count: int = 60, words: int = 60) -> list[dict[str, Any]]:
    return [{"text": prose(n, words), "url": f"page-{n}"} for n in range(count)]


def questions(count: int) -> list[dict[str, Any]]:
    """Sums told as stories, all of different words."""
    return [
        {
            "question": f"{prose(1000 + n, 14)} takes {n} and {n + 3} more. How many?",
            "answer": f"{prose(2000 + n, 20)}, so it is {n} and {n + 3}.\n#### {2 * n + 3}",
        }
        for n in range(count)
    ]


def test_best_fit_keeps_documents_whole(tmp_path: Path, workspace: Workspace) -> None:
    source = files(rows_file(tmp_path, texts(words=8)))
    sums = {"type": "arithmetic", "share": 0.5, "max_problems": 100}
    corpus = data(
        spec(
            {"mine": source | {"share": 0.5}, "sums": sums},
            pack={"method": "best-fit"},
            quality={"min_chars": 0},
        ),
        workspace,
    )
    rows = train(corpus)
    assert (rows[:, 0] == BOS_ID).all()
    for row in rows:
        held = row[: np.flatnonzero(row != BOS_ID)[-1] + 1]
        assert held[-1] == EOS_ID
        assert (row[len(held) :] == BOS_ID).all()
    found = facts(corpus)
    padding = sum(int(ROW - 1 - np.flatnonzero(row != BOS_ID)[-1]) for row in rows)
    assert found["padding_tokens"] == padding > 0
    begun = int((rows == BOS_ID).sum()) - padding
    sources = found["sources"].values()
    assert sum(one["train_documents_packed"] for one in sources) == begun


def test_some_documents_ask_for_their_middle(tmp_path: Path, workspace: Workspace) -> None:
    made = spec(
        {"mine": files(rows_file(tmp_path, texts(200)))},
        pack={"fim_rate": 0.5},
        tokenizer={"vocab_size": 320, "special_tokens": ["fim"]},
        train_tokens=20_000,
    )
    corpus = data(made, workspace)
    tokenizer = Tokenizer.from_file(str(corpus.path("tokenizer.json")))
    begin = tokenizer.token_to_id("<｜fim▁begin｜>")
    stream = train(corpus).reshape(-1)
    asked = facts(corpus)["sources"]["mine"]["fim_documents"]
    assert 60 < asked < 140
    starts = np.flatnonzero(stream == BOS_ID)
    assert 0.3 < (stream[starts[:-1] + 1] == begin).mean() < 0.7
    held = Rows(corpus.path("held_out", "mine"))
    assert begin not in held.take(np.arange(len(held)))


def test_short_documents_are_left_out_with_their_tokens(
    tmp_path: Path, workspace: Workspace
) -> None:
    rows = [*texts(30, 20), *({"text": prose(500 + n, 200)} for n in range(30))]
    source = files(rows_file(tmp_path, rows))
    corpus = data(spec({"mine": source}, pack={"min_document_tokens": 150}), workspace)
    left = [drop for drop in drops(corpus) if drop.rule == "min_document_tokens"]
    assert len(left) == facts(corpus)["documents_too_short_to_pack"] > 20
    assert all((drop.value or 0) < 150 == drop.threshold for drop in left)
    source_facts = facts(corpus)["sources"]["mine"]
    assert source_facts["documents_dropped"] == {"min_document_tokens": len(left)}
    stays = source_facts["train_documents"] + source_facts["held_out_documents"]
    assert stays + len(left) == source_facts["documents_read"] == 60
    stream = train(corpus).reshape(-1)
    lengths = np.diff(np.flatnonzero(stream[: 20 * ROW] == BOS_ID))
    assert lengths.max() >= 150


@pytest.mark.parametrize(("epochs", "times"), [(1, 1), (2.5, 2.5)])
def test_text_is_repeated_as_often_as_it_may_be(
    tmp_path: Path, workspace: Workspace, epochs: float, times: float
) -> None:
    source = files(rows_file(tmp_path, texts()), max_epochs=epochs)
    corpus = data(spec({"mine": source}, train_tokens=10**6), workspace)
    counts = Counter(map(tuple, train(corpus).tolist()))
    assert set(counts.values()) <= {int(times), int(np.ceil(times))}
    assert corpus.train_rows == pytest.approx(times * len(counts), abs=1)
    assert facts(corpus)["sources"]["mine"]["epochs"] == pytest.approx(times, abs=0.02)


def test_problems_of_files_are_trained_on_and_asked_but_not_those_of_an_evaluation(
    tmp_path: Path, workspace: Workspace, recorder: Recorder
) -> None:
    asked = questions(80)
    exam = rows_file(tmp_path, asked[:30], "exam.jsonl")
    sources = {
        "school": {"type": "problems", "share": 0.5, "glob": rows_file(tmp_path, asked, "q.jsonl")},
        "mine": files(rows_file(tmp_path, texts()), 0.5),
    }
    evaluations = {"exam": {"glob": exam, "text_fields": ["question"]}}
    corpus = data(spec(sources, evaluations=evaluations), workspace)
    tokenizer = Tokenizer.from_file(str(corpus.path("tokenizer.json")))
    shown = tokenizer.decode(train(corpus).reshape(-1).tolist(), skip_special_tokens=False)
    stories = [one["question"][:60] for one in asked]
    assert not any(story in shown for story in stories[:30])
    assert sum(story in shown for story in stories[30:]) > 20
    found = facts(corpus)["evaluations"]["exam"]
    assert found["windows_in_training_before"] > 30 * 20
    assert found["windows_in_training_after"] == 0
    gone = {drop.document for drop in drops(corpus) if drop.rule == "evaluation_item"}
    assert 20 < len(gone) <= 30
    assert any("evaluation exam:" in note for note in recorder.notes)
    problems = read_problems(corpus.path("problems", "train.parquet"))
    prompts = {one.prompt for one in problems}
    assert not any(one["question"] + "\n" in prompts for one in asked[:30])
    assert facts(corpus)["sources"]["school"]["documents_dropped"]["evaluation_item"] == len(gone)


def test_answers_of_held_out_problems_are_cut_out_of_text(
    tmp_path: Path, make_workspace: Callable[..., Workspace]
) -> None:
    school = {"type": "problems", "share": 0.5, "held_out_share": 0.2}
    school["glob"] = rows_file(tmp_path, questions(40), "q.jsonl")
    plain = files(rows_file(tmp_path, texts()), 0.5)
    first = data(spec({"school": school, "mine": plain}), make_workspace("first"))
    held = {one.prompt for one in read_problems(first.path("problems", "held_out.parquet"))}
    answers = [one["answer"][:120] for one in questions(40) if one["question"] + "\n" in held]
    told = [{"text": f"{prose(n, 40)}\n{answers[n % len(answers)]}\n"} for n in range(60)]
    plain = files(rows_file(tmp_path, told, "told.jsonl"), 0.5)
    corpus = data(spec({"school": school, "mine": plain}), make_workspace("second"))
    tokenizer = Tokenizer.from_file(str(corpus.path("tokenizer.json")))
    shown = tokenizer.decode(train(corpus).reshape(-1).tolist(), skip_special_tokens=False)
    assert len(answers) > 3
    assert not any(answer in shown for answer in answers)
    assert facts(corpus)["sources"]["mine"]["documents_cut"]["held_out_passage"] > 40
    assert set(corpus.held_out_rows) == {"school", "mine"}


def test_a_corpus_may_be_of_problems_alone(workspace: Workspace) -> None:
    corpus = data(spec({"sums": {"type": "arithmetic", "share": 1.0}}), workspace)
    assert corpus.train_rows == 125
    assert list(corpus.path("documents").iterdir()) == []


def test_items_too_short_to_be_searched_for_harm_nothing(
    tmp_path: Path, workspace: Workspace
) -> None:
    exam = rows_file(tmp_path, [{"text": "short"}], "exam.jsonl")
    source = files(rows_file(tmp_path, texts()))
    corpus = data(spec({"mine": source}, evaluations={"exam": {"glob": exam}}), workspace)
    assert facts(corpus)["evaluations"]["exam"]["windows"] == 0


def test_of_documents_that_all_say_the_same_none_can_be_held_out(
    tmp_path: Path, workspace: Workspace
) -> None:
    source = files(rows_file(tmp_path, [{"text": prose(1)}] * 40))
    with pytest.raises(DataError, match=r"sources\.mine: (none of its documents|all of its train)"):
        data(spec({"mine": source}, dedup={"exact": False, "near": False}), workspace)


def test_what_documents_say_of_themselves_is_told_of_those_that_stay(
    tmp_path: Path, workspace: Workspace, recorder: Recorder
) -> None:
    rows = [
        {
            "text": prose(n % 40),
            "who": "CC-BY" if n < 40 else "CC0",
            "when": f"20{10 + n % 5}-05-01",
        }
        for n in range(60)
    ]
    said: dict[str, Any] = {"licence_field": "who", "timestamp_field": "when", "id_field": "nope"}
    corpus = data(spec({"mine": files(rows_file(tmp_path, rows), **said)}), workspace)
    found = facts(corpus)["sources"]["mine"]
    assert found["licences"] == {"CC-BY": 40}
    assert [one[:10] for one in found["written"]] == ["2010-05-01", "2014-05-01"]
    assert any("mine.id_field = 'nope': no document has" in note for note in recorder.notes)
    assert not any("licence_field" in note for note in recorder.notes)


def test_the_tokenizer_learns_from_every_shard(tmp_path: Path, workspace: Workspace) -> None:
    """Each file has letters of its own, and is longer than all that is learnt from."""
    for number in range(4):
        letters = [chr(0x3B1 + 6 * number + at) for at in range(6)]
        rng = np.random.default_rng(number)
        rows = [
            {"text": " ".join("".join(rng.choice(letters, 3)) for _ in range(200))}
            for _ in range(30)
        ]
        rows_file(tmp_path, rows, f"{number}.jsonl")
    made = spec(
        {"mine": files(str(tmp_path / "*.jsonl"))},
        shard_bytes=1_000,
        tokenizer={"vocab_size": 500, "training_bytes": 20_000},
    )
    corpus = data(made, workspace)
    tokenizer = Tokenizer.from_file(str(corpus.path("tokenizer.json")))
    for number in range(4):
        word = "".join(chr(0x3B1 + 6 * number + at) for at in range(6))
        assert len(tokenizer.encode(word, add_special_tokens=False).ids) <= 6

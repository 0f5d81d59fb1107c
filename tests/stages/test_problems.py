"""Promises of problems from files: which are held out, and where training text gives them away."""

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs.data import ProblemsSource
from configs.errors import DataError
from configs.seed import derive
from stages.data.problems import (
    ProblemSplit,
    final_answer,
    keep_sources_apart,
    read_problem_files,
)
from stages.hashing import Hashes
from stages.verifiers import Problem, find_statements, verify

WORDS = ("apple", "bread", "chair", "dozen", "eagle", "flour", "grape", "honey", "kettle", "lemon")


def question(number: int) -> str:
    drawn = random.Random(number)
    said = " ".join(drawn.choice(WORDS).capitalize() for _ in range(14))
    return f"Tom {number} has {said}. How many, {number}?"


def row(number: int) -> dict[str, Any]:
    return {
        "question": question(number),
        "answer": f"It is {number}+1.\n#### {number + 1:,}",
    }


def write(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return path


def source(glob: Path, **settings: object) -> ProblemsSource:
    return ProblemsSource.model_validate({"share": 1.0, "glob": str(glob), **settings})


def split(glob: Path, *, seed: int = 0, **settings: object) -> ProblemSplit:
    return read_problem_files("mine", source(glob, **settings), Hashes(), seed=seed)


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_rows_are_problems_and_documents(tmp_path: Path, name: str) -> None:
    rows = [row(number) for number in range(2000, 2400)]
    found = split(write(tmp_path / name, rows), held_out_share=0.25)
    assert (found.repeats, found.broken) == (0, ())
    by_prompt = {f"{one['question']}\n": one["answer"] for one in rows}
    for problems, texts in (
        (found.train, found.train_documents),
        (found.held_out, found.held_out_documents),
    ):
        for problem, text in zip(problems, texts, strict=True):
            assert text == problem.prompt + by_prompt[problem.prompt]
            assert problem.answer == by_prompt[problem.prompt].rpartition(" ")[2].replace(",", "")
            assert verify(problem, text).reward == 1.0
            assert problem.id.startswith("mine/") and problem.source == "question"
    every = [*found.train, *found.held_out]
    assert sorted(one.prompt for one in every) == sorted(by_prompt)
    assert len({one.id for one in every}) == len(rows)
    held = {one.prompt for one in found.held_out}
    for number, one in enumerate(rows):
        folded = "".join(one["question"].lower().split())
        expected = derive(0, "problems", folded) / 2**63 < 0.25
        assert (f"{one['question']}\n" in held) == expected, number
    assert 60 < len(held) < 140
    # In the order of the file, and the same wherever it stands.
    order = [one for one in by_prompt if one in held]
    assert [one.prompt for one in found.held_out] == order
    again = split(write(tmp_path / f"z{name}", rows[::-1]), held_out_share=0.25)
    assert {one.id for one in again.held_out} == {one.id for one in found.held_out}
    other = split(tmp_path / name, held_out_share=0.25, seed=1)
    assert {one.prompt for one in other.held_out} != held


def test_equal_questions_are_one_problem_on_one_side(tmp_path: Path) -> None:
    rows = [row(number) for number in range(200)]
    copies = [
        {**one, "question": one["question"].upper().replace(" ", " \n ") + " "} for one in rows
    ]
    found = split(write(tmp_path / "a.jsonl", [*rows, *copies]), held_out_share=0.3)
    assert found.repeats == 200
    assert len(found.train) + len(found.held_out) == 200
    prompts = {one.prompt for one in [*found.train, *found.held_out]}
    assert prompts == {f"{one['question']}\n" for one in rows}


def test_files_of_their_own_hold_problems_out(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", [row(number) for number in range(50)])
    copy = {**row(7), "question": row(7)["question"].upper()}
    held = write(tmp_path / "test.jsonl", [copy, *(row(number) for number in range(90, 95))])
    found = split(tmp_path / "train.jsonl", held_out_glob=str(held))
    assert len(found.held_out) == 6
    assert len(found.train) == 49, "one of them is held out"
    assert found.repeats == 1


def test_what_one_source_holds_out_no_other_trains_on(tmp_path: Path) -> None:
    sources = {
        "one": source(write(tmp_path / "a.jsonl", [row(number) for number in range(300)])),
        "two": source(
            write(tmp_path / "b.jsonl", [row(number) for number in range(200, 500)]),
            held_out_share=0.5,
        ),
    }
    splits = {
        name: read_problem_files(name, one, Hashes(), seed=0) for name, one in sources.items()
    }
    kept = keep_sources_apart(splits, sources)
    held = {one.prompt for some in kept.values() for one in some.held_out}
    shared = {one.prompt for one in splits["one"].train} & held
    assert shared, "or nothing is tested"
    for name, some in kept.items():
        assert not {one.prompt for one in some.train} & held
        assert some.held_out == splits[name].held_out
        assert len(some.train) == len(some.train_documents)
        for one, text in zip(some.train, some.train_documents, strict=True):
            assert text.startswith(one.prompt)
    assert kept["one"].repeats == len(shared)


@pytest.mark.parametrize(
    ("answer", "final"),
    [
        ("some steps\n#### 72", "72"),
        ("#### 5 or rather\n#### $1,234.50 ", "1234.50"),
        ("#### -3", "-3"),
        ("1 200", "1200"),
        ("#### New York, NY ", "New York, NY"),
        ("#### 3/4", "3/4"),
        ("no mark at all", "no mark at all"),
        ("####  ", ""),
    ],
)
def test_the_final_answer_is_what_the_last_mark_precedes(answer: str, final: str) -> None:
    assert final_answer(answer, "####") == final


def test_few_broken_rows_are_left_out_and_many_are_an_error(tmp_path: Path) -> None:
    rows = [row(number) for number in range(300)]
    bad = [{"question": "What?"}, {"question": " ", "answer": "5"}, {"answer": "5"}]
    path = write(tmp_path / "a.jsonl", [*bad, *rows])
    found = split(path)
    assert [one.place for one in found.broken] == [
        "a.jsonl row 1",
        "a.jsonl row 2",
        "a.jsonl line 3",
    ]
    assert "has no answer; set data.sources.mine.answer_field" in found.broken[0].reason
    assert "set data.sources.mine.prompt_field to the key" in found.broken[2].reason
    assert len(found.train) + len(found.held_out) == 300
    write(path, [*bad, *rows[:200]])
    with pytest.raises(DataError, match=r"a\.jsonl.*: 3 of 203 rows are broken, more than 1%"):
        split(path)
    with pytest.raises(DataError, match=r"set data\.sources\.mine\.prompt_field to the key"):
        split(path, prompt_field="problem")


def test_a_side_without_problems_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [row(1)])
    with pytest.raises(DataError, match=r"mine\.held_out_share = 0\.05: 0 .* held out and 1 left"):
        split(path)
    with pytest.raises(DataError, match=r"mine\.held_out_glob = .*: 1 .* held out and 0 left"):
        split(path, held_out_glob=str(path))
    (tmp_path / "b.txt").write_text("words")
    with pytest.raises(DataError, match=r"b\.txt holds no rows; give files of"):
        split(tmp_path / "b.txt")


PROBLEMS = [
    Problem(id=f"mine/{n}", prompt=question(n) + "\n", answer=str(n), source="question")
    for n in range(30)
]
SHORT = Problem(
    id="mine/short", prompt="How many legs have three cats?\n", answer="12", source="question"
)
FIND = find_statements([*PROBLEMS, SHORT])


def folded(text: str) -> str:
    return "".join(one for one in text.lower() if not one.isspace())


def stands(problem: Problem, text: str) -> bool:
    """Whether any 50 characters in a row of the question, or all of it, stand in a text."""
    asked, given = folded(problem.prompt), folded(text)
    length = min(50, len(asked))
    return any(asked[at : at + length] in given for at in range(len(asked) - length + 1))


def test_questions_are_found_where_a_slow_search_finds_them() -> None:
    drawn = random.Random(5)
    hits = misses = 0
    for number in range(300):
        parts = []
        for _ in range(drawn.randrange(1, 4)):
            asked = drawn.choice([*PROBLEMS, SHORT]).prompt
            first = drawn.randrange(len(asked) // 2)
            part = asked[first : first + drawn.randrange(10, 140)]
            part = drawn.choice([part, part.upper(), part.replace(" ", "\n   "), part + " 7"])
            parts.append(part)
        text = f"Before {number}. " + drawn.choice([" ", "\n\n", "..."]).join(parts) + " after"
        found = {one.problem_id for one in FIND(text)}
        expected = {one.id for one in [*PROBLEMS, SHORT] if stands(one, text)}
        assert found == expected, text
        hits += len(found)
        misses += not found
    assert hits > 100 and misses > 20


def test_a_statement_covers_the_question_and_the_first_line_of_its_answer() -> None:
    asked = PROBLEMS[3].prompt.strip()
    shouted = asked.upper().replace(" ", "\t ")
    text = f"Intro.\nQ: {shouted}**\n\n  A: it is 3\nSecond line\nmore"
    (one,) = FIND(text)
    assert one.problem_id == "mine/3"
    assert text[one.start : one.end] == f"{shouted}**\n\n  A: it is 3"
    (one,) = FIND(f"{asked} 3\nmore")
    assert one.end == len(f"{asked} 3")
    (one,) = FIND(f"x {SHORT.prompt.upper()}12\nmore")
    assert (one.start, one.problem_id) == (2, "mine/short")


def test_two_questions_in_a_row_are_two_statements() -> None:
    text = f"{PROBLEMS[1].prompt}\n{PROBLEMS[2].prompt}ok\n"
    found = list(FIND(text))
    assert {one.problem_id for one in found} == {"mine/1", "mine/2"}
    by_id = {one.problem_id: text[one.start : one.end] for one in found}
    assert by_id["mine/1"].startswith(PROBLEMS[1].prompt.strip())
    assert by_id["mine/2"] == f"{PROBLEMS[2].prompt}ok"


def test_a_question_that_stands_twice_is_stated_twice() -> None:
    text = f"{PROBLEMS[1].prompt}{PROBLEMS[2].prompt}{PROBLEMS[1].prompt}end"
    found = [one.start for one in FIND(text) if one.problem_id == "mine/1"]
    assert found == [0, len(f"{PROBLEMS[1].prompt}{PROBLEMS[2].prompt}")]


def test_a_question_of_few_letters_is_not_looked_for() -> None:
    tiny = Problem(id="mine/t", prompt="What is 7?\n", answer="7", source="question")
    assert list(find_statements([tiny])("What is 7?\n7")) == []

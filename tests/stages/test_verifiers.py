"""Promises of problems and of the rewards given for answers."""

from decimal import Decimal
from pathlib import Path

import pytest

from configs.errors import VerifierError
from stages.verifiers import Problem, read_number, read_problems, verify, write_problems

PROBLEM = Problem(id="sums/37+45=", prompt="37+45=", answer="280", source="arithmetic")


@pytest.mark.parametrize("answer", ["280", " 280", "280\n", "\t280  "])
def test_the_right_answer_is_rewarded_whatever_white_space_surrounds_it(answer: str) -> None:
    assert verify(PROBLEM, answer).reward == 1.0


@pytest.mark.parametrize(
    "answer", ["", "   ", "281", "0280", "28 0", "280 280", "280<|end_of_text|>", "\ud800", "٢٨٠"]
)
def test_any_other_text_earns_nothing_and_says_why(answer: str) -> None:
    verdict = verify(PROBLEM, answer)
    assert verdict.reward == 0.0
    assert verdict.reason != ""


def test_the_reason_shows_both_answers() -> None:
    assert verify(PROBLEM, "281").reason == "'281' instead of '280'"


def test_a_long_answer_makes_no_long_reason() -> None:
    assert len(verify(PROBLEM, "9" * 10_000).reason) < 100


def test_a_problem_that_cannot_be_judged_is_an_error_and_no_zero() -> None:
    with pytest.raises(
        VerifierError, match="no verifier for source 'poetry'; known: arithmetic, quest"
    ):
        verify(PROBLEM.model_copy(update={"source": "poetry"}), "280")
    with pytest.raises(VerifierError, match="its answer is empty"):
        verify(PROBLEM.model_copy(update={"answer": " "}), "")


def test_problems_come_back_as_they_were_written(tmp_path: Path) -> None:
    problems = [PROBLEM.model_copy(update={"id": f"sums/{n}", "answer": str(n)}) for n in range(9)]
    write_problems(tmp_path / "new" / "train.parquet", problems)
    assert read_problems(tmp_path / "new" / "train.parquet") == problems


def question(answer: str) -> Problem:
    return Problem(id="asked/1", prompt="How many?\n", answer=answer, source="question")


@pytest.mark.parametrize(
    ("right", "answer"),
    [
        ("72", "72"),
        ("72", "steps: 48/2=24, then 48+24 = <<48+24=72>>72.\n#### 72"),
        ("72", "The answer is 72."),
        ("72", "72.0"),
        ("72.0", "about $72"),
        ("1200", "it costs $1,200.00"),
        ("1,200", "1200"),
        ("-5", "minus: -5"),
        ("-5", "x = −5"),
        ("-5", "-$5"),
        ("5", "10-5"),
        ("5", "page 3-5"),
        ("0.5", "about .5"),
        ("New York", "It is far.\n#### New York"),
        ("New York", " New York \n"),
        ("3/4", "3/4"),
    ],
)
def test_the_last_number_is_the_answer_to_a_question(right: str, answer: str) -> None:
    assert verify(question(right), answer).reward == 1.0


@pytest.mark.parametrize(
    ("right", "answer"),
    [
        ("72", "72 and then 73"),
        ("72", "seventy-two"),
        ("72", "720"),
        ("72", "7.2"),
        ("72", "-72"),
        ("72", ""),
        ("72", " \n"),
        ("72", "٧٢"),
        ("72", "72" + "0" * 100_000),
        ("72", "\ud800"),
        ("-5", "5"),
        ("New York", "New York or York"),
        ("New York", "york"),
        ("3/4", "4"),
    ],
)
def test_another_last_number_earns_nothing_and_says_why(right: str, answer: str) -> None:
    verdict = verify(question(right), answer)
    assert verdict.reward == 0.0
    assert 0 < len(verdict.reason) < 150


def test_the_reason_shows_both_numbers() -> None:
    assert (
        verify(question("72"), "so 1,073.").reason == "the last number is '1,073' instead of '72'"
    )
    assert verify(question("72"), "so.").reason == "no number instead of '72'"
    with pytest.raises(VerifierError, match="its answer is empty"):
        verify(question(" "), "5")


@pytest.mark.parametrize(
    ("text", "number"),
    [("1,200", "1200"), (" $ 3.50 ", "3.5"), ("-7", "-7"), ("5.", "5"), (".5", "0.5")],
)
def test_numbers_are_read_without_what_people_put_around_them(text: str, number: str) -> None:
    assert read_number(text) == Decimal(number)


@pytest.mark.parametrize("text", ["", "3/4", "5 apples", "--5", "1e5", "٣", "nan", "9" * 65])
def test_what_is_no_number_is_none(text: str) -> None:
    assert read_number(text) is None

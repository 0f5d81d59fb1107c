"""Promises of problems and of the rewards given for answers."""

from pathlib import Path

import pytest

from configs.errors import VerifierError
from stages.verifiers import Problem, read_problems, verify, write_problems

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
    with pytest.raises(VerifierError, match="no verifier for source 'poetry'; known: arithmetic"):
        verify(PROBLEM.model_copy(update={"source": "poetry"}), "280")
    with pytest.raises(VerifierError, match="its answer is empty"):
        verify(PROBLEM.model_copy(update={"answer": " "}), "")


def test_problems_come_back_as_they_were_written(tmp_path: Path) -> None:
    problems = [PROBLEM.model_copy(update={"id": f"sums/{n}", "answer": str(n)}) for n in range(9)]
    write_problems(tmp_path / "new" / "train.parquet", problems)
    assert read_problems(tmp_path / "new" / "train.parquet") == problems

"""Answers to be read: few, short, and a table of one row each."""

from pathlib import Path

import pytest

from configs.errors import ArtifactError
from pipeline.plain import samples_table
from pipeline.steplog import collect
from stages.samples import (
    ENTRY,
    MAX_CHARS,
    MAX_SAMPLES,
    SAMPLES,
    Sample,
    as_entry,
    as_table,
    read_samples,
    write_samples,
)

ONE = Sample(prompt="1+1=", right_answer="20", answer="2\n|`", reward=0.0, reason="wrong")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    samples = [ONE, ONE.model_copy(update={"model": "after", "drawn": "greedy", "reward": 1.0})]
    write_samples(tmp_path, samples)
    assert list(read_samples(tmp_path)) == samples


def test_an_artifact_without_samples_has_none(tmp_path: Path) -> None:
    assert read_samples(tmp_path) == ()
    assert samples_table(tmp_path, collect([])) is None


def test_many_and_long_answers_are_cut(tmp_path: Path) -> None:
    long = ONE.model_copy(update={"answer": "🙂" * 100_000})
    write_samples(tmp_path, [long] * (MAX_SAMPLES + 50))
    found = read_samples(tmp_path)
    assert len(found) == MAX_SAMPLES
    assert {one.answer for one in found} == {"🙂" * (MAX_CHARS - 1) + "…"}
    assert (tmp_path / SAMPLES).stat().st_size < 1_000_000


def test_a_table_has_no_column_that_is_empty_for_all() -> None:
    assert as_table([ONE, ONE.model_copy(update={"drawn": "greedy"})]) == {
        "columns": ["drawn", "prompt", "right_answer", "answer", "reward", "reason"],
        "data": [
            [None, "1+1=", "20", "2\n|`", 0.0, "wrong"],
            ["greedy", "1+1=", "20", "2\n|`", 0.0, "wrong"],
        ],
    }


def test_samples_of_a_step_log_bear_their_step_and_those_of_the_artifact_come_first(
    tmp_path: Path,
) -> None:
    log = collect([{"step": step, ENTRY: as_entry([ONE, ONE])} for step in (1, 5)])
    table = samples_table(tmp_path, log)
    assert table is not None
    assert table["columns"][0] == "step"
    assert [row[0] for row in table["data"]] == [1, 1, 5, 5]
    write_samples(tmp_path, [ONE])
    assert samples_table(tmp_path, log) == as_table([ONE])


def test_samples_of_a_long_training_are_bounded() -> None:
    records = ({"step": step, ENTRY: as_entry([ONE])} for step in range(5_000))
    steps = [one.step for one in collect(records).samples]
    assert len(steps) <= MAX_SAMPLES + 1
    assert (steps[0], steps[-1]) == (0, 4_999)


@pytest.mark.parametrize("text", ["{", "[{}]", '[{"prompt": 1}]'])
def test_a_file_that_holds_no_samples_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / SAMPLES).write_text(text)
    with pytest.raises(
        ArtifactError, match=r"samples\.json: not samples that can .* mend the stage"
    ):
        read_samples(tmp_path)


def test_a_step_that_holds_no_samples_is_one_clear_error() -> None:
    with pytest.raises(ArtifactError, match=r"step 3 of the step log: not samples"):
        collect([{"step": 3, ENTRY: [{"prompt": "1"}]}])

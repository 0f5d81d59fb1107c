"""What a run says of `--profile` where nothing was trained."""

from types import SimpleNamespace
from typing import Any, cast

import pytest

from pipeline.cli import main, parse
from pipeline.records import Built, Reused
from pipeline.verbs.run import _unprofiled


def node(name: str, stage: str) -> Any:
    return SimpleNamespace(name=name, planned=SimpleNamespace(stage=SimpleNamespace(name=stage)))


def outcome(kind: type[Built] | type[Reused]) -> Any:
    return object.__new__(kind)


def told(nodes: list[Any], **outcomes: Any) -> list[str]:
    record: Any = SimpleNamespace(outcomes=outcomes)
    return list(_unprofiled(cast(Any, nodes), record))


def test_a_training_that_is_reused_was_not_profiled_and_one_that_is_built_says_so_itself() -> None:
    line = [node("data", "data"), node("pretrain", "pretrain"), node("posttrain", "posttrain")]
    found = told(line, data=outcome(Reused), pretrain=outcome(Reused), posttrain=outcome(Built))
    assert found == ["pretrain is reused: nothing was profiled; --force pretrain trains it again"]


def test_a_run_without_training_says_so() -> None:
    line = [node("data", "data"), node("pretrain", "pretrain")]
    assert told(line, data=outcome(Built)) == [
        "--profile: this run trains nothing, and nothing was profiled"
    ]


def test_the_command_line_takes_it_and_refuses_other_words(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert parse(["run", "tiny", "--profile", "10-12:0"]).profile == "10-12:0"
    assert parse(["run", "tiny"]).profile is None
    assert main(["run", "tiny", "--profile", "10-12:7"]) == 2
    assert capsys.readouterr().err == (
        "ingot: error: --profile 10-12:7: there is no trainer 7, for cluster.trainers = 2 are "
        "numbered from 0; name one up to 1\n"
    )

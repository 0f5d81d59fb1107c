"""What may be asked of `--profile`."""

import re

import pytest

from configs.errors import ConfigError
from configs.profile import Profile, parse_profile


@pytest.mark.parametrize(
    ("said", "expected", "steps"),
    [
        ("10-12:0", Profile(10, 12, 0), "10-12"),
        ("3:1", Profile(3, 3, 1), "3"),
        ("7-7:0", Profile(7, 7, 0), "7"),
    ],
)
def test_steps_and_a_rank_are_read(said: str, expected: Profile, steps: str) -> None:
    found = parse_profile(said, trainers=2)
    assert found == expected
    assert found.steps == steps


def test_nothing_is_asked_for_by_default() -> None:
    assert parse_profile(None, trainers=2) is None


@pytest.mark.parametrize(
    ("said", "complaint"),
    [
        ("10-12", "is not STEPS:RANK; write steps 10 to 12 of trainer 0 as 10-12:0"),
        ("a:0", "is not STEPS:RANK"),
        ("", "is not STEPS:RANK"),
        ("1-2-3:0", "is not STEPS:RANK"),
        ("0-3:0", "steps are counted from 1"),
        ("12-10:0", "the last is not before the first"),
        ("1:2", "there is no trainer 2, for cluster.trainers = 2 are numbered from 0; name one up"),
    ],
)
def test_other_words_are_refused_in_one_sentence(said: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=f"^--profile {said}: .*{re.escape(complaint)}") as caught:
        parse_profile(said, trainers=2)
    assert "\n" not in str(caught.value)


def test_a_training_has_some_of_the_steps_or_none() -> None:
    asked = Profile(3, 9, 0)
    assert asked.within(20) == asked
    assert asked.within(5) == Profile(3, 5, 0)
    assert asked.within(2) is None

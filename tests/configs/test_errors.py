"""Promises of the error tree."""

import pickle
from itertools import pairwise

import pytest

from configs import errors
from configs.errors import ConfigError, IngotError

KINDS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, IngotError)
]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_crosses_process_borders_whole(kind: type[IngotError]) -> None:
    sent = kind("batch = 3, but workers = 2; choose a multiple")
    received = pickle.loads(pickle.dumps(sent))
    assert type(received) is kind
    assert str(received) == str(sent)


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_keeps_its_message_as_it_was_written(kind: type[IngotError]) -> None:
    assert str(kind("what; remedy")) == "what; remedy"


@pytest.mark.parametrize("kind", KINDS)
def test_every_error_makes_the_exit_code_non_zero(kind: type[IngotError]) -> None:
    assert kind.exit_code == (2 if kind.__name__ in {"ConfigError", "PlanError"} else 1)


def test_the_tree_in_the_docstring_is_the_tree() -> None:
    drawn = [line for line in (errors.__doc__ or "").split("\n") if "──" in line]
    parents = ["IngotError"]
    for line in drawn:
        name = line.split("──")[1].split()[0]
        depth = line.index("──") // 4
        parents = [*parents[: depth + 1], name]
        for above, below in pairwise(parents):
            assert issubclass(getattr(errors, below), getattr(errors, above))
    assert {line.split("──")[1].split()[0] for line in drawn} == {
        kind.__name__ for kind in KINDS if kind is not IngotError
    }


def test_a_config_error_is_caught_by_who_only_knows_value_errors() -> None:
    with pytest.raises(ValueError, match="no such field"):
        raise ConfigError("pretrain.stesp = 3: no such field; did you mean 'steps'?")

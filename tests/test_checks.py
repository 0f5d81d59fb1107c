"""The model's signatures are checked in the first calls of every test."""

import pytest
import torch
from jaxtyping import TypeCheckError

from model.balance import updated_bias
from tests.checks import CHECKS

ONE_AXIS, TWO_AXES = torch.ones(2), torch.ones(2, 2)


def test_a_wrong_shape_is_an_error_until_the_checks_are_used_up() -> None:
    with pytest.raises(TypeCheckError):
        updated_bias(TWO_AXES, TWO_AXES, 0.1)
    for _ in range(CHECKS):
        updated_bias(ONE_AXIS, ONE_AXIS, 0.1)
    updated_bias(TWO_AXES, TWO_AXES, 0.1)


def test_the_next_test_has_all_its_checks() -> None:
    with pytest.raises(TypeCheckError):
        updated_bias(TWO_AXES, TWO_AXES, 0.1)

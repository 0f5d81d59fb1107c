"""How many calls of a test are checked against the model's signatures.

Shapes and dtypes are checked by jaxtyping and beartype, which costs more than the small products of
a decoding loop themselves: checking every call of every test made the suite a third slower. What a
loop does wrong it does in its first rounds, or fails to do with other shapes, in another test.
"""

import functools
from collections.abc import Callable

from beartype import beartype
from jaxtyping import config

CHECKS = 4_000
"""Of arguments or of results, in each test with the fixtures that it sets up."""

_left = CHECKS


def first_calls(function: Callable[..., object]) -> Callable[..., object]:
    """`beartype`, until a test has used up its checks; then jaxtyping checks nothing."""
    checked = beartype(function)

    @functools.wraps(function)
    def counted(*args: object, **kwargs: object) -> object:
        global _left
        _left -= 1
        if _left == 0:
            config.update("jaxtyping_disable", True)
        return checked(*args, **kwargs)

    return counted


def begin() -> None:
    """Give the next test all its checks."""
    global _left
    _left = CHECKS
    config.update("jaxtyping_disable", False)

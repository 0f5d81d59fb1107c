"""What nodes, and the parts that their names are made of, may be called."""

import re
from typing import Annotated

from pydantic import AfterValidator

_WORD = r"[A-Za-z0-9_][A-Za-z0-9_-]*"
_NODE = re.compile(rf"{_WORD}(\.{_WORD})*")
_NODE_CHARS = 100
_WORD_CHARS = 40
_TAKEN = frozenset({"config", "work", "corpus", "ngram"})
_FIGURE = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")


def check_node_name(name: str) -> str:
    """The name; ValueError if it cannot also name a selector, a file and a logged model."""
    if len(name) > _NODE_CHARS or not _NODE.fullmatch(name):
        raise ValueError(
            "a node's name is words of A-Z, a-z, 0-9, _ and -, none of which begins with -, joined "
            f"by single dots, of at most {_NODE_CHARS} characters, as posttrain.math; rename "
            f"{name!r}"
        )
    return name


def _check_word(name: str) -> str:
    if len(name) > _WORD_CHARS or not re.fullmatch(_WORD, name):
        raise ValueError(
            f"a name is one word of A-Z, a-z, 0-9, _ and -, of at most {_WORD_CHARS} characters, "
            f"that does not begin with -; rename {name!r}"
        )
    return name


def _check_figure(name: str) -> str:
    if name in _TAKEN:
        raise ValueError(f"a model cannot be called {name!r}, as something else is; rename it")
    if not _FIGURE.fullmatch(name):
        raise ValueError(
            "a model's name begins with a letter and holds at most 40 of A-Z, a-z, 0-9 and _, as "
            f"its figures are called by it; rename {name!r}"
        )
    return name


NodeName = Annotated[str, AfterValidator(check_node_name)]
Word = Annotated[str, AfterValidator(_check_word)]
"""Ends the name of a node: `math` of `posttrain.math`."""
ModelName = Annotated[str, AfterValidator(_check_figure)]
"""Begins the names of a model's figures: `after` of `after_pass_at_1`."""

"""The alphabet in which byte-level vocabularies spell text: one character for each byte."""

from collections.abc import Mapping
from functools import cache

_PRINTABLE = (range(0x21, 0x7F), range(0xA1, 0xAD), range(0xAE, 0x100))
"""Bytes that are spelt by the Latin-1 character of the same number."""


@cache
def alphabet() -> frozenset[str]:
    """256 characters; bytes that are not printable are spelt by those from number 256 on."""
    printable = {byte for part in _PRINTABLE for byte in part}
    others = range(256, 256 + 256 - len(printable))
    return frozenset(map(chr, (*printable, *others)))


def odd_token(vocabulary: Mapping[str, int], added: set[str]) -> str | None:
    """A token of the vocabulary that is spelt otherwise, and is none of the `added` ones; none if
    all are byte-level."""
    known = alphabet()
    return next((one for one in vocabulary if one not in added and not known.issuperset(one)), None)

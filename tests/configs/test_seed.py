"""Promises of the seed tree."""

from hypothesis import given
from hypothesis import strategies as st

from configs.seed import derive

letters = st.characters(codec="utf-8", exclude_characters="\x1f")
names = st.lists(st.text(letters, max_size=5), max_size=4)


def test_seeds_are_the_same_in_every_version_of_ingot() -> None:
    """SHA-256 of "0" and of "7", "data", "shuffle", "3" joined, computed elsewhere."""
    assert derive(0) == 0x5FECEB66FFC86F38 >> 1
    assert derive(7, "data", "shuffle", 3) == 0x9A7EDF4CCA688921 >> 1


@given(st.integers(0, 2**32), names, names)
def test_names_that_differ_give_seeds_that_differ(seed: int, a: list[str], b: list[str]) -> None:
    assert (derive(seed, *a) == derive(seed, *b)) == (a == b)


@given(st.integers(0, 2**32), names)
def test_a_seed_fits_a_signed_64_bit_integer(seed: int, a: list[str]) -> None:
    assert 0 <= derive(seed, *a) < 2**63


def test_joining_names_differently_gives_another_seed() -> None:
    assert derive(0, "ab", "c") != derive(0, "a", "bc")

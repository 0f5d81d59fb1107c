"""Texts that nobody wrote, for tests that compare texts."""

import numpy as np

WORDS = ("pour", "ingot", "mould", "the", "of", "furnace", "cools", "slowly", "at", "dawn")


def prose(seed: int, words: int = 200) -> str:
    """Words in an order of their own; no two seeds share fifty characters."""
    return " ".join(np.random.default_rng(seed).choice(WORDS, size=words))

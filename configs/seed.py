"""The only source of randomness: one seed in the recipe, split by name."""

import hashlib


def derive(seed: int, *names: str | int) -> int:
    """A 63-bit seed for the purpose that `names` spell, e.g. `derive(0, "data", "shuffle", 3)`.

    Names are joined with a separator that cannot occur in them, so ("ab", "c") and ("a", "bc")
    differ. The result is the first 8 bytes of a SHA-256, without the sign bit.
    """
    text = "\x1f".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1

"""Paragraphs of documents and keys to compare them by, and texts without what tells no two apart.

Axes: P paragraphs.
"""

import hashlib
import re
import unicodedata

import numpy as np
import numpy.typing as npt

_BLANK_LINES = re.compile(r"\n\s*\n")
_SPACES = bytes(filter(lambda c: chr(c).isspace(), range(0x80)))
_LOWER = bytes(range(0x100)).lower()
_LOWER_SPACED = bytes(0x20 if c in _SPACES else c for c in _LOWER)
"""White space as spaces, capitals as small letters."""
_SPLIT_CHARS = 512
"""Shorter texts are put in order faster word by word than by calls of numpy."""


def paragraphs(text: str, least_chars: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
    """Where a text's paragraphs begin and end in characters [P, 2], and their keys [P].

    Blank lines divide paragraphs. A key is 64 bits of the BLAKE2b hash of a paragraph's characters
    without white space and in lower case; a paragraph with fewer than `least_chars` of these is
    none. The white space around a paragraph is no part of it.
    """
    spans: list[tuple[int, int]] = []
    keys: list[bytes] = []
    begin = 0
    for end, after in [*(gap.span() for gap in _BLANK_LINES.finditer(text)), (len(text), 0)]:
        part = text[begin:end]
        begin, start = after, begin
        chars, folded = _folded(part)
        if chars < max(least_chars, 1):
            continue
        first = start + len(part) - len(part.lstrip())
        spans.append((first, start + len(part.rstrip())))
        keys.append(hashlib.blake2b(folded, digest_size=8).digest())
    found = np.frombuffer(b"".join(keys), "<u8").astype(np.uint64)
    return np.array(spans, np.int64).reshape(-1, 2), found


def plain(text: str) -> bytes:
    """The text in UTF-8 without case, white-space runs and Unicode composition.

    These are its words after NFC and case folding with single spaces between them; the words of a
    long ASCII text are found by numpy, in a third of the time.
    """
    if not text.isascii():
        words = unicodedata.normalize("NFC", text).casefold().split()
        return " ".join(words).encode("utf-8", "surrogatepass")
    if len(text) < _SPLIT_CHARS:
        return " ".join(text.lower().split()).encode()
    data = np.frombuffer(text.encode().translate(_LOWER_SPACED), np.uint8)
    visible = data != 0x20
    kept = visible.copy()
    # The first space after a word stays.
    kept[1:] |= visible[:-1]
    return bytes(data[kept]).rstrip(b" ")


def _folded(part: str) -> tuple[int, bytes]:
    """How many characters count of a paragraph, and these in UTF-8."""
    if part.isascii():
        folded = part.encode().translate(_LOWER, _SPACES)
        return len(folded), folded
    characters = "".join(part.lower().split())
    return len(characters), characters.encode("utf-8", "surrogatepass")

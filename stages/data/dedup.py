"""Finds documents that say what an earlier one said."""

import hashlib
import unicodedata

from stages.data.files import Document
from stages.data.quality import Drop, drop


def digest(text: str) -> str:
    """SHA-256 of the text without case, white-space runs and Unicode composition."""
    normal = " ".join(unicodedata.normalize("NFC", text).casefold().split())
    return hashlib.sha256(normal.encode()).hexdigest()


class Seen:
    """The documents that came by, over all sources: the first of equal ones is kept."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self._first: dict[str, str] = {}

    def check(self, document: Document) -> Drop | None:
        """The drop of a document that repeats an earlier one; none for a new document."""
        here = f"{document.source}/{document.id}"
        first = self._first.setdefault(digest(document.text), here)
        return None if first == here else drop(document, "exact_duplicate", first, None)

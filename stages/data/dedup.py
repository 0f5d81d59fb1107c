"""Finds documents that say what an earlier one said, and decides which are held out."""

import hashlib
import unicodedata

from configs.seed import derive
from stages.data.ingest import Document
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


def hold_out(
    documents: list[Document], share: float, *, seed: int
) -> tuple[list[Document], list[Document]]:
    """(training, held-out) documents, each in the order given.

    A document's place follows from its own text and the seed alone, so that adding documents
    moves none. When chance would leave either side of two or more documents empty, the nearest
    one to the threshold crosses it.
    """
    place = [derive(seed, "data", "held-out", digest(one.text)) / 2**63 for one in documents]
    least, most = min(place), max(place)
    threshold = min(max(share, least), most - 2**-53) if least < most else share
    train = [one for one, at in zip(documents, place, strict=True) if at > threshold]
    held = [one for one, at in zip(documents, place, strict=True) if at <= threshold]
    return train, held

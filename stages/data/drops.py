"""Why documents, or parts of them, are not in the corpus: one record a reason."""

from dataclasses import dataclass

SHOWN_CHARS = 80
"""As much of a text is kept in the record of its drop."""


@dataclass(frozen=True, slots=True)
class Drop:
    """Why one document, or a part of it, is not in the corpus."""

    source: str
    document: str
    rule: str
    value: float | None = None
    """What was measured: of a near-duplicate the Jaccard similarity, of a cut how many parts."""
    threshold: float | None = None
    start: str = ""
    """First characters of the text, or of the first part that was cut."""
    of: str = ""
    """What it repeats: a document, or a set that is held out."""
    cut_chars: int | None = None
    """What was cut of the document; none if all of it went."""
    reason: str = ""
    """Of what could not be read: what is wrong, and the remedy."""
    key: str = ""
    """The document's own name for itself, as the source's `id_field` gives it."""

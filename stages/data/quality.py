"""Rules that a document must pass, and the reason written for each that does not."""

import unicodedata
from collections.abc import Callable
from dataclasses import asdict, dataclass

from configs.data import QualityConfig
from stages.data.files import Document

_SHOWN_CHARS = 80


@dataclass(frozen=True, slots=True)
class Drop:
    """Why one document, or a part of it, is not in the corpus."""

    source: str
    document: str
    rule: str
    value: float | str
    """What was measured; for a duplicate, the document that it repeats, for a cut, the parts."""
    threshold: float | None
    start: str
    """First characters of the text, or of the first part that was cut."""
    cut_chars: int | None = None
    """What was cut of the document; none if all of it went."""

    def record(self) -> dict[str, str | float | None]:
        """The fields, as JSON values."""
        return asdict(self)


def judge(document: Document, config: QualityConfig) -> Drop | None:
    """The first rule that the document fails, or none. Rules are named after their thresholds."""
    for rule, measure in _RULES.items():
        value, threshold = measure(document.text), getattr(config, rule)
        if value < threshold if rule.startswith("min_") else value > threshold:
            return drop(document, rule, value, threshold)
    return None


def drop(document: Document, rule: str, value: float | str, threshold: float | None) -> Drop:
    """The record that `rule` took `document` out."""
    start = document.text[:_SHOWN_CHARS]
    shown = round(value, 6) if isinstance(value, float) else value
    return Drop(document.source, document.id, rule, shown, threshold, start)


def _longest_line(text: str) -> int:
    return max(map(len, text.split("\n")))


def _letter_share(text: str) -> float:
    return sum(map(str.isalpha, text)) / max(1, len(text))


def _control_share(text: str) -> float:
    """Control characters other than tab and line breaks, and replacement characters."""
    odd = {char for char in set(text) if unicodedata.category(char) == "Cc" or char == "\ufffd"}
    return sum(text.count(char) for char in odd - set("\t\n\r")) / max(1, len(text))


def _repeated_line_share(text: str) -> float:
    lines = [line for line in map(str.strip, text.split("\n")) if line]
    return 1 - len(set(lines)) / len(lines) if lines else 0.0


_RULES: dict[str, Callable[[str], float]] = {
    "min_chars": len,
    "max_chars": len,
    "max_line_chars": _longest_line,
    "max_control_share": _control_share,
    "max_repeated_line_share": _repeated_line_share,
    "min_letter_share": _letter_share,
}
"""In order of cost."""

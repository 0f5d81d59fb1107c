"""What a line found of the planted copies and items, and how much of what it dropped was alike, by
exact sets of words.

Axes of a line's answer: `near` names, by a document that went, the one that stays and the
similarity that the line says; `exact` documents that were equal to another; `contaminated` those in
which an item was found; `held_out` those that nothing is cut from.
"""

import random
from collections.abc import Mapping
from typing import Any

from tests.bench.preparation_corpus import SIMILARITIES, Planted, exact_jaccard, texts_of

MOST_JUDGED = 1000
"""So many of the dropped documents are compared exactly, drawn by seed."""
AT_LEAST = 0.8
"""A dropped document is alike from this similarity on."""


def recall_of_pairs(planted: Planted, answer: Mapping[str, Any]) -> dict[str, float]:
    """By similarity, the part of the pairs of which one went."""
    gone = {*answer["near"], *answer.get("exact", ())}
    found: dict[str, float] = {}
    for number, similarity in enumerate(SIMILARITIES):
        pairs = planted.pairs[number :: len(SIMILARITIES)]
        if pairs:
            hits = sum(pair.one in gone or pair.other in gone for pair in pairs)
            found[f"{similarity}"] = hits / len(pairs)
    return found


def precision_of_near(planted: Planted, answer: Mapping[str, Any]) -> dict[str, float]:
    """Of the documents that went as near-duplicates: the part that is alike to who stays, and by
    how much the line's own similarity is off at most, where both texts are ASCII."""
    pairs = [(gone, *told) for gone, told in sorted(answer["near"].items())]
    pairs = random.Random(0).sample(pairs, min(MOST_JUDGED, len(pairs)))
    wanted = {name for gone, kept, _ in pairs for name in (gone, kept)}
    texts = {name: text for name, text in texts_of(planted) if name in wanted}
    alike, judged, off = 0, 0, 0.0
    for gone, kept, told in pairs:
        if kept in texts:
            value = exact_jaccard(texts[gone], texts[kept])
            judged += 1
            alike += value >= AT_LEAST
            if told is not None and (texts[gone] + texts[kept]).isascii():
                off = max(off, abs(value - told))
    return {
        "dropped": len(answer["near"]),
        "judged": judged,
        "precision": alike / judged if judged else 1.0,
        "most_off": off,
    }


def items_found(planted: Planted, answer: Mapping[str, Any]) -> dict[str, float]:
    """Recall and precision of the documents in which an item was found, among those that were not
    dropped before and are trained on."""
    gone = {*answer["near"], *answer.get("exact", ()), *answer.get("held_out", ())}
    hosts = set(planted.items) - gone
    said = set(answer["contaminated"])
    return {
        "hosts": len(hosts),
        "recall": len(said & hosts) / len(hosts) if hosts else 1.0,
        "precision": len(said & set(planted.items)) / len(said) if said else 1.0,
    }

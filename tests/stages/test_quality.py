"""Promises of the quality rules."""

import pytest

from configs.data import QualityConfig
from stages.data.files import Document
from stages.data.quality import judge

GOOD = "A sentence that nobody would throw away, because it says something.\n"
CONFIG = QualityConfig(max_chars=500, max_line_chars=100)


def document(text: str) -> Document:
    return Document("mine", "a.txt#3", text)


def test_a_good_document_is_kept() -> None:
    assert judge(document(GOOD), CONFIG) is None


@pytest.mark.parametrize(
    ("rule", "text", "value", "threshold"),
    [
        ("min_chars", GOOD[:63], 63, 64),
        ("max_chars", "\n".join(GOOD[:50] + str(n) for n in range(11)), 572, 500),
        ("max_line_chars", "a" * 101, 101, 100),
        ("max_control_share", GOOD[:-1] + "\x00" + "a" * 32, 0.01, 0.001),
        ("max_control_share", GOOD[:-1] + "\ufffd" + "a" * 32, 0.01, 0.001),
        ("max_repeated_line_share", (GOOD[:40] + "\n") * 5, 0.8, 0.5),
        ("min_letter_share", "abcdefghij" + "0123456789" * 9, 0.1, 0.2),
    ],
)
def test_each_rule_drops_with_what_it_measured(
    rule: str, text: str, value: float, threshold: float
) -> None:
    drop = judge(document(text), CONFIG)
    assert drop is not None
    assert drop.record() == {
        "source": "mine",
        "document": "a.txt#3",
        "rule": rule,
        "value": pytest.approx(value, abs=1e-6),
        "threshold": threshold,
        "start": text[:80],
        "cut_chars": None,
    }


def test_a_document_at_the_threshold_is_kept() -> None:
    assert judge(document("a" * 64), CONFIG) is None
    assert judge(document("a" * 100), CONFIG) is None
    assert judge(document(f"{GOOD[:40]}\n" * 2), CONFIG) is None


def test_tabs_and_line_breaks_are_no_control_characters() -> None:
    assert judge(document("a line of code\r\n\tindented by a tab\r\n" * 2), CONFIG) is None


def test_the_empty_document_passes_rules_that_ask_for_nothing() -> None:
    permissive = QualityConfig(min_chars=0, min_letter_share=0)
    assert judge(document(""), permissive) is None

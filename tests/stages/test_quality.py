"""Promises of the quality rules."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from configs.data import QualityConfig
from configs.quality_rules import HEURISTICS
from stages.data.quality import Judged, judge, judge_all, normalise, rules

GOOD = "A sentence that nobody would throw away, because it says something.\n"
CONFIG = QualityConfig(max_chars=500, max_line_chars=100)
PLAIN = (
    *("min_chars", "max_chars", "max_line_chars"),
    *("max_control_share", "max_repeated_line_share", "min_letter_share"),
)
TEXTS = st.text("aB é漢1.\t\n\r\x00\x1c\x85\ufffd\ufeff\u2028 ", max_size=60)


def test_a_good_text_is_kept_with_what_was_measured() -> None:
    letters = sum(char.isalpha() for char in GOOD) / len(GOOD)
    measures = dict(zip(PLAIN, (68, 68, 67, 0, 0, letters), strict=True))
    judged = judge(GOOD, CONFIG)
    assert judged == Judged(measures, None, None)
    assert judged.value is None
    assert tuple(judged.measures) == PLAIN == rules(CONFIG)


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
    judged = judge(text, CONFIG)
    assert (judged.rule, judged.threshold) == (rule, threshold)
    assert judged.value == judged.measures[rule] == pytest.approx(value, abs=1e-12)
    assert tuple(judged.measures) == PLAIN[: PLAIN.index(rule) + 1]


def test_a_text_at_the_threshold_is_kept() -> None:
    assert judge("a" * 64, CONFIG).rule is None
    assert judge("a" * 100, CONFIG).rule is None
    assert judge(f"{GOOD[:40]}\n" * 2, CONFIG).rule is None


def test_tabs_and_line_breaks_are_no_control_characters() -> None:
    judged = judge("a line of code\r\n\tindented by a tab\r\n" * 2, CONFIG)
    assert judged.rule is None
    assert judged.measures["max_control_share"] == 0


def test_the_empty_text_passes_rules_that_ask_for_nothing() -> None:
    permissive = QualityConfig(min_chars=0, min_letter_share=0)
    assert judge("", permissive) == Judged(dict.fromkeys(PLAIN, 0.0), None, None)
    assert judge_all([], permissive) == []


def plain_twin(text: str) -> dict[str, float]:
    """What the plain rules measure, character by character."""
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    control = [c for c in text if unicodedata.category(c) == "Cc" or c == "\ufffd"]
    values = (
        len(text),
        len(text),
        max(len(line) for line in text.split("\n")),
        sum(c not in "\t\n\r" for c in control) / max(1, len(text)),
        1 - len(set(lines)) / len(lines) if lines else 0.0,
        sum(c.isalpha() for c in text) / max(1, len(text)),
    )
    return dict(zip(PLAIN, values, strict=True))


@given(st.lists(TEXTS, max_size=5))
def test_the_plain_rules_measure_what_counting_does(texts: list[str]) -> None:
    loose = QualityConfig(
        min_chars=0, max_control_share=1, max_repeated_line_share=1, min_letter_share=0
    )
    assert [one.measures for one in judge_all(texts, loose)] == list(map(plain_twin, texts))


def test_texts_judged_together_are_judged_as_each_alone() -> None:
    config = QualityConfig(heuristics=("gopher-repetition", "c4"), max_chars=90_000)
    texts = [
        *(GOOD * 20, "".join(f"{n} is a number. " for n in range(9_000)), "", "é" * 100),
        *(f"{GOOD} {{", "".join(f"It says {n} of them, and {n * n}.\n" for n in range(3_000))),
    ] * 3
    judged = judge_all(texts, config)
    assert judged == [judge(text, config) for text in texts]
    assert {one.rule for one in judged} >= {"max_chars", "min_chars", "max_repeated_line_share"}


def test_sets_are_judged_by_cost_whatever_their_order_in_the_config() -> None:
    some = QualityConfig(heuristics=("gopher-repetition", "c4", "c4"))
    same = QualityConfig(heuristics=("c4", "gopher-repetition"))
    expected = (*PLAIN, *HEURISTICS["c4"], *HEURISTICS["gopher-repetition"])
    assert rules(some) == rules(same) == expected


def test_a_threshold_of_ones_own_replaces_the_published_one() -> None:
    text = "the reader of that book " + " ".join(f"word{'x' * (n % 5)}" for n in range(40))
    published = QualityConfig(heuristics=("gopher-quality",))
    assert judge(text, published).rule == "gopher_min_words"
    for least, rule in ((45, None), (46, "gopher_min_words")):
        own = QualityConfig(heuristics=("gopher-quality",), thresholds={"gopher_min_words": least})
        assert judge(text, own).rule == rule
        assert rules(own) == rules(published)


def test_the_threshold_of_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValidationError, match=r"gopher_min_word'; did you mean 'gopher_min_words"):
        QualityConfig(heuristics=("gopher-quality",), thresholds={"gopher_min_word": 1})
    with pytest.raises(ValidationError, match="no set of `heuristics` has a rule 'min_chars'"):
        QualityConfig(thresholds={"min_chars": 1})


def test_the_threshold_of_a_set_that_is_left_out_means_nothing() -> None:
    assert QualityConfig(thresholds={"gopher_min_words": 1}) == QualityConfig()


@pytest.mark.parametrize(
    ("text", "lines", "nfc"),
    [
        ("a\r\nb\rc\n\r\n", "a\nb\nc\n\n", "a\nb\nc\n\n"),
        ("\ufeffa\r\ufeff\nb", "a\nb", "a\nb"),
        ("e\u0301\r\n", "e\u0301\n", "é\n"),
        ("e\ufeff\u0301", "e\u0301", "é"),
        ("\u2028\x85\tplain", "\u2028\x85\tplain", "\u2028\x85\tplain"),
    ],
)
def test_texts_are_made_alike_as_the_config_says(text: str, lines: str, nfc: str) -> None:
    assert normalise(text, QualityConfig(normalise="none")) == text
    assert normalise(text, QualityConfig(normalise="lines")) == lines
    assert normalise(text, QualityConfig(normalise="nfc")) == nfc


@given(st.text("a\r\n\ufeffe\u0301\u0323é"))
def test_what_was_made_alike_stays_as_it_is(text: str) -> None:
    for config in (QualityConfig(), QualityConfig(normalise="nfc")):
        once = normalise(text, config)
        assert normalise(once, config) == once
        assert not set("\r\ufeff") & set(once)

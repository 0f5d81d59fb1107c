"""Promises of the published rules for prose: each beside a slow twin, and at its threshold."""

import itertools
import re
from collections import Counter
from random import Random
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.data import Heuristics, QualityConfig
from configs.quality_rules import HEURISTICS
from stages.data.heuristics import MEASURES
from stages.data.quality import judge, judge_all
from stages.data.texts import Texts

SETS = get_args(Heuristics)
RULES = [rule for rules in HEURISTICS.values() for rule in rules]
ALL = QualityConfig(heuristics=SETS)
NOTHING_FAILS = QualityConfig(
    min_chars=0,
    max_control_share=1,
    max_repeated_line_share=1,
    min_letter_share=0,
    max_line_chars=1_000_000,
    heuristics=SETS,
    thresholds={rule: -1 if "_min_" in rule else 1e9 for rule in RULES},
)
PROSE = """The harbour wakes before the town does. Men in blue coats walk along the quay with lamps,
and gulls follow every boat that comes home with something worth stealing.

By eight o'clock the market has opened. You can buy herring, rope, oranges and old clocks there;
"nobody ever asks where a clock has been," says the woman who sells them.

Her father had mended watches on the same corner for forty years. He used to say that time is
patient but springs are not, and children would laugh at him without knowing why.

In winter ice closes the northern channel. Ships wait outside until a pilot is free to guide
them past the shallows, which may take hours or several days of bad weather.
"""
STOP_WORDS = ("the", "be", "to", "of", "and", "that", "have", "with")
NOTICES = (
    *("javascript", "terms of use", "privacy policy", "cookie policy"),
    *("uses cookies", "use of cookies", "use cookies"),
)


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.split("\n") if line.strip()]


def paragraphs_of(text: str) -> list[tuple[str, ...]]:
    groups = itertools.groupby((line.strip() for line in text.split("\n")), key=bool)
    return [tuple(group) for filled, group in groups if filled]


def top_twin(words: list[str], n: int) -> float:
    """Every sequence counted; of the most frequent those of the most characters."""
    grams = Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    times = max(grams.values(), default=1)
    if times == 1:
        return 0.0
    chars = max(len("".join(gram)) for gram, count in grams.items() if count == times)
    return min(1.0, times * chars / len("".join(words)))


def duplicate_twin(words: list[str], n: int) -> float:
    """Every sequence looked for among the earlier ones, and its words marked."""
    seen, marked = set(), set[int]()
    for start in range(len(words) - n + 1):
        gram = tuple(words[start : start + n])
        if gram in seen:
            marked |= set(range(start, start + n))
        seen.add(gram)
    return ratio(sum(len(words[i]) for i in marked), len("".join(words)))


def repeated_twin(parts: list[tuple[str, ...]]) -> tuple[float, float]:
    """The parts that an earlier one equals, as a share of all, and of their characters."""
    repeats = [part for i, part in enumerate(parts) if part in parts[:i]]
    chars = ["".join(itertools.chain(*some)) for some in (repeats, parts)]
    return ratio(len(repeats), len(parts)), ratio(*map(len, chars))


def twin(text: str) -> dict[str, float]:
    """What every rule measures, in plain Python."""
    words, lines, paragraphs = text.split(), lines_of(text), paragraphs_of(text)
    duplicate_lines, duplicate_line_chars = repeated_twin([(line,) for line in lines])
    duplicate_paragraphs, duplicate_paragraph_chars = repeated_twin(paragraphs)

    def part(holds: list[bool]) -> float:
        return ratio(sum(holds), len(lines))

    mean = ratio(len("".join(words)), len(words))
    breaks = text.count("\n")
    return {
        "gopher_min_words": len(words),
        "gopher_max_words": len(words),
        "gopher_min_mean_word_chars": mean,
        "gopher_max_mean_word_chars": mean,
        "gopher_max_hashes_per_word": ratio(text.count("#"), len(words)),
        "gopher_max_ellipses_per_word": ratio(text.count("...") + text.count("…"), len(words)),
        "gopher_max_bullet_lines": part(
            [line[0] in "•‣◦▪●" or line.split()[0] in ("-", "*", "–") for line in lines]
        ),
        "gopher_max_ellipsis_lines": part([line.endswith(("...", "…")) for line in lines]),
        "gopher_min_letter_words": ratio(
            sum(any(map(str.isalpha, word)) for word in words), len(words)
        ),
        "gopher_min_stop_words": sum(
            any(form in words for form in (word, word.upper(), word.capitalize()))
            for word in STOP_WORDS
        ),
        "c4_max_curly_brackets": len(re.findall("[{}]", text)),
        "c4_max_lorem_ipsum": len(re.findall("lorem ipsum", text, re.IGNORECASE | re.ASCII)),
        "c4_max_word_chars": max(map(len, words), default=0),
        "c4_min_sentences": sum(bool(re.search(r"""[.!?]["'”’)\]»]?$""", word)) for word in words),
        "c4_max_notice_lines": part(
            [bool(re.search("|".join(NOTICES), line, re.IGNORECASE | re.ASCII)) for line in lines]
        ),
        "fineweb_min_terminal_lines": part([line[-1] in ".!?…\"'”’。！？" for line in lines]),
        "fineweb_max_short_lines": part([len(line) <= 30 for line in lines]),
        "fineweb_max_duplicate_line_chars": duplicate_line_chars,
        "fineweb_max_line_breaks_per_word": ratio(breaks, len(words)),
        "gopher_max_duplicate_lines": duplicate_lines,
        "gopher_max_duplicate_paragraphs": duplicate_paragraphs,
        "gopher_max_duplicate_line_chars": duplicate_line_chars,
        "gopher_max_duplicate_paragraph_chars": duplicate_paragraph_chars,
        **{f"gopher_max_top_{n}gram_chars": top_twin(words, n) for n in (2, 3, 4)},
        **{f"gopher_max_duplicate_{n}gram_chars": duplicate_twin(words, n) for n in range(5, 11)},
    }


PIECES = (
    *(
        "the",
        "The",
        "that",
        "a",
        "bc",
        "word",
        "1",
        "é",
        "漢字",
        "x" * 40,
        "be",
        "have",
        "wi",
        "th",
    ),
    *(
        ".",
        "...",
        "…",
        "!",
        '."',
        "?)",
        "#",
        "{",
        "}",
        "-",
        "*",
        "•",
        "•a",
        "-b",
        "..",
        "Lorem Ipsum",
    ),
    *(
        " ",
        " ",
        " ",
        "\t",
        "\u2003",
        "\x1c",
        "\n",
        "\n",
        "\n\n",
        "\n \n",
        "\r",
        "use cookies",
        "JavaScript",
    ),
)
MIXED = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)
REPETITIVE = st.lists(st.sampled_from(["a", "b", "ccc", "a b a b c", "b a"]), max_size=80).map(
    " ".join
)
SECTIONS = st.lists(st.sampled_from(["one", "two", "one\ntwo", " one \ntwo", ""]), max_size=12).map(
    "\n\n".join
)


@settings(max_examples=200, deadline=None)
@given(st.lists(MIXED | REPETITIVE | SECTIONS, min_size=1, max_size=4))
def test_every_rule_measures_what_its_twin_does(texts: list[str]) -> None:
    for text, judged in zip(texts, judge_all(texts, NOTHING_FAILS), strict=True):
        found = {rule: judged.measures[rule] for rule in RULES}
        assert found == pytest.approx(twin(text), abs=1e-12, rel=0)
        assert list(judged.measures)[-len(RULES) :] == RULES


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 400), st.integers(1, 12), st.randoms(use_true_random=False))
def test_repetition_in_longer_texts_is_what_counting_finds(
    num_words: int, num_distinct: int, random: Random
) -> None:
    words = [f"w{random.randrange(num_distinct) ** 2}" for _ in range(num_words)]
    words += words[num_words // 3 : num_words // 2]
    found = judge(" ".join(words), NOTHING_FAILS).measures
    for n in (2, 3, 4):
        assert found[f"gopher_max_top_{n}gram_chars"] == pytest.approx(
            top_twin(words, n), abs=1e-12
        )
    for n in range(5, 11):
        name = f"gopher_max_duplicate_{n}gram_chars"
        assert found[name] == pytest.approx(duplicate_twin(words, n), abs=1e-12)


def test_good_prose_passes_everything() -> None:
    judged = judge(PROSE, ALL)
    assert judged.rule is None
    assert list(judged.measures)[6:] == RULES


def test_every_set_of_the_config_has_rules_that_measure() -> None:
    assert set(SETS) == set(HEURISTICS)
    assert list(MEASURES) == RULES
    assert len(set(RULES)) == len(RULES)


def numbered(count: int, *, of: int = 100) -> str:
    """Distinct words, `of` of them, of which the last have no letter."""
    return " ".join([*(f"w{n}" for n in range(of - count)), *map(str, range(count))])


def lines(good: str, bad: str, num_bad: int, num: int = 10) -> str:
    """Distinct lines, of which some are bad: `#` in either is the number of the line."""
    made = [bad] * num_bad + [good] * (num - num_bad)
    return "\n".join(line.replace("#", f"{n:03}") for n, line in enumerate(made))


def repeats(num: int, of: int, unit: str = "line") -> list[str]:
    """Ten characters each, of which so many repeat the first."""
    return [f"{unit:6}0000"] * (num + 1) + [f"{unit:6}{n:04}" for n in range(1, of - num)]


def phrase(n: int, times: int, others: int) -> str:
    """A phrase of n words of two letters, so often among others that stand once."""
    said = " ".join(f"p{chr(97 + i)}" for i in range(n))
    rest = [f"{chr(97 + i // 26)}{chr(65 + i % 26)}" for i in range(others)]
    cut = [" ".join(rest[i::times]) for i in range(times)]
    return " ".join(f"{said} {some}" for some in cut)


BOTH_SIDES = {
    "gopher_min_words": (numbered(0, of=50), numbered(0, of=49)),
    "gopher_max_words": ("a " * 100_000, "a " * 100_001),
    "gopher_min_mean_word_chars": ("abc abc", "abc ab"),
    "gopher_max_mean_word_chars": ("a" * 10, "a" * 11),
    "gopher_max_hashes_per_word": (numbered(0, of=9) + " #", numbered(0, of=9) + " ##"),
    "gopher_max_ellipses_per_word": (numbered(0, of=9) + " ...", numbered(0, of=9) + "... …"),
    "gopher_max_bullet_lines": (lines("line #", "- #", 9), lines("line #", "• #", 10)),
    "gopher_max_ellipsis_lines": (lines("line #", "# ...", 3), lines("line #", "#…", 4)),
    "gopher_min_letter_words": (numbered(20), numbered(21)),
    "gopher_min_stop_words": ("The cat AND a dog", "and and, that's beside"),
    "c4_max_curly_brackets": ("()", "(}"),
    "c4_max_lorem_ipsum": ("lorem  ipsum", "Lorem Ipsum"),
    "c4_max_word_chars": ("é" * 1000, "é" * 1001),
    "c4_min_sentences": ('A. B! "C?" (D.) E.', "A. B! C? D. E.F, G."[:-1]),
    "c4_max_notice_lines": (lines("line #", "# JavaScript", 1), lines("#", "use cookies #", 2)),
    "fineweb_min_terminal_lines": (lines("#", "#.", 12, 100), lines("#", '#."', 11, 100)),
    "fineweb_max_short_lines": (
        lines("#" + "x" * 28, "#" + "x" * 27, 67, 100),
        lines("#" + "x" * 28, "#" + "x" * 27, 68, 100),
    ),
    "fineweb_max_duplicate_line_chars": ("\n".join(repeats(1, 10)), "\n".join(repeats(2, 19))),
    "fineweb_max_line_breaks_per_word": ("a\nb\nc\nd e f g h i j", "a\nb\nc\nd\ne f g h i j"),
    "gopher_max_duplicate_lines": ("\n".join(repeats(3, 10)), "\n".join(repeats(4, 13))),
    "gopher_max_duplicate_paragraphs": ("\n\n".join(repeats(3, 10)), "\n\n".join(repeats(4, 13))),
    "gopher_max_duplicate_line_chars": ("\n".join(repeats(2, 10)), "\n".join(repeats(3, 14))),
    "gopher_max_duplicate_paragraph_chars": (
        "\n\n".join(repeats(2, 10)),
        "\n\n".join(repeats(3, 14)),
    ),
    "gopher_max_top_2gram_chars": (phrase(2, 5, 40), phrase(2, 5, 39)),
    "gopher_max_top_3gram_chars": (phrase(3, 6, 82), phrase(3, 6, 81)),
    "gopher_max_top_4gram_chars": (phrase(4, 4, 84), phrase(4, 4, 83)),
    "gopher_max_duplicate_5gram_chars": (phrase(5, 4, 80), phrase(5, 4, 79)),
    "gopher_max_duplicate_6gram_chars": (phrase(6, 8, 252), phrase(6, 8, 251)),
    "gopher_max_duplicate_7gram_chars": (phrase(7, 14, 602), phrase(7, 14, 601)),
    "gopher_max_duplicate_8gram_chars": (phrase(8, 4, 168), phrase(8, 4, 167)),
    "gopher_max_duplicate_9gram_chars": (phrase(9, 12, 792), phrase(9, 12, 791)),
    "gopher_max_duplicate_10gram_chars": (phrase(10, 2, 80), phrase(10, 2, 79)),
}


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_keeps_what_is_at_its_threshold_and_drops_what_is_beyond(rule: str) -> None:
    name = next(name for name, rules in HEURISTICS.items() if rule in rules)
    thresholds = NOTHING_FAILS.thresholds | {rule: HEURISTICS[name][rule]}
    config = NOTHING_FAILS.model_copy(update={"thresholds": thresholds})
    kept, dropped = (judge(text, config) for text in BOTH_SIDES[rule])
    assert kept.rule is None
    assert kept.measures[rule] == pytest.approx(HEURISTICS[name][rule], abs=1e-12)
    assert (dropped.rule, dropped.threshold) == (rule, HEURISTICS[name][rule])
    assert list(dropped.measures)[-1] == rule


def test_a_sequence_that_stands_in_another_text_is_no_repetition() -> None:
    texts = [PROSE, PROSE, PROSE.split("\n\n")[0]]
    judged = judge_all(texts, NOTHING_FAILS)
    assert judged[0] == judged[1] == judge(PROSE, NOTHING_FAILS)
    assert judged[2].measures["gopher_max_duplicate_lines"] == 0
    assert judged[2].measures["gopher_max_duplicate_5gram_chars"] == 0


def test_hashes_of_equal_words_are_equal_wherever_they_stand_and_in_whatever_company() -> None:
    ascii_words = Texts(["one two", "two  one\n"]).words_W.tolist()
    assert ascii_words == [*ascii_words[:2], *ascii_words[1::-1]]
    assert Texts(["漢字 one two"]).words_W.tolist()[1:] == ascii_words[:2]

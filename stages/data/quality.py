"""Rules that a text must pass, and what was measured of each one."""

import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from configs.data import QualityConfig
from configs.quality_rules import HEURISTICS
from stages.data.heuristics import MEASURES, Measure
from stages.data.repetition import Float64, Int64, largest, sums
from stages.data.texts import CONTROL, LETTER, Texts

_BLOCK_CHARS = 1 << 18
"""So much text is judged at a time, as what is known of it then stays near the processor."""
_MOST_KEPT = 0.75
"""Where no more of the texts pass, they are analysed anew for dearer rules, without the others."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What the rules found; of a text that fails one, no later rule is told."""

    measures: dict[str, float] = field(default_factory=dict)
    """Every number measured, by rule, in the order of the rules; the last failed, if one did."""
    rule: str | None = None
    """The first rule that the text fails, or none."""
    threshold: float | None = None
    """What that rule asks for."""

    @property
    def value(self) -> float | None:
        """What the failed rule measured."""
        return None if self.rule is None else self.measures[self.rule]


def normalise(text: str, config: QualityConfig) -> str:
    """The text as it is judged and kept; what is normal already stays as it is."""
    if config.normalise == "none":
        return text
    # A mark may stand inside a line end, which is one only without it.
    lines = text.replace("\ufeff", "").replace("\r\n", "\n").replace("\r", "\n")
    return lines if config.normalise == "lines" else unicodedata.normalize("NFC", lines)


def rules(config: QualityConfig) -> tuple[str, ...]:
    """The names of all rules, in the order in which a text must pass them."""
    return tuple(_thresholds(config))


def judge(text: str, config: QualityConfig) -> Judged:
    """What the rules find of one text; several are judged faster by `judge_all`."""
    return judge_all([text], config)[0]


def judge_all(texts: Sequence[str], config: QualityConfig) -> list[Judged]:
    """What the rules find of each text. It takes some 50 bytes of memory for each character of
    the longest one.
    """
    thresholds = _thresholds(config)
    return [one for block in _blocks(texts) for one in _judge_block(block, thresholds)]


def _blocks(texts: Sequence[str]) -> Iterator[list[str]]:
    block, chars = list[str](), 0
    for text in texts:
        if block and chars + len(text) > _BLOCK_CHARS:
            yield block
            block, chars = [], 0
        block.append(text)
        chars += len(text)
    if block:
        yield block


def _judge_block(texts: Sequence[str], thresholds: Mapping[str, float]) -> list[Judged]:
    """What the rules find of texts that are analysed together."""
    judged = [Judged() for _ in texts]
    passing = held = list(range(len(texts)))
    analysed = Texts(texts)
    for group in _GROUPS:
        asked = {rule: thresholds[rule] for rule in group if rule in thresholds}
        if not asked or not passing:
            continue
        if len(passing) <= _MOST_KEPT * len(held):
            held, analysed = passing, Texts([texts[index] for index in passing])
        found = dict(zip(held, _judge_group(analysed, asked), strict=True))
        for index in passing:
            one = found[index]
            judged[index] = Judged(judged[index].measures | one.measures, one.rule, one.threshold)
        passing = [index for index in passing if judged[index].rule is None]
    return judged


def _judge_group(texts: Texts, thresholds: Mapping[str, float]) -> list[Judged]:
    """What these rules find, each of them measured of all texts."""
    rules = tuple(thresholds)
    measured = np.array([_MEASURES[rule](texts) for rule in rules], np.float64)
    least = np.array([[rule in _LEAST] for rule in rules])
    limits = np.array([[threshold] for threshold in thresholds.values()])
    failed = np.where(least, measured < limits, measured > limits)
    fails = np.where(failed.any(axis=0), failed.argmax(axis=0), len(rules)).tolist()
    return [
        Judged(
            dict(zip(rules[: fail + 1], values, strict=False)),
            *((rules[fail], thresholds[rules[fail]]) if fail < len(rules) else ()),
        )
        for fail, values in zip(fails, measured.T.tolist(), strict=True)
    ]


def _thresholds(config: QualityConfig) -> dict[str, float]:
    """Those of all rules: the plain ones, then those of the sets that the config names."""
    thresholds: dict[str, float] = {rule: getattr(config, rule) for rule in _PLAIN}
    for name, rules in HEURISTICS.items():
        if name in config.heuristics:
            thresholds |= rules
    return thresholds | config.thresholds


def _control_share(texts: Texts) -> Float64:
    return texts.count(CONTROL) / np.maximum(1, texts.chars_D)


def _repeated_line_share(texts: Texts) -> Float64:
    repeated = sums(texts.again_L)[texts.edges_L]
    distinct_D = texts.num_lines_D - (repeated[1:] - repeated[:-1])
    return np.where(texts.num_lines_D > 0, 1 - distinct_D / np.maximum(1, texts.num_lines_D), 0.0)


def _letter_share(texts: Texts) -> Float64:
    return texts.count(LETTER) / np.maximum(1, texts.chars_D)


def _longest_line(texts: Texts) -> Int64:
    """Of lines as they are, with white space at their ends."""
    before = np.append(-1, texts.breaks[:-1])
    return largest(texts.breaks - before - 1, texts.breaks.searchsorted(texts.edges_C))


_PLAIN: dict[str, Measure] = {
    "min_chars": lambda texts: texts.chars_D,
    "max_chars": lambda texts: texts.chars_D,
    "max_line_chars": _longest_line,
    "max_control_share": _control_share,
    "max_repeated_line_share": _repeated_line_share,
    "min_letter_share": _letter_share,
}
"""Named after the fields that hold their thresholds, in order of cost."""
_MEASURES = _PLAIN | MEASURES
_LEAST = frozenset(rule for rule in _MEASURES if rule.startswith("min_") or "_min_" in rule)
"""Rules that ask for no less than their threshold; the others ask for no more."""
_GROUPS = (
    ("min_chars", "max_chars"),
    tuple(_PLAIN)[2:],
    tuple(rule for name in ("gopher-quality", "c4", "fineweb") for rule in HEURISTICS[name]),
    tuple(HEURISTICS["gopher-repetition"]),
)
"""Rules that are measured together, in the order of all rules."""

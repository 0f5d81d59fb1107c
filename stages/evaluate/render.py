"""What was found, as key figures, as JSON for machines and as Markdown for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stages.evaluate.estimators import Estimate
from stages.evaluate.problems import Answered
from stages.evaluate.text import TextScore, total

_SHOWN_PROBLEMS = 8
_SHOWN_CHARS = 48
_HARMLESS = frozenset(" +-=.,:;()/")

Side = Literal["before", "after"]


@dataclass(frozen=True, slots=True)
class Baseline:
    """The n-gram's score of one source, and the weight of the bigram that attains it."""

    score: TextScore
    bigram_weight: float


@dataclass(frozen=True, slots=True)
class Findings:
    """All that was measured of one model."""

    text: Mapping[str, TextScore]
    """By source."""
    answered: Sequence[Answered]
    """The same problems in the same order for every model."""
    pass_at: Mapping[int, Estimate]
    """By k; empty if the corpus holds no problems."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What both models and the baseline made of the same text and problems."""

    baseline: Mapping[str, Baseline]
    """By source."""
    before: Findings
    after: Findings

    @property
    def sides(self) -> dict[Side, Findings]:
        """The two models, by the name their figures bear."""
        return {"before": self.before, "after": self.after}

    @property
    def pairs(self) -> list[tuple[Answered, Answered]]:
        """Each problem as answered before and after."""
        return list(zip(self.before.answered, self.after.answered, strict=True))


def headline(comparison: Comparison) -> dict[str, float]:
    """Key figures by flat metric name; bits per byte are over all sources together."""
    ngram = total([entry.score for entry in comparison.baseline.values()])
    figures = {"ngram_bits_per_byte": ngram.bits_per_byte}
    for side, found in comparison.sides.items():
        figures[f"{side}_bits_per_byte"] = total(found.text.values()).bits_per_byte
        for k, rate in found.pass_at.items():
            figures[f"{side}_pass_at_{k}"] = rate.mean
            figures[f"{side}_pass_at_{k}_low"] = rate.low
            figures[f"{side}_pass_at_{k}_high"] = rate.high
    for k, rate in comparison.after.pass_at.items():
        figures[f"pass_at_{k}_gain"] = rate.mean - comparison.before.pass_at[k].mean
    return figures


def render_json(comparison: Comparison) -> str:
    """Every number, and every problem with all answers of both models."""
    record: dict[str, Any] = {
        "headline": headline(comparison),
        "ngram": {
            source: {**_text_record(entry.score), "bigram_weight": entry.bigram_weight}
            for source, entry in comparison.baseline.items()
        },
    }
    for side, found in comparison.sides.items():
        record[side] = {
            "text": {source: _text_record(score) for source, score in found.text.items()},
            "pass_at": {str(k): asdict(rate) for k, rate in found.pass_at.items()},
        }
    record["problems"] = [
        {
            "id": before.problem.id,
            "prompt": before.problem.prompt,
            "answer": before.problem.answer,
            "before": {"answers": before.answers, "correct": sum(before.correct)},
            "after": {"answers": after.answers, "correct": sum(after.correct)},
        }
        for before, after in comparison.pairs
    ]
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def render_markdown(comparison: Comparison) -> str:
    """One table of measurements, and a few problems with both models' first answers."""
    before, after = comparison.before, comparison.after
    columns = [before.text, after.text]
    columns += [{source: entry.score for source, entry in comparison.baseline.items()}]
    whole = [f"{total(column.values()).bits_per_byte:.4f}" for column in columns]
    lines = [
        "# Evaluation",
        "",
        _row("", "pretrained", "post-trained", "bigram + unigram"),
        "|---|---:|---:|---:|",
        _row("bits per byte, all held-out text", *whole),
    ]
    for source in before.text:
        each = [f"{column[source].bits_per_byte:.4f}" for column in columns]
        lines.append(_row(f"bits per byte, {_plain(source)}", *each))
    for k in before.pass_at:
        rates = _percent(before.pass_at[k]), _percent(after.pass_at[k])
        lines.append(_row(f"pass@{k}", *rates, ""))
    lines += [
        "",
        "Bits per byte: fewer are better. The bigram is counted on exactly the tokens that the "
        "model consumed, and its weight chosen in its favour on the held-out text. Documents are "
        "scored one by one: no model sees the one before.",
        "",
        *_problem_lines(comparison.pairs),
        "",
    ]
    return "\n".join(lines)


def _problem_lines(pairs: Sequence[tuple[Answered, Answered]]) -> list[str]:
    if not pairs:
        return ["The corpus holds out no problems, so pass@k is not measured."]
    samples = len(pairs[0][0].answers)
    lines = [
        f"pass@k: {len(pairs)} held-out problems, {samples} answers each; 95 % intervals over "
        "problems in brackets.",
        "",
        "## Some problems, with each model's first answer",
        "",
        _row("problem", "right answer", "pretrained", "right", "post-trained", "right"),
        "|---|---|---|---:|---|---:|",
    ]
    for before, after in pairs[:_SHOWN_PROBLEMS]:
        row = [_code(before.problem.prompt), _code(before.problem.answer)]
        for side in (before, after):
            row += [_code(side.answers[0]), f"{sum(side.correct)} of {samples}"]
        lines.append(_row(*row))
    return lines


def _text_record(score: TextScore) -> dict[str, float]:
    return {**asdict(score), "bits_per_byte": score.bits_per_byte}


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(rate: Estimate) -> str:
    return f"{rate.mean:.1%} [{rate.low:.1%}, {rate.high:.1%}]"


def _plain(text: str) -> str:
    """Text that means nothing to Markdown or a browser and stays on one line."""
    return "".join(map(_harmless, text))


def _harmless(char: str) -> str:
    if char.isalnum() or char in _HARMLESS:
        return char
    if not char.isprintable():
        return "⏎" if char == "\n" else "�"
    return f"&#{ord(char)};"


def _code(text: str) -> str:
    """Text shown letter by letter in a table cell; a model's answer may hold anything."""
    short = text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "…"
    return f"<code>{_plain(short)}</code>"

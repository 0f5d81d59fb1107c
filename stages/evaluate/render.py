"""What was found, as key figures, as JSON for machines and as Markdown for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from stages.answers import Answered, all_right_values, pass_values
from stages.estimators import Estimate, mean_over_problems, paired_gain
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
    """The same problems in the same order for every model; none if the corpus holds none."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """What both models and the baseline made of the same text and problems."""

    baseline: Mapping[str, Baseline]
    """By source; empty where it cannot be had."""
    no_baseline: str | None
    """Why it cannot."""
    before: Findings
    after: Findings
    pass_at: tuple[int, ...]
    overlap: Mapping[str, Any]
    """What training text and held-out data had in common, as the corpus records it."""

    @property
    def sides(self) -> dict[Side, Findings]:
        """The two models, by the name their figures bear."""
        return {"before": self.before, "after": self.after}

    @property
    def pairs(self) -> list[tuple[Answered, Answered]]:
        """Each problem as answered before and after."""
        return list(zip(self.before.answered, self.after.answered, strict=True))

    def measures(self) -> dict[str, dict[Side, list[float]]]:
        """Values in [0, 1], one a problem, by measure and model; none without problems."""
        if not self.before.answered:
            return {}
        samples = len(self.before.answered[0].answers)
        found: dict[str, dict[Side, list[float]]] = {"greedy_accuracy": {}}
        found |= {f"pass_at_{k}": {} for k in self.pass_at} | {f"all_of_{samples}": {}}
        for side, one in self.sides.items():
            found["greedy_accuracy"][side] = [float(a.greedy_correct) for a in one.answered]
            for k in self.pass_at:
                found[f"pass_at_{k}"][side] = pass_values(one.answered, k)
            found[f"all_of_{samples}"][side] = all_right_values(one.answered)
        return found


def headline(comparison: Comparison) -> dict[str, float]:
    """Key figures by flat metric name; bits per byte are over all sources together."""
    figures = {}
    if comparison.baseline:
        ngram = total([entry.score for entry in comparison.baseline.values()])
        figures["ngram_bits_per_byte"] = ngram.bits_per_byte
    for side, found in comparison.sides.items():
        figures[f"{side}_bits_per_byte"] = total(found.text.values()).bits_per_byte
    for measure, values in comparison.measures().items():
        for side, some in values.items():
            figures |= _named(f"{side}_{measure}", mean_over_problems(some))
        figures |= _named(f"{measure}_gain", paired_gain(values["before"], values["after"]))
    return figures


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def render_json(comparison: Comparison) -> str:
    """Every number, and every problem with all answers of both models."""
    measures = comparison.measures()
    record: dict[str, Any] = {
        "headline": headline(comparison),
        "ngram": {
            source: {**_text_record(entry.score), "bigram_weight": entry.bigram_weight}
            for source, entry in comparison.baseline.items()
        },
        "no_ngram": comparison.no_baseline,
        "held_out_in_training": comparison.overlap,
        "gains": {
            measure: asdict(paired_gain(values["before"], values["after"]))
            for measure, values in measures.items()
        },
    }
    for side, found in comparison.sides.items():
        record[side] = {
            "text": {source: _text_record(score) for source, score in found.text.items()},
            "problems": {
                measure: asdict(mean_over_problems(values[side]))
                for measure, values in measures.items()
            },
        }
    record["problems"] = [
        {
            "id": before.problem.id,
            "prompt": before.problem.prompt,
            "answer": before.problem.answer,
            "before": _answers_record(before),
            "after": _answers_record(after),
        }
        for before, after in comparison.pairs
    ]
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def _answers_record(answered: Answered) -> dict[str, Any]:
    return {
        "greedy": answered.greedy,
        "greedy_correct": answered.greedy_correct,
        "answers": answered.answers,
        "correct": sum(answered.correct),
    }


def render_markdown(comparison: Comparison) -> str:
    """One table of measurements, what they cover, and a few problems with both models' answers."""
    lines = ["# Evaluation", "", *_table(comparison), "", *_text_lines(comparison), ""]
    lines += [*_problem_lines(comparison), ""]
    return "\n".join(lines)


def _table(comparison: Comparison) -> list[str]:
    """Bits per byte and what the problems gave, both models side by side."""
    before, after = comparison.before, comparison.after
    columns = [before.text, after.text]
    heads = ["", "pretrained", "post-trained", "gain"]
    if comparison.baseline:
        columns.append({source: entry.score for source, entry in comparison.baseline.items()})
        heads.append("bigram + unigram")

    def row(name: str, cells: list[str]) -> str:
        # Text has no gain, problems no baseline.
        return _row(name, *cells[:2], "", *cells[2:])

    whole = [f"{total(column.values()).bits_per_byte:.4f}" for column in columns]
    lines = [_row(*heads), "|---" + "|---:" * (len(heads) - 1) + "|"]
    lines.append(row("bits per byte, all held-out text", whole))
    for source in before.text:
        each = [f"{column[source].bits_per_byte:.4f}" for column in columns]
        lines.append(row(f"bits per byte, {_plain(source)}", each))
    for measure, values in comparison.measures().items():
        rates = [_percent(mean_over_problems(some)) for some in values.values()]
        gain = _points(paired_gain(values["before"], values["after"]))
        lines.append(_row(_label(measure), *rates, gain, *[""] * (len(heads) - 4)))
    return lines


def _label(measure: str) -> str:
    """What a table calls a measure."""
    if measure.startswith("pass_at_"):
        return f"pass@{measure.removeprefix('pass_at_')}"
    if measure.startswith("all_of_"):
        return f"all {measure.removeprefix('all_of_')} samples right"
    return "right greedily"


def _text_lines(comparison: Comparison) -> list[str]:
    """What bits per byte are measured against, and how clean the held-out data is."""
    baseline = (
        "The bigram is counted on exactly the tokens that the model consumed, and its weight "
        "chosen in its favour on the held-out text. "
        if comparison.baseline
        else f"There is no n-gram baseline: {comparison.no_baseline}. "
    )
    found = comparison.overlap
    clean = (
        f"Of the held-out text {found['text_share_in_training_before']:.2%} stood in documents to "
        f"train on too ({found['compared']}), and {found['text_share_in_training_after']:.2%} "
        f"after it was cut there. Of {found['problems']:,} held-out problems "
        f"{found['problems_in_training_before']:,} stood there with an answer, and "
        f"{found['problems_in_training_after']:,} after that. In all "
        f"{found['cut_share_of_training_text']:.2%} of the text to train on was cut."
    )
    if comparison.no_baseline:
        clean += " What an imported model was trained on before is not known here."
    return [
        f"Bits per byte: fewer are better. {baseline}Documents are scored one by one: no model "
        "sees the one before.",
        "",
        clean,
    ]


def _problem_lines(comparison: Comparison) -> list[str]:
    pairs = comparison.pairs
    if not pairs:
        return ["The corpus holds out no problems, so no answers are measured."]
    samples = len(pairs[0][0].answers)
    lines = [
        f"Problems: {len(pairs)} held-out ones, each answered greedily once (the likeliest token "
        f"every time) and {samples} times by sampling. pass@k is the chance that one of k samples "
        "is right.",
        "",
        "In brackets: 95 % intervals. They cover the choice of problems, and with it the chance in "
        "sampling their answers: another draw of as many problems would give such figures. Gains "
        "are paired, problem by problem. They do not cover training: another training seed, or "
        "another machine, gives another model, whose figures may well lie outside; to see that, "
        "train several times.",
        "",
        "## Some problems, with each model's greedy answer",
        "",
        _row("problem", "right answer", "pretrained", "sampled", "post-trained", "sampled"),
        "|---|---|---|---:|---|---:|",
    ]
    for before, after in pairs[:_SHOWN_PROBLEMS]:
        row = [_code(before.problem.prompt), _code(before.problem.answer)]
        for side in (before, after):
            row += [_code(side.greedy), f"{sum(side.correct)} of {samples} right"]
        lines.append(_row(*row))
    return lines


def _text_record(score: TextScore) -> dict[str, float]:
    return {**asdict(score), "bits_per_byte": score.bits_per_byte}


def _row(*cells: str) -> str:
    return "| " + " | ".join(cells) + " |"


def _percent(rate: Estimate) -> str:
    return f"{rate.mean:.1%} [{rate.low:.1%}, {rate.high:.1%}]"


def _points(gain: Estimate) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] points"


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

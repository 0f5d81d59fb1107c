"""What was found, as key figures, as JSON for machines and as Markdown for people."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from stages.answers import Answered, all_right_values, pass_values
from stages.estimators import Estimate, mean_over_problems, paired_gain
from stages.evaluate.text import TextScore, total
from stages.markdown import code_cell, plain, row
from stages.plots import Bar, Bars, Plot
from stages.samples import Sample
from stages.verifiers import verify

_SHOWN_PROBLEMS = 8
_SAMPLED_PROBLEMS = 25


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
    """What each model and the baseline made of the same text and problems."""

    models: Mapping[str, Findings]
    """By the name that a model's figures bear; all others are compared with the first."""
    baseline: Mapping[str, Baseline]
    """By source; empty where it cannot be had."""
    no_baseline: str | None
    """Why it cannot."""
    pass_at: tuple[int, ...]
    overlap: Mapping[str, Any]
    """What training text and held-out data had in common, as the corpus records it."""

    @property
    def first(self) -> str:
        """The model that all others are compared with."""
        return next(iter(self.models))

    @property
    def others(self) -> list[str]:
        """The models that are compared with the first."""
        return list(self.models)[1:]

    @property
    def problems(self) -> list[dict[str, Answered]]:
        """Each problem as every model answered it."""
        answered = [one.answered for one in self.models.values()]
        return [dict(zip(self.models, each, strict=True)) for each in zip(*answered, strict=True)]

    def measures(self) -> dict[str, dict[str, list[float]]]:
        """Values in [0, 1], one a problem, by measure and model; none without problems."""
        if not self.problems:
            return {}
        samples = len(self.problems[0][self.first].answers)
        found: dict[str, dict[str, list[float]]] = {"greedy_accuracy": {}}
        found |= {f"pass_at_{k}": {} for k in self.pass_at} | {f"all_of_{samples}": {}}
        for name, one in self.models.items():
            found["greedy_accuracy"][name] = [float(a.greedy_correct) for a in one.answered]
            for k in self.pass_at:
                found[f"pass_at_{k}"][name] = pass_values(one.answered, k)
            found[f"all_of_{samples}"][name] = all_right_values(one.answered)
        return found

    def gains(self) -> dict[str, dict[str, Estimate]]:
        """How far each other model is above the first, by measure and that model's name."""
        return {
            measure: {name: paired_gain(values[self.first], values[name]) for name in self.others}
            for measure, values in self.measures().items()
        }


def headline(comparison: Comparison) -> dict[str, float]:
    """Key figures by flat metric name; bits per byte are over all sources together."""
    figures = {}
    if comparison.baseline:
        ngram = total([entry.score for entry in comparison.baseline.values()])
        figures["ngram_bits_per_byte"] = ngram.bits_per_byte
    for name, found in comparison.models.items():
        figures[f"{name}_bits_per_byte"] = total(found.text.values()).bits_per_byte
    gains = comparison.gains()
    for measure, values in comparison.measures().items():
        for name, some in values.items():
            figures |= _named(f"{name}_{measure}", mean_over_problems(some))
        for name, gain in gains[measure].items():
            figures |= _named(f"{name}_{measure}_gain", gain)
    return figures


def key(comparison: Comparison) -> tuple[str, ...]:
    """The most telling figures: how often the first and the last model are right, and the text."""
    first, last = comparison.first, list(comparison.models)[-1]
    chosen = dict.fromkeys(
        f"{name}_{measure}"
        for measure in list(comparison.measures())[1:2]
        for name in (first, last)
    )
    return (*chosen, f"{last}_bits_per_byte")


def plot(comparison: Comparison) -> Plot:
    """Bars of what every model came to: a panel a measure, and one of the text."""
    figures = headline(comparison)
    panels = [
        Bars(
            title=measure.replace("_", " "),
            bars={
                name: Bar(
                    value=figures[f"{name}_{measure}"],
                    low=figures.get(f"{name}_{measure}_low"),
                    high=figures.get(f"{name}_{measure}_high"),
                )
                for name in comparison.models
            },
        )
        for measure in ("bits_per_byte", *comparison.measures())
    ]
    return Plot(name="models", panels=tuple(panels))


def _named(name: str, estimate: Estimate) -> dict[str, float]:
    return {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}


def render_json(comparison: Comparison) -> str:
    """Every number, and every problem with all answers of every model."""
    measures = comparison.measures()
    record: dict[str, Any] = {
        "headline": headline(comparison),
        "ngram": {
            source: {**_text_record(entry.score), "bigram_weight": entry.bigram_weight}
            for source, entry in comparison.baseline.items()
        },
        "no_ngram": comparison.no_baseline,
        "held_out_in_training": comparison.overlap,
        "compared_with": comparison.first,
        "gains": {
            measure: {name: asdict(gain) for name, gain in gains.items()}
            for measure, gains in comparison.gains().items()
        },
        "models": {
            name: {
                "text": {source: _text_record(score) for source, score in found.text.items()},
                "problems": {
                    measure: asdict(mean_over_problems(values[name]))
                    for measure, values in measures.items()
                },
            }
            for name, found in comparison.models.items()
        },
        "problems": [
            {
                "id": each[comparison.first].problem.id,
                "prompt": each[comparison.first].problem.prompt,
                "answer": each[comparison.first].problem.answer,
                "answers": {name: _answers_record(one) for name, one in each.items()},
            }
            for each in comparison.problems
        ],
    }
    return json.dumps(record, indent=2, ensure_ascii=False) + "\n"


def samples(comparison: Comparison) -> list[Sample]:
    """Some problems with each model's greedy answer and its first sampled one."""
    found = []
    for each in comparison.problems[:_SAMPLED_PROBLEMS]:
        for name, one in each.items():
            for drawn, answer in (("greedy", one.greedy), ("sampled", one.answers[0])):
                verdict = verify(one.problem, answer)
                found.append(
                    Sample(
                        prompt=one.problem.prompt,
                        right_answer=one.problem.answer,
                        answer=answer,
                        reward=verdict.reward,
                        reason=verdict.reason,
                        model=name,
                        drawn=drawn,
                    )
                )
    return found


def _answers_record(answered: Answered) -> dict[str, Any]:
    return {
        "greedy": answered.greedy,
        "greedy_correct": answered.greedy_correct,
        "answers": answered.answers,
        "correct": sum(answered.correct),
    }


def render_markdown(comparison: Comparison) -> str:
    """Tables of measurements, what they cover, and a few problems with every model's answers."""
    lines = ["# Evaluation", "", *_table(comparison), ""]
    if gains := _gain_table(comparison):
        lines += [*gains, ""]
    lines += [*_text_lines(comparison), "", *_problem_lines(comparison), ""]
    return "\n".join(lines)


def _table(comparison: Comparison) -> list[str]:
    """Bits per byte and what the problems gave, all models side by side."""
    columns = [found.text for found in comparison.models.values()]
    heads = ["", *map(plain, comparison.models)]
    if comparison.baseline:
        columns.append({source: entry.score for source, entry in comparison.baseline.items()})
        heads.append("bigram + unigram")
    whole = [f"{total(column.values()).bits_per_byte:.4f}" for column in columns]
    lines = [row(*heads), "|---" + "|---:" * (len(heads) - 1) + "|"]
    lines.append(row("bits per byte, all held-out text", *whole))
    for source in columns[0]:
        each = [f"{column[source].bits_per_byte:.4f}" for column in columns]
        lines.append(row(f"bits per byte, {plain(source)}", *each))
    for measure, values in comparison.measures().items():
        rates = [_percent(mean_over_problems(some)) for some in values.values()]
        # Problems have no baseline.
        lines.append(row(_label(measure), *rates, *[""] * bool(comparison.baseline)))
    return lines


def _gain_table(comparison: Comparison) -> list[str]:
    """How far the other models are above the first; nothing without any, or without problems."""
    gains = comparison.gains()
    if not comparison.others or not gains:
        return []
    heads = [f"gain over {plain(comparison.first)}", *map(plain, comparison.others)]
    lines = [row(*heads), "|---" + "|---:" * (len(heads) - 1) + "|"]
    for measure, by_model in gains.items():
        lines.append(row(_label(measure), *map(_points, by_model.values())))
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
    problems = comparison.problems
    if not problems:
        return ["The corpus holds out no problems, so no answers are measured."]
    samples = len(problems[0][comparison.first].answers)
    heads = [cell for name in comparison.models for cell in (plain(name), "sampled")]
    lines = [
        f"Problems: {len(problems)} held-out ones, each answered greedily once (the likeliest "
        f"token every time) and {samples} times by sampling. pass@k is the chance that one of k "
        "samples is right.",
        "",
        "In brackets: 95 % intervals. They cover the choice of problems, and with it the chance in "
        "sampling their answers: another draw of as many problems would give such figures. Gains "
        "are paired, problem by problem. They do not cover training: another training seed, or "
        "another machine, gives another model, whose figures may well lie outside; to see that, "
        "train several times.",
        "",
        "## Some problems, with each model's greedy answer",
        "",
        row("problem", "right answer", *heads),
        "|---|---" + "|---|---:" * len(comparison.models) + "|",
    ]
    for each in problems[:_SHOWN_PROBLEMS]:
        problem = each[comparison.first].problem
        cells = [code_cell(problem.prompt), code_cell(problem.answer)]
        for one in each.values():
            cells += [code_cell(one.greedy), f"{sum(one.correct)} of {samples} right"]
        lines.append(row(*cells))
    return lines


def _text_record(score: TextScore) -> dict[str, float]:
    return {**asdict(score), "bits_per_byte": score.bits_per_byte}


def _percent(rate: Estimate) -> str:
    return f"{rate.mean:.1%} [{rate.low:.1%}, {rate.high:.1%}]"


def _points(gain: Estimate) -> str:
    """A difference of shares, in percentage points."""
    return f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}] points"

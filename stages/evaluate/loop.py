"""Measure the model before and after post-training on held-out text and problems, side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cluster.generation import GenerationPool, Sampling, open_generation
from configs.delivery import EvaluateSpec
from configs.errors import DataError
from model.weights.files import load_pretrained
from stages.answers import Answered, ask, choose, greedy_accuracy, pass_values
from stages.artifacts import Checkpoint, Corpus, Report
from stages.contract import Workspace, fills
from stages.conventions import read_end_tokens
from stages.estimators import mean_over_problems
from stages.evaluate import face
from stages.evaluate.ngram import best_bits, count_pairs
from stages.evaluate.render import (
    Baseline,
    Comparison,
    Findings,
    Side,
    headline,
    render_json,
    render_markdown,
)
from stages.evaluate.text import TextScore, byte_lengths, score_text, size, total
from stages.prompts import Prompt, answer_text, encode_prompts
from stages.shards import Rows, consumed_rows
from stages.tokens import load_tokenizer
from stages.verifiers import read_problems

_ROWS_PER_COUNT = 4096
"""Consumed rows to hold in memory at once."""


@dataclass(frozen=True, slots=True)
class Exam:
    """Everything both models are asked, read and checked before either is loaded."""

    text: Mapping[str, NDArray[np.int64]]
    """Held-out rows [N, S] of each source."""
    lengths_V: NDArray[np.int64]
    """Bytes of each token id."""
    tokenizer: Tokenizer
    prompts: Sequence[Prompt]
    overlap: Mapping[str, Any]
    """What the corpus records of held-out data that stood in training text."""


@fills(face.evaluate)
def evaluate(
    config: EvaluateSpec, work: Workspace, *, corpus: Corpus, before: Checkpoint, after: Checkpoint
) -> Report:
    """Bits per byte beside an n-gram baseline's, greedy accuracy and pass@k with 95 % intervals.

    `config.seed` must be the seed that `before` was pretrained with: it fixes which rows of the
    corpus that model consumed, and the baseline is counted on exactly those. An imported model's
    are not known, so it has no baseline.
    Documents are scored one by one: none attends to those packed before it in its row, even where
    pretraining did so (`pretrain.attend_across_documents`), for a checkpoint does not record that.
    DataError if a problem or row does not fit a model's context, before anything is sampled.
    """
    exam = _prepare(config, work, corpus, (before, after))
    if exam.prompts:
        work.tracker.start(steps=2 * len(exam.prompts), unit="problem")
    imported = before.sequences_seen == 0
    # Models leave this process before samplers load theirs.
    text = [_read_text(work, exam, before, "before"), _read_text(work, exam, after, "after")]
    answered = _answer_problems(config, work, exam, {"before": before, "after": after})
    comparison = Comparison(
        baseline={} if imported else _baseline(config, corpus, before, exam),
        no_baseline="what the imported model consumed is not known" if imported else None,
        before=Findings(text=text[0], answered=answered["before"]),
        after=Findings(text=text[1], answered=answered["after"]),
        pass_at=config.evaluate.pass_at,
        overlap=exam.overlap,
    )
    figures = headline(comparison)
    work.lease.check()
    out = Path(work.out)
    (out / "report.json").write_text(render_json(comparison), encoding="utf-8")
    (out / "report.md").write_text(render_markdown(comparison), encoding="utf-8")
    return Report(uri=work.out, headline=figures)


def _prepare(
    config: EvaluateSpec, work: Workspace, corpus: Corpus, models: Sequence[Checkpoint]
) -> Exam:
    context_tokens = min(model.model.max_position_embeddings for model in models)
    vocab_size = min(model.model.vocab_size for model in models)
    if vocab_size < corpus.vocab_size:
        raise DataError(
            f"the corpus has a vocabulary of {corpus.vocab_size} tokens, the model one of "
            f"{vocab_size}; raise model.vocab_size or evaluate on the corpus it was trained on"
        )
    if context_tokens < corpus.sequence_tokens:
        raise DataError(
            f"held-out rows of {corpus.sequence_tokens} tokens exceed the model's context of "
            f"{context_tokens}; raise model.max_position_embeddings or pack shorter rows"
        )
    text = _held_out_text(config, corpus)
    tokenizer = load_tokenizer(corpus.path("tokenizer.json"))
    wanted = config.evaluate.problems
    held_out = (
        read_problems(corpus.path("problems", "held_out.parquet"))
        if corpus.held_out_problems
        else []
    )
    if len(held_out) < wanted:
        work.tracker.note(
            f"evaluate.problems = {wanted}, but {len(held_out)} are held out: all asked"
        )
    prompts = encode_prompts(
        choose(held_out, wanted, seed=config.seed),
        tokenizer,
        context_tokens=context_tokens,
        max_new_tokens=config.evaluate.max_new_tokens,
    )
    lengths_V = byte_lengths(corpus.path("tokenizer.json"))
    statistics = json.loads(corpus.path("statistics.json").read_text(encoding="utf-8"))
    return Exam(
        text=text,
        lengths_V=lengths_V,
        tokenizer=tokenizer,
        prompts=prompts,
        overlap=statistics["held_out_in_training"],
    )


def _held_out_text(config: EvaluateSpec, corpus: Corpus) -> dict[str, NDArray[np.int64]]:
    limit = max(1, config.evaluate.max_held_out_tokens // corpus.sequence_tokens)
    text = {
        source: Rows(corpus.path("held_out", source)).take(np.arange(min(count, limit)))
        for source, count in sorted(corpus.held_out_rows.items())
        if count
    }
    if not text:
        raise DataError(
            f"{corpus.uri}: 0 held-out rows in {len(corpus.held_out_rows)} sources, nothing to "
            "score; raise data.held_out_share"
        )
    return text


def _baseline(
    config: EvaluateSpec, corpus: Corpus, before: Checkpoint, exam: Exam
) -> dict[str, Baseline]:
    """The n-gram's score of each source, counted on the rows that `before` consumed."""
    rows = Rows(corpus.path("train"))
    consumed = consumed_rows(corpus.train_rows, before.sequences_seen, seed=config.seed)
    parts = np.array_split(consumed, 1 + len(consumed) // _ROWS_PER_COUNT)
    seen = count_pairs((rows.take(part) for part in parts), vocab_size=corpus.vocab_size)
    found = {}
    for source, rows_NS in exam.text.items():
        bits, weight = best_bits(seen, rows_NS)
        num_bytes, targets = size(rows_NS, exam.lengths_V)
        score = TextScore(bits=bits, bytes=num_bytes, targets=targets)
        found[source] = Baseline(score=score, bigram_weight=weight)
    return found


def _read_text(
    work: Workspace, exam: Exam, checkpoint: Checkpoint, side: Side
) -> dict[str, TextScore]:
    model = load_pretrained(checkpoint.path())
    text = {
        source: score_text(model, rows_NS, exam.lengths_V) for source, rows_NS in exam.text.items()
    }
    bits_per_byte = total(text.values()).bits_per_byte
    work.tracker.note(f"{side} post-training: {bits_per_byte:.4f} bits per byte of held-out text")
    return text


def _answer_problems(
    config: EvaluateSpec, work: Workspace, exam: Exam, models: Mapping[Side, Checkpoint]
) -> dict[Side, list[Answered]]:
    """By side what its model answers: the same samplers load one model after the other."""
    found: dict[Side, list[Answered]] = {side: [] for side in models}
    if not exam.prompts:
        return found
    first, *_ = models
    with open_generation(work.machines, models[first].path()) as pool:
        for side, checkpoint in models.items():
            if side != first:
                pool.load(checkpoint.path())
            found[side] = _ask_model(pool, config, work, exam, checkpoint, side)
    return found


def _ask_model(
    pool: GenerationPool,
    config: EvaluateSpec,
    work: Workspace,
    exam: Exam,
    checkpoint: Checkpoint,
    side: Side,
) -> list[Answered]:
    answered: list[Answered] = []
    first_step = len(exam.prompts) if side == "after" else 0
    asked, end_tokens = config.evaluate, read_end_tokens(checkpoint.path())
    for part in ask(
        pool.sample,
        exam.prompts,
        Sampling(asked.max_new_tokens, asked.temperature, end_tokens),
        samples_per_problem=asked.samples_per_problem,
        seed=config.seed,
        answer_text=partial(answer_text, exam.tokenizer, end_tokens=end_tokens),
    ):
        answered += part
        metrics = {f"{side}_greedy_accuracy": greedy_accuracy(answered).mean}
        for k in asked.pass_at:
            metrics[f"{side}_pass_at_{k}"] = mean_over_problems(pass_values(answered, k)).mean
        work.tracker.log(metrics, step=first_step + len(answered))
    return answered

"""Measure models on held-out text and problems, side by side."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer

from cluster.backend import own
from cluster.generation import GenerationPool, Sampling, open_generation
from cluster.workers import with_restarts
from configs.delivery import EvaluateSpec
from configs.errors import DataError
from model.fp8.scheme import Numerics
from model.weights.files import load_pretrained
from stages.answers import Answered, ask, choose, greedy_accuracy, pass_values
from stages.artifacts import PAGE, Checkpoint, Corpus, Report
from stages.contract import Workspace, fills
from stages.conventions import read_end_tokens
from stages.estimators import mean_over_problems
from stages.evaluate import face
from stages.evaluate.ngram import best_bits, count_pairs
from stages.evaluate.render import (
    Baseline,
    Comparison,
    Findings,
    headline,
    key,
    plot,
    render_json,
    render_markdown,
    samples,
)
from stages.evaluate.text import TextScore, byte_lengths, score_text, size, total
from stages.plots import write_plots
from stages.prompts import Prompt, answer_text, encode_prompts
from stages.samples import write_samples
from stages.shards import Rows, consumed_rows
from stages.tokens import load_tokenizer
from stages.verifiers import read_problems

_FULL = Numerics(compute=torch.float32)
"""Weights are measured as they are, on every device."""
_ROWS_PER_COUNT = 4096
"""Consumed rows to hold in memory at once."""


@dataclass(frozen=True, slots=True)
class Exam:
    """Everything the models are asked, read and checked before any is loaded."""

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
    config: EvaluateSpec, work: Workspace, *, corpus: Corpus, **models: Checkpoint
) -> Report:
    """Bits per byte beside an n-gram baseline's, greedy accuracy and pass@k with 95 % intervals.

    Figures bear the names of the inputs; the first in `config.order`, or as they come, is the one
    that others are compared with. `config.seed` must be the seed that it was pretrained with: it
    fixes which rows of the corpus that model consumed, and the baseline is counted on exactly
    those. An imported model's are not known, so it has no baseline, nor has one that was pretrained
    on another corpus.
    Documents are scored one by one: none attends to those packed before it in its row, even where
    pretraining did so (`pretrain.attend_across_documents`), for a checkpoint does not record that.
    DataError if a problem or row does not fit a model's context, before anything is sampled.
    """
    if not models:
        raise DataError("evaluate was given no model; name one or more in evaluate.models")
    ordered = {name: models[name] for name in config.order or sorted(models)}
    exam = _prepare(config, work, corpus, list(ordered.values()))
    if exam.prompts:
        work.tracker.start(steps=len(ordered) * len(exam.prompts), unit="problem")
    first = next(iter(ordered.values()))
    no_baseline = _no_baseline(config, first)
    # Models leave this process before samplers load theirs.
    text = {name: _read_text(work, exam, model, name) for name, model in ordered.items()}
    answered = _answer_problems(config, work, exam, ordered)
    comparison = Comparison(
        models={name: Findings(text=text[name], answered=answered[name]) for name in ordered},
        baseline={} if no_baseline else _baseline(config, corpus, first, exam),
        no_baseline=no_baseline,
        pass_at=config.evaluate.pass_at,
        overlap=exam.overlap,
    )
    work.lease.check()
    work.path("report.json").write_text(render_json(comparison), encoding="utf-8")
    work.path(PAGE).write_text(render_markdown(comparison), encoding="utf-8")
    write_plots(work.path(), plot(comparison))
    write_samples(work.path(), samples(comparison))
    return Report(uri=work.out, headline=headline(comparison), key=key(comparison))


def _no_baseline(config: EvaluateSpec, first: Checkpoint) -> str | None:
    """Why no n-grams can be counted on what the first model consumed; none if they can."""
    if first.sequences_seen == 0:
        return "what the imported model consumed is not known"
    if not config.has_baseline:
        return "not all that the first model was pretrained on is in this corpus"
    return None


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
    config: EvaluateSpec, corpus: Corpus, model: Checkpoint, exam: Exam
) -> dict[str, Baseline]:
    """The n-gram's score of each source, counted on the rows that `model` consumed."""
    rows = Rows(corpus.path("train"))
    consumed = consumed_rows(corpus.train_rows, model.sequences_seen, seed=config.seed)
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
    work: Workspace, exam: Exam, checkpoint: Checkpoint, name: str
) -> dict[str, TextScore]:
    device = own(work.machines.device).device
    model = load_pretrained(checkpoint.path(), device=device)
    text = {
        source: score_text(model, rows_NS, exam.lengths_V, device=device)
        for source, rows_NS in exam.text.items()
    }
    bits_per_byte = total(text.values()).bits_per_byte
    work.tracker.note(f"{name}: {bits_per_byte:.4f} bits per byte of held-out text")
    return text


def _answer_problems(
    config: EvaluateSpec, work: Workspace, exam: Exam, models: Mapping[str, Checkpoint]
) -> dict[str, list[Answered]]:
    """By name what each model answers: the same samplers load one model after the other."""
    if not exam.prompts:
        return {name: [] for name in models}
    found: dict[str, list[Answered]] = {}

    def ask_others() -> None:
        """Those that have not answered yet; whoever has, need not again when a worker dies."""
        others = {name: one for name, one in models.items() if name not in found}
        held = next(iter(others.values())).path()
        with open_generation(
            work.machines, held, logs=work.logs, supply=work.supply, precision=_FULL
        ) as pool:
            for name, one in others.items():
                if one.path() != held:
                    pool.load(one.path())
                    held = one.path()
                step = len(found) * len(exam.prompts)
                found[name] = _ask_model(pool, config, work, exam, one, name, first_step=step)

    with_restarts(ask_others, work.machines, work.tracker.note)
    return found


def _ask_model(
    pool: GenerationPool,
    config: EvaluateSpec,
    work: Workspace,
    exam: Exam,
    checkpoint: Checkpoint,
    name: str,
    *,
    first_step: int,
) -> list[Answered]:
    answered: list[Answered] = []
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
        metrics = {f"{name}_greedy_accuracy": greedy_accuracy(answered).mean}
        for k in asked.pass_at:
            metrics[f"{name}_pass_at_{k}"] = mean_over_problems(pass_values(answered, k)).mean
        work.tracker.log(metrics, step=first_step + len(answered))
    return answered

"""`ingot eval MODEL`: how many problems a model answers rightly, without a recipe."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from cluster.backend import own
from cluster.generation import Sampling
from configs.errors import ConfigError, DataError
from model.transformer import Transformer
from model.weights.files import load_pretrained
from pipeline.verbs.sample import model_folder
from stages.answers import (
    Answered,
    ask,
    choose,
    greedy_accuracy,
    pass_values,
    sampler_of,
)
from stages.conventions import read_end_tokens
from stages.estimators import Estimate, mean_over_problems
from stages.manifest import MANIFEST, read_manifest
from stages.names import TOKENIZER
from stages.prompts import answer_text, encode_prompts
from stages.tokens import load_tokenizer
from stages.verifiers import Problem, read_problems

_HELD_OUT = Path("problems", "held_out.parquet")
_SOURCE = "arithmetic"
"""Whose verifier judges problems of a file that names none: the answer must be equal."""


def eval_(args: argparse.Namespace) -> int:
    """Print greedy accuracy and pass@1 with 95 % intervals, and some wrong answers."""
    if args.limit < 1 or args.samples < 1:
        raise ConfigError("--limit and --samples must be 1 or more; leave them out for 200 and 4")
    folder = model_folder(args)
    path = Path(args.problems) if args.problems else _held_out(folder)
    found = read_problems_file(path)
    if not found:
        raise DataError(f"--problems {path}: holds no problem; give one or more")
    problems = choose(found, args.limit, seed=args.seed)
    print(f"asking {folder} {len(problems)} problems of {path}", file=sys.stderr)
    answered = _ask(load_pretrained(folder, device=own("auto").device), folder, problems, args)
    print(f"right greedily  {_shown(greedy_accuracy(answered))}")
    print(f"pass@1          {_shown(mean_over_problems(pass_values(answered, 1)))}")
    wrong = [one for one in answered if not one.greedy_correct]
    for one in wrong[:5]:
        print(
            f"wrong: {one.problem.prompt!r} {one.greedy!r}, where {one.problem.answer!r} is right"
        )
    return 0


def _ask(
    model: Transformer, folder: Path, problems: Sequence[Problem], args: argparse.Namespace
) -> list[Answered]:
    tokenizer, end_tokens = load_tokenizer(folder / TOKENIZER), read_end_tokens(folder)
    prompts = encode_prompts(
        problems,
        tokenizer,
        context_tokens=model.config.max_position_embeddings,
        max_new_tokens=args.max_new_tokens,
    )

    parts = ask(
        sampler_of(model),
        prompts,
        Sampling(args.max_new_tokens, 1.0, end_tokens),
        samples_per_problem=args.samples,
        seed=args.seed,
        answer_text=partial(answer_text, tokenizer, end_tokens=end_tokens),
    )
    return [one for part in parts for one in part]


def _held_out(folder: Path) -> Path:
    """The held-out problems of the corpus that the model in `folder` was made of.

    ConfigError if it was not made here, or its corpus is gone.
    """
    folder = folder.resolve()
    generation = next((one for one in folder.parents if (one / MANIFEST).is_file()), None)
    while generation is not None:
        manifest = read_manifest(str(generation))
        if (found := generation / manifest.address / _HELD_OUT).is_file():
            return found
        store = generation.parents[3]
        inputs = manifest.inputs
        entry = inputs.get("corpus") or next(iter(inputs.values()), None)
        generation = None if entry is None else store / entry.address
        if generation is not None and not (generation / MANIFEST).is_file():
            break
    raise ConfigError(
        f"{folder}: no corpus with held-out problems is known of this model; name a file of them: "
        "--problems FILE"
    )


def read_problems_file(path: Path) -> list[Problem]:
    """Problems of a corpus's parquet file, or of lines of JSON with `prompt` and `answer`."""
    if not path.is_file():
        raise DataError(f"--problems {path}: no such file; name a .jsonl or .parquet file")
    try:
        if path.suffix == ".parquet":
            return read_problems(path)
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, ValueError, TypeError) as error:
        said = " ".join(str(error).split())
        raise DataError(
            f"--problems {path}: cannot be read ({type(error).__name__}: {said}); give lines of "
            "JSON in UTF-8, or a corpus's parquet file"
        ) from None
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            asked = {"prompt": record["prompt"], "answer": record["answer"]}
            source = record.get("source", _SOURCE)
            found.append(Problem(id=f"{path.name}#{number}", source=source, **asked))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(
                f"--problems {path} line {number}: not a JSON object with the texts prompt and "
                f"answer ({type(error).__name__}: {error}); correct the line"
            ) from None
    return found


def _shown(estimate: Estimate) -> str:
    return f"{estimate.mean:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"

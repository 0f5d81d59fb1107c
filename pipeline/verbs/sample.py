"""`ingot sample`: let a checkpoint or a bundle answer prompts."""

import argparse
import math
import sys
from pathlib import Path

from cluster.backend import own
from configs.errors import ArtifactError, ConfigError
from configs.seed import derive
from model import decode
from model.drawing import Drawing
from model.weights.files import load_pretrained
from pipeline.verbs.asked import find_store, locate
from stages.artifacts import load_artifact
from stages.conventions import read_end_tokens
from stages.framing import BOS_ID
from stages.tokens import load_tokenizer


def sample(args: argparse.Namespace) -> int:
    """Print each prompt and its answer, and before them, on stderr, which model gives it.

    ConfigError for a setting that means nothing.
    """
    _check(args)
    folder = model_folder(args)
    print(f"sampling from {folder}", file=sys.stderr)
    tokenizer = load_tokenizer(folder / "tokenizer.json")
    prompts = [
        [BOS_ID, *tokenizer.encode(prompt, add_special_tokens=False).ids] for prompt in args.prompt
    ]
    answers = decode.sample(
        load_pretrained(folder, device=own("auto").device),
        prompts,
        max_new_tokens=args.max_new_tokens,
        drawing=Drawing(args.temperature, args.top_k, args.top_p),
        stop_tokens=read_end_tokens(folder),
        seeds=[derive(args.seed, "sample", number) for number in range(len(prompts))],
    )
    for prompt, answer in zip(args.prompt, answers, strict=True):
        print(prompt + tokenizer.decode(answer.token_ids, skip_special_tokens=True))
    return 0


def _check(args: argparse.Namespace) -> None:
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise ConfigError(
            f"--temperature {args.temperature}: must be a number of 0 or more; 0 takes the "
            "likeliest token, 1 samples as the model was trained"
        )
    if args.max_new_tokens < 1:
        raise ConfigError(
            f"--max-new-tokens {args.max_new_tokens}: must be 1 or more; leave it out for 64"
        )
    if args.top_k is not None and args.top_k < 1:
        raise ConfigError(f"--top-k {args.top_k}: must be 1 or more; leave it out for all tokens")
    if not 0 < args.top_p <= 1:
        raise ConfigError(
            f"--top-p {args.top_p}: must be above 0 and at most 1; leave it out for all tokens"
        )


def model_folder(args: argparse.Namespace) -> Path:
    """The folder with weights that the user means; ArtifactError if it holds no model."""
    asked = Path(args.model)
    if (asked / "config.json").is_file():
        return asked
    store, recipe = find_store(args, print)
    folder = locate(store, recipe, args.model)
    artifact = load_artifact(str(folder))
    found = artifact.weights()
    if found is None:
        raise ArtifactError(
            f"{folder} holds a {artifact.kind} without plain weights; sample from a checkpoint, or "
            "from a bundle with its bf16 variant"
        )
    return found

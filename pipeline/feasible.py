"""Arithmetic of a plan: what is sure to fail once everything before it is built fails here."""

import difflib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from configs.data import ArithmeticSource, CheckableSource, DataConfig
from configs.delivery import EvaluateSection, EvaluateSpec
from configs.errors import ConfigError
from configs.model import ModelConfig
from configs.parallel import ClusterConfig
from configs.recipe import Recipe
from pipeline.phases import said_in
from stages.byte_level import odd_token
from stages.evaluate.face import reported
from stages.export.layouts import misfit
from stages.export.servers import bundles, verdicts
from stages.imported.face import read_base
from stages.names import TOKENIZER

_ONE_STAGE = {
    "pretrain": "pretraining over several pipeline stages is not built yet",
    "posttrain": "the losses of post-training need all layers in one process",
}
"""Stages of the line that hold the whole depth of a model, and why."""


def model_of(recipe: Recipe) -> ModelConfig:
    """The model that the recipe trains or starts from; ConfigError if it cannot be read."""
    return recipe.model if recipe.base is None else read_base(Path(recipe.base))


def unserved(recipe: Recipe) -> Iterator[str]:
    """Which servers other sizes of the model would let load its bundles, one line each.

    Not errors: Ingot loads such bundles, and so does transformers where it knows the model. What
    no sizes would mend is for the card of a bundle to say.
    """
    if recipe.export is None:
        return
    model, refused = model_of(recipe), dict[str, dict[str, str]]()
    for target, variant in bundles(recipe.export.targets, recipe.export.variants):
        for verdict in verdicts(model, target, variant):
            meant = verdict.server.targets[0] == target
            if meant and all(breach.rule.by_size for breach in verdict.of("refuses")):
                refused.setdefault(verdict.server.title, {}).update(
                    (breach.found, breach.rule.wants) for breach in verdict.of("refuses")
                )
    for title, sizes in refused.items():
        if sizes:
            told = ", ".join(f"{found} (wants {wants})" for found, wants in sizes.items())
            yield f"{title} does not load bundles of these sizes: {told}"


def unpipelined(machines: ClusterConfig, stages: Iterable[str]) -> str | None:
    """Why one of these stages of the line cannot train in pipeline stages; none if all can."""
    if machines.pp == 1:
        return None
    why = next((_ONE_STAGE[name] for name in stages if name in _ONE_STAGE), None)
    if why is None:
        return None
    return (
        f"cluster.pp = {machines.pp}: {why}; set cluster.pp = 1 and cluster.trainers = "
        f"{machines.stage_trainers}, which divide rows and experts as these do"
    )


def check_line(recipe: Recipe, model: ModelConfig) -> None:
    """ConfigError, naming both numbers, if parts of a recipe cannot go together."""
    if recipe.base is not None:
        check_base(recipe, recipe.base, model)
    check_variants(recipe, model)
    check_tokenizer(recipe, model)
    check_answers(recipe, model)
    check_prompts(recipe)


def check_base(recipe: Recipe, base: str, model: ModelConfig) -> None:
    """What must agree with the model in the folder `base`."""
    cluster = recipe.cluster
    for name, corpus in recipe.corpora.items():
        if model.max_position_embeddings < corpus.sequence_tokens:
            raise ConfigError(
                f"base = {base!r}: its max_position_embeddings = {model.max_position_embeddings} "
                f"is below {name}.sequence_tokens = {corpus.sequence_tokens}; lower the second"
            )
    if cluster.pp > model.num_hidden_layers:
        raise ConfigError(
            f"base = {base!r}: its num_hidden_layers = {model.num_hidden_layers} is below "
            f"cluster.pp = {cluster.pp}, which leaves pipeline stages without a layer; lower the "
            "second"
        )
    if fault := cluster.misfit(model.n_routed_experts):
        raise ConfigError(
            f"base = {base!r}: its n_routed_experts = {model.n_routed_experts} {fault}; change the "
            "second to a divisor"
        )


def check_variants(recipe: Recipe, model: ModelConfig) -> None:
    """What no bundle can be of what is asked for, and what servers would read wrongly."""
    asked = recipe.export
    if asked is None:
        return
    for target in asked.targets:
        if (fault := misfit(model, asked, target)) is not None:
            raise ConfigError(fault)
    owner = "model" if recipe.base is None else f"base = {recipe.base!r}: its config"
    for target, variant in bundles(asked.targets, asked.variants):
        for verdict in verdicts(model, target, variant):
            if verdict.server.targets[0] != target:
                continue  # the card warns of it
            for breach in verdict.of("misreads"):
                rest = [other for other in asked.variants if other != variant] or ["bf16"]
                raise ConfigError(
                    f"{owner}.{breach.found}: {verdict.server.title} wants {breach.rule.wants}, "
                    f"and would compute wrongly with the {variant} variant of export.{target}, "
                    "without a word; change it, or leave the variant out: export.variants = "
                    f"{json.dumps(rest)}"
                )


def check_tokenizer(recipe: Recipe, model: ModelConfig) -> None:
    """What must be true of a tokenizer that exists. One that cannot be read is the stages' to
    tell."""
    if recipe.base is not None:
        owner, path = f"base = {recipe.base!r}", Path(recipe.base, TOKENIZER)
    elif recipe.data.tokenizer.file is not None:
        path = Path(recipe.data.tokenizer.file)
        owner = f"data.tokenizer.file = {str(path)!r}"
    else:
        return
    found = _read_vocabulary(path)
    if found is None:
        return
    vocabulary, added = found
    size = 1 + max(vocabulary.values(), default=0)
    if size > model.vocab_size:
        raise ConfigError(
            f"{owner}: its tokenizer has {size} tokens, which is above the model's vocab_size = "
            f"{model.vocab_size}; raise the second, or take another tokenizer"
        )
    if recipe.evaluate is None:
        return
    if (token := odd_token(vocabulary, added)) is not None:
        raise ConfigError(
            f"{owner}: its token {token!r} is not spelt in bytes, and evaluate counts bytes of "
            "text, which only byte-level tokenizers say exactly; take another tokenizer, or leave "
            "evaluation out: evaluate = false"
        )


def check_answers(recipe: Recipe, model: ModelConfig) -> None:
    """Whether prompts and answers fit into the model's context."""
    context = model.max_position_embeddings
    for owner, corpus, tokens in _answered(recipe):
        prompt = _shortest_of_longest(recipe, corpus)
        if prompt is not None and prompt + tokens > context:
            raise ConfigError(
                f"{owner}.max_new_tokens = {tokens} and prompts of {prompt} tokens exceed the "
                f"model's max_position_embeddings = {context}; lower the first, or raise the last"
            )


def check_prompts(recipe: Recipe) -> None:
    """Whether there can be as many held-out rows as bundles are to be compared on."""
    asked = recipe.export
    if asked is None:
        return
    name = asked.corpus or (recipe.evaluate.corpus if recipe.evaluate else None)
    corpus = recipe.data.corpora[name] if name else recipe.data
    each = max(1, corpus.max_held_out_tokens // corpus.sequence_tokens)
    most = each * len(corpus.sources)
    if asked.parity_prompts > most:
        raise ConfigError(
            f"export.parity_prompts = {asked.parity_prompts}, but max_held_out_tokens = "
            f"{corpus.max_held_out_tokens} in rows of sequence_tokens = {corpus.sequence_tokens} "
            f"from {len(corpus.sources)} sources hold out {most} at most; lower the first, or "
            "raise data.max_held_out_tokens"
        )


def check_gates(asked: EvaluateSection, spec: EvaluateSpec, *, has_problems: bool) -> None:
    """ConfigError for a gate on a figure that the evaluation will not report."""
    known = reported(spec, has_problems=has_problems)
    for name in asked.gates:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it reports {', '.join(known)}"
            raise ConfigError(f"evaluate.gates.{name}: no figure that evaluate reports; {hint}")


def has_problems(recipe: Recipe, corpus: str | None) -> bool:
    """Whether a corpus, by its name among `data.corpora`, has checkable problems."""
    found = recipe.data.corpora[corpus] if corpus else recipe.data
    return any(isinstance(source, CheckableSource) for source in found.sources.values())


def _answered(recipe: Recipe) -> Iterator[tuple[str, DataConfig, int]]:
    """Who asks problems: a table of the recipe, the corpus that has them, tokens of an answer."""

    def corpus_of(name: str | None) -> DataConfig:
        return recipe.data.corpora[name] if name else recipe.data

    for name, phase in recipe.posttraining.items():
        yield said_in(name), corpus_of(phase.corpus), phase.max_new_tokens
    judged = None if recipe.evaluate is None else recipe.evaluate.corpus
    if recipe.evaluate is not None:
        yield "evaluate", corpus_of(judged), recipe.evaluate.max_new_tokens
    if recipe.export is not None and recipe.export.problems:
        yield "export", corpus_of(recipe.export.corpus or judged), recipe.export.max_new_tokens


def _shortest_of_longest(recipe: Recipe, corpus: DataConfig) -> int | None:
    """Tokens that the longest prompts of a corpus have at least; none if it has no problems.

    Begin-of-text, two operands of so many digits, the sign between and the one after them. Where
    operands are not padded one of them may be short, and other tokenizers than ours may take
    several digits for one token. How long problems of files are is not known before they are read:
    they count like those.
    """
    sources = [one for one in corpus.sources.values() if isinstance(one, CheckableSource)]
    if not sources:
        return None
    if recipe.base is not None or recipe.data.tokenizer.file is not None:
        return 3
    return max(
        3 + source.digits + (source.digits if source.zero_padded else 1)
        if isinstance(source, ArithmeticSource)
        else 3
        for source in sources
    )


def _read_vocabulary(path: Path) -> tuple[dict[str, int], set[str]] | None:
    """The words of a `tokenizer.json` and those that were added to it; none if it is unlike one."""
    try:
        record: Any = json.loads(path.read_text(encoding="utf-8-sig"))
        added = {token["content"] for token in record.get("added_tokens") or ()}
        vocabulary = record["model"]["vocab"]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return None
    words = vocabulary if isinstance(vocabulary, dict) else None
    if not words or not all(type(number) is int for number in words.values()):
        return None
    return words, added

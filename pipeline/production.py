"""The whole line, read top to bottom: from raw text to a bundle for each target."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.data import DataSpec, TokenizerConfig
from configs.delivery import EvaluateSpec, ExportSpec
from configs.errors import ConfigError, PlanError
from configs.imports import ImportSpec
from configs.meaning import meant_data, meant_export, meant_posttrain, meant_pretrain
from configs.model import ModelConfig
from configs.parity import ParityConfig, ParitySpec
from configs.recipe import NodeConfig, Recipe, explain
from configs.rl import PosttrainConfig, PosttrainSpec
from configs.shape import FP8_BLOCK
from configs.train import PretrainSpec, check_fp8
from stages.contract import Face, Planned
from stages.data.face import data
from stages.evaluate.face import evaluate
from stages.export.face import export
from stages.imported.face import imported, read_base
from stages.loss_parity.face import PRECISIONS, loss_parity, run_name
from stages.names import TOKENIZER
from stages.posttrain.face import posttrain
from stages.pretrain.face import pretrain

Line = dict[str, Planned[Any]]
IMPORT = "import"
"""The node that stands in pretraining's place where a recipe has a `base`."""


def production(recipe: Recipe) -> Line:
    """Plan everything that a recipe asks for. Runs nothing; PlanError if it cannot be wired."""
    if recipe.parity is not None:
        line = compare_precisions(recipe, recipe.parity)
    else:
        assert recipe.posttrain is not None
        line = make_bundles(recipe, recipe.posttrain)
    return extend(line, recipe.nodes)


def make_bundles(recipe: Recipe, asked: PosttrainConfig) -> Line:
    """From raw text to a bundle for each target, with the model judged on the way."""
    seed = recipe.seed

    model = recipe.model if recipe.base is None else read_base(Path(recipe.base))
    check_variants(recipe, model)
    # As asked, before what this model has no part for is left out.
    check_fp8("posttrain", asked, model)
    beginning = begin_pretraining(recipe) if recipe.base is None else begin_importing(recipe)
    corpus = beginning["data"]
    first = beginning["pretrain" if recipe.base is None else IMPORT]

    posttrained = posttrain(
        PosttrainSpec(seed=seed, posttrain=meant_posttrain(asked, model)),
        corpus=corpus,
        base=first,
    )
    report = evaluate(
        EvaluateSpec(seed=seed, evaluate=recipe.evaluate),
        corpus=corpus,
        before=first,
        after=posttrained,
    )
    bundles = {
        f"export.{target}": export(
            ExportSpec(seed=seed, target=target, export=meant_export(recipe.export, target)),
            corpus=corpus,
            checkpoint=posttrained,
        )
        for target in recipe.export.targets
    }
    return {
        **beginning,
        "posttrain": posttrained,
        "evaluate": report,
        **bundles,
    }


def compare_precisions(recipe: Recipe, asked: ParityConfig) -> Line:
    """The same model, trained twice for each seed, and how far the two losses are apart.

    Both trainings of a seed begin with the same values and read the same rows of one corpus.
    """
    corpus = data(DataSpec(seed=recipe.seed, data=meant_data(recipe.data)))
    trained = {
        (precision, seed): pretrain(
            PretrainSpec(
                seed=seed,
                model=recipe.model,
                pretrain=meant_pretrain(
                    recipe.pretrain.model_copy(update={"precision": precision}), recipe.model
                ),
            ),
            corpus=corpus,
        )
        for seed in asked.seeds
        for precision in PRECISIONS
    }
    report = loss_parity(
        ParitySpec(parity=asked),
        **{run_name(precision, seed): one for (precision, seed), one in trained.items()},
    )
    return {
        "data": corpus,
        **{f"pretrain.{precision}.{seed}": one for (precision, seed), one in trained.items()},
        "parity": report,
    }


def begin_pretraining(recipe: Recipe) -> Line:
    """A corpus, and a model made of it."""
    corpus = data(DataSpec(seed=recipe.seed, data=meant_data(recipe.data)))
    meant = meant_pretrain(recipe.pretrain, recipe.model)
    spec = PretrainSpec(seed=recipe.seed, model=recipe.model, pretrain=meant)
    return {"data": corpus, "pretrain": pretrain(spec, corpus=corpus)}


def begin_importing(recipe: Recipe) -> Line:
    """A model made elsewhere, and a corpus in its tokens; ConfigError if the recipe is too large
    for it."""
    assert recipe.base is not None
    check_base(recipe, recipe.base)
    tokenizer = TokenizerConfig(file=f"{recipe.base}/{TOKENIZER}")
    corpus = recipe.data.model_copy(update={"tokenizer": tokenizer})
    return {
        IMPORT: imported(ImportSpec(folder=recipe.base)),
        "data": data(DataSpec(seed=recipe.seed, data=meant_data(corpus))),
    }


def check_variants(recipe: Recipe, model: ModelConfig) -> None:
    """ConfigError if an FP8 bundle is asked for that servers would read wrongly."""
    if "cuda" not in recipe.export.targets or "fp8" not in recipe.export.variants:
        return
    owner = "model" if recipe.base is None else f"base = {recipe.base!r}: its config"
    for name, rows in model.ragged_rows.items():
        raise ConfigError(
            f"{owner}.{name} = {rows} is no multiple of {FP8_BLOCK}, which the FP8 variant of "
            "export.cuda needs: servers put matrices of so many rows on top of others, and "
            "would scale rows by another block's scale; change it, or leave FP8 out: "
            'export.variants = ["bf16", "w8a8"]'
        )


def check_base(recipe: Recipe, base: str) -> None:
    """What must agree with the model in the folder `base`; ConfigError where it does not."""
    model, workers = read_base(Path(base)), recipe.cluster.trainers
    if model.max_position_embeddings < recipe.data.sequence_tokens:
        raise ConfigError(
            f"base = {base!r}: its max_position_embeddings = {model.max_position_embeddings} is "
            f"below data.sequence_tokens = {recipe.data.sequence_tokens}; lower the second"
        )
    if model.n_routed_experts % workers:
        raise ConfigError(
            f"base = {base!r}: its n_routed_experts = {model.n_routed_experts} does not divide "
            f"over cluster.trainers = {workers}; change the second to a divisor"
        )


def extend(line: Line, added: Mapping[str, NodeConfig]) -> Line:
    """The line with the nodes that a recipe adds, each after those that it is made of."""
    line, waiting = dict(line), dict(added)
    if taken := sorted(line.keys() & waiting.keys()):
        raise PlanError(f"nodes.{taken[0]}: the line has a node of that name; choose another")
    while waiting:
        ready = [n for n, node in waiting.items() if all(i in line for i in node.inputs.values())]
        if not ready:
            name, node = next(iter(waiting.items()))
            lacking = next(i for i in node.inputs.values() if i not in line)
            raise PlanError(
                f"nodes.{name}.inputs: {lacking!r} is not a node that comes before it; "
                f"nodes: {', '.join([*line, *waiting])}"
            )
        for name in ready:
            node = waiting.pop(name)
            inputs = {role: line[supplier] for role, supplier in node.inputs.items()}
            line[name] = plan_added(name, node, inputs)
    return line


def plan_added(name: str, node: NodeConfig, inputs: Mapping[str, Planned[Any]]) -> Planned[Any]:
    """Plan one node of a recipe's own: find its stage, check its config by the stage's schema."""
    stage = load_stage(name, node.use)
    try:
        config = stage.config.model_validate(node.config)
    except ValidationError as error:
        origin = f"nodes.{name}.config"
        raise ConfigError(explain(error, stage.config, origin=origin)) from None
    try:
        return stage(config, **inputs)
    except PlanError as error:
        raise PlanError(f"nodes.{name}: {error}") from None


def load_stage(name: str, use: str) -> Face[Any]:
    """The stage at `package.module:stage`; PlanError if it cannot be imported or is none."""
    module_name, _, attribute = use.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise PlanError(
            f"nodes.{name}.use = {use!r}: cannot import {module_name} ({error}); install the "
            "package that holds it, or put its folder on PYTHONPATH"
        ) from None
    found = getattr(module, attribute, None)
    if not isinstance(found, Face):
        stages = sorted(key for key, value in vars(module).items() if isinstance(value, Face))
        raise PlanError(
            f"nodes.{name}.use = {use!r}: {module_name} has no stage {attribute!r}; "
            f"its stages: {', '.join(stages) or 'none (decorate a function with @stage)'}"
        )
    return found

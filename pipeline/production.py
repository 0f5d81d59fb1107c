"""The whole line, read top to bottom: from raw text to a bundle for each target."""

from collections.abc import Mapping
from itertools import product

from configs.base import settings_of
from configs.data import DataConfig, DataSpec, TokenizerConfig
from configs.delivery import (
    EvaluateConfig,
    EvaluateSection,
    EvaluateSpec,
    ExportConfig,
    ExportSection,
    ExportSpec,
    GateSpec,
)
from configs.errors import PlanError
from configs.imports import ImportSpec
from configs.meaning import meant_data, meant_export, meant_posttrain, meant_pretrain
from configs.model import ModelConfig
from configs.parity import ParityConfig, ParitySpec
from configs.recipe import Recipe
from configs.rl import PosttrainConfig, PosttrainSpec
from configs.train import PretrainConfig, PretrainSpec, check_fp8, check_indexer
from pipeline.feasible import check_gates, check_line, has_problems, model_of
from pipeline.phases import begin_of, corpus_node, given, last, name_models, rows_before, said_in
from pipeline.wiring import Line, Wanted, added, wire
from stages.data.face import data
from stages.evaluate.face import evaluate
from stages.export.face import export
from stages.gate import gate
from stages.imported.face import imported
from stages.loss_parity.face import PRECISIONS, loss_parity, run_name
from stages.names import TOKENIZER
from stages.posttrain.face import posttrain
from stages.pretrain.face import pretrain

Nodes = dict[str, Wanted]
IMPORT = "import"
"""The node that stands where pretraining begins in a recipe that has a `base`."""


def production(recipe: Recipe) -> Line:
    """Plan everything that a recipe asks for. Runs nothing.

    PlanError if it cannot be wired, ConfigError if its numbers cannot go together.
    """
    if recipe.parity is None:
        line = make_bundles(recipe)
    else:
        line = compare_precisions(recipe, recipe.parity)
    return wire(line | added(recipe.nodes, line))


def make_bundles(recipe: Recipe) -> Nodes:
    """From raw text to a bundle for each target, with the model judged on the way."""
    model = model_of(recipe)
    check_line(recipe, model)

    line = prepare_data(recipe) | import_base(recipe)
    first = train_model(recipe, model, begin=IMPORT if IMPORT in line else None)
    made = last(line | first, but=recipe.corpora)
    better = improve_model(recipe, model, begin=made)
    final = last(better) or made
    line |= first | better
    if recipe.evaluate is not None:
        models = recipe.evaluate.models or name_models(made, last(better))
        line |= judge_models(recipe, recipe.evaluate, models)
    if recipe.export is not None:
        line |= write_bundles(recipe, recipe.export, recipe.export.checkpoint or final)
    return line


def prepare_data(recipe: Recipe) -> Nodes:
    """The corpora, all encoded by one tokenizer: the first one's, or that of the imported model."""
    nodes: Nodes = {}
    for name, corpus in recipe.corpora.items():
        meant = settings_of(meant_data(corpus), DataConfig)
        inputs = {}
        if recipe.base is not None:
            tokenizer = TokenizerConfig(file=f"{recipe.base}/{TOKENIZER}")
            meant = meant.model_copy(update={"tokenizer": tokenizer})
        elif nodes and recipe.data.tokenizer.file is None:
            inputs = {"tokenizer": "data"}
        elif nodes:
            meant = meant.model_copy(update={"tokenizer": recipe.data.tokenizer})
        nodes[name] = Wanted(data, DataSpec(seed=recipe.seed, data=meant), inputs, name)
    return nodes


def import_base(recipe: Recipe) -> Nodes:
    """A model made elsewhere, if the recipe starts from one."""
    if recipe.base is None:
        return {}
    return {IMPORT: Wanted(imported, ImportSpec(folder=recipe.base))}


def train_model(recipe: Recipe, model: ModelConfig, *, begin: str | None) -> Nodes:
    """The phases of pretraining: each goes on from another, the first from `begin`, if anything."""
    nodes: Nodes = {}
    for name, phase in recipe.pretraining.items():
        # As asked, before what this model has no part for is left out.
        check_fp8(said_in(name), phase, model)
        check_indexer(said_in(name), phase, model)
        base = begin_of("pretrain", phase.after, recipe.pretraining) or last(nodes) or begin
        asked = settings_of(meant_pretrain(phase, model), PretrainConfig)
        before = rows_before(recipe, name)
        spec = PretrainSpec.model_validate(
            {"seed": recipe.seed, "model": model, "pretrain": asked, "rows_before": before}
        )
        inputs = given(corpus=corpus_node(phase.corpus), base=base)
        nodes[name] = Wanted(pretrain, spec, inputs, said_in(name))
    return nodes


def improve_model(recipe: Recipe, model: ModelConfig, *, begin: str | None) -> Nodes:
    """The phases of post-training: each improves another's model, the first that of `begin`."""
    nodes: Nodes = {}
    for name, phase in recipe.posttraining.items():
        # As asked, before what this model has no part for is left out.
        check_fp8(said_in(name), phase, model)
        base = begin_of("posttrain", phase.after, recipe.posttraining) or last(nodes) or begin
        meant = settings_of(meant_posttrain(phase, model), PosttrainConfig)
        spec = PosttrainSpec(seed=recipe.seed, posttrain=meant)
        inputs = given(corpus=corpus_node(phase.corpus), base=base)
        nodes[name] = Wanted(posttrain, spec, inputs, said_in(name))
    return nodes


def judge_models(recipe: Recipe, asked: EvaluateSection, models: Mapping[str, str]) -> Nodes:
    """A report on every model side by side, and whether it passes the recipe's gates, if any."""
    if not models:
        raise PlanError(
            "evaluate.models: names no model, and the line makes none; name one or more"
        )
    spec = EvaluateSpec(
        seed=recipe.seed,
        evaluate=settings_of(asked, EvaluateConfig),
        order=tuple(models),
        has_baseline=recipe.base is None
        and all(phase.corpus == asked.corpus for phase in recipe.pretraining.values()),
    )
    inputs = {"corpus": corpus_node(asked.corpus), **models}
    nodes = {"evaluate": Wanted(evaluate, spec, inputs, "evaluate.models")}
    if asked.gates:
        check_gates(asked, spec, has_problems=has_problems(recipe, asked.corpus))
        nodes["gate"] = Wanted(gate, GateSpec(gates=asked.gates), {"report": "evaluate"})
    return nodes


def write_bundles(recipe: Recipe, asked: ExportSection, checkpoint: str | None) -> Nodes:
    """A bundle of one model for each target, marked if the model did not pass the gates."""
    judged = recipe.evaluate
    corpus = asked.corpus or (judged.corpus if judged is not None else None)
    report = "gate" if judged is not None and judged.gates else None
    inputs = given(corpus=corpus_node(corpus), checkpoint=checkpoint, report=report)
    return {
        f"export.{target}": Wanted(
            export,
            ExportSpec(
                seed=recipe.seed,
                target=target,
                export=settings_of(meant_export(asked, target), ExportConfig),
            ),
            inputs,
            "export.checkpoint",
        )
        for target in asked.targets
    }


def compare_precisions(recipe: Recipe, asked: ParityConfig) -> Nodes:
    """The same model, trained twice for each seed, and how far the two losses are apart.

    Both trainings of a seed begin with the same values and read the same rows of one corpus.
    """
    assert recipe.pretrain is not None
    nodes = {"data": prepare_data(recipe)["data"]}
    runs: dict[str, str] = {}
    for seed, precision in product(asked.seeds, PRECISIONS):
        trained = recipe.pretrain.model_copy(update={"precision": precision})
        meant = settings_of(meant_pretrain(trained, recipe.model), PretrainConfig)
        spec = PretrainSpec(seed=seed, model=recipe.model, pretrain=meant)
        name = f"pretrain.{precision}.{seed}"
        nodes[name] = Wanted(pretrain, spec, {"corpus": "data"})
        runs[run_name(precision, seed)] = name
    return {**nodes, "parity": Wanted(loss_parity, ParitySpec(parity=asked), runs)}

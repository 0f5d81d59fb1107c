"""Sets what has no bearing on the result of a recipe back to its default.

Identity is made of the settings that differ from their defaults. One that means nothing for the
recipe at hand, as an indexer's for a model without one, would rebuild hours of training all the
same; so plans are made of settings that went through here. Values that mean the same become equal.
"""

from typing import Any, TypeVar

from configs.base import Frozen
from configs.data import SLIP_STEPS, ArithmeticSource, DataConfig, Source, TextSource
from configs.delivery import VARIANTS, ExportConfig, Target
from configs.model import ModelConfig
from configs.rl import PosttrainConfig
from configs.train import Fp8Config, IndexerConfig, OptimConfig, PretrainConfig

ConfigT = TypeVar("ConfigT", bound=Frozen)
OptimT = TypeVar("OptimT", bound=OptimConfig)

_OF_ONE_TARGET: dict[Target, tuple[str, ...]] = {
    "cuda": ("fp8_scales",),
    "ascend": ("calibration_rows", "smooth", "rotate", "mindie"),
}
"""Settings of `[export]` that mean nothing for the other target."""


def meant_data(data: DataConfig) -> DataConfig:
    """Without rules for text where there is none, and sums' settings as they are met."""
    sources = {name: _meant_source(source) for name, source in data.sources.items()}
    data = data.model_copy(update={"sources": sources})
    if not any(isinstance(source, TextSource) for source in sources.values()):
        data = reset(data, "quality", "held_out_share")
    return data


def meant_pretrain(pretrain: PretrainConfig, model: ModelConfig) -> PretrainConfig:
    """Without what concerns parts that the model does not have, or a precision not asked for."""
    idle = []
    if not model.has_indexer:
        idle.append("indexer")
    if not model.num_nextn_predict_layers:
        idle.append("mtp_loss_weight")
    if not pretrain.decay_share:
        idle.append("final_learning_rate_share")
    if not pretrain.evaluate_every_steps:
        idle.append("evaluate_rows")
    update = {
        "evaluate_every_steps": _meant_interval(pretrain),
        "fp8": _meant_fp8(pretrain.fp8, model, is_used=pretrain.precision == "fp8"),
        "optim": _meant_optim(pretrain.optim, model),
        "indexer": _meant_indexer(pretrain.indexer),
    }
    return reset(pretrain.model_copy(update=update), *idle)


def meant_posttrain(posttrain: PosttrainConfig, model: ModelConfig) -> PosttrainConfig:
    """As `meant_pretrain`, and without how held-out problems are asked if none are."""
    update = {
        "evaluate_every_steps": _meant_interval(posttrain),
        "fp8": _meant_fp8(posttrain.fp8, model, is_used=posttrain.precision == "fp8"),
        "optim": _meant_optim(posttrain.optim, model),
    }
    posttrain = posttrain.model_copy(update=update)
    if not posttrain.evaluate_problems:
        posttrain = reset(posttrain, "evaluate_every_steps", "evaluate_samples_per_problem")
    return posttrain


def meant_export(export: ExportConfig, target: Target) -> ExportConfig:
    """With what concerns this target alone, and without how problems are asked if none are."""
    own, usual = VARIANTS[target], ExportConfig().variants
    variants = tuple(one for one in export.variants if one in own)
    if set(variants) == own.intersection(usual):
        variants = usual
    export = export.model_copy(update={"variants": variants})
    for other, names in _OF_ONE_TARGET.items():
        if other != target:
            export = reset(export, *names)
    if not export.problems:
        export = reset(export, "samples_per_problem", "max_new_tokens", "max_accuracy_loss")
    return export


def reset(config: ConfigT, *names: str) -> ConfigT:
    """The same config with these fields at their defaults."""
    fields = type(config).model_fields
    return config.model_copy(
        update={name: fields[name].get_default(call_default_factory=True) for name in names}
    )


def _meant_interval(train: PretrainConfig | PosttrainConfig) -> int:
    """`evaluate_every_steps`; past the last step all numbers mean before the first and after it."""
    if train.evaluate_every_steps < train.steps:
        return train.evaluate_every_steps
    default: int = type(train).model_fields["evaluate_every_steps"].default
    return max(default, train.steps)


def _meant_source(source: Source) -> Source:
    if not isinstance(source, ArithmeticSource):
        return source
    update: dict[str, Any] = {
        # Slips are spread over so many documents of each problem.
        "slip_share": round(SLIP_STEPS * source.slip_share) / SLIP_STEPS
    }
    bound = 10**source.digits
    largest = max(bound * (bound + 1) // 2 if one == "-" else bound**2 for one in source.operations)
    enough = largest * len(source.operations)
    if source.max_problems >= enough:
        # All there are, whatever the number.
        default = type(source).model_fields["max_problems"].default
        update["max_problems"] = max(default, enough)
    return source.model_copy(update=update)


def _meant_fp8(fp8: Fp8Config, model: ModelConfig, *, is_used: bool) -> Fp8Config:
    if not is_used:
        return Fp8Config()
    products = {
        name
        for name, value in fp8.model_dump().items()
        if value in ("fp8", "high") and name not in model.parts
    }
    return reset(fp8, *products)


def _meant_indexer(indexer: IndexerConfig) -> IndexerConfig:
    """Without the rate of a phase that has no steps."""
    return indexer if indexer.dense_steps else reset(indexer, "dense_learning_rate")


def _meant_optim(optim: OptimT, model: ModelConfig) -> OptimT:
    return optim if model.engram is not None else reset(optim, "table_rate_factor")

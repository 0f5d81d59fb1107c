"""Which variants a target has, and what each needs to know of the model before it is written."""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

from configs.delivery import ExportConfig, ExportSpec, Target
from configs.errors import ExportError
from configs.model import ModelConfig, V4Config
from configs.shape import FP8_BLOCK
from model.transformer import Transformer
from model.weights.files import load_state
from model.weights.table import ScaleType
from stages.artifacts import Corpus
from stages.export.ascend import Integers
from stages.export.calibration import Range, calibration_rows, measure, of_weight
from stages.export.cuda import Fp4Experts, Fp8Blocks
from stages.export.formats import Bf16, Format
from stages.export.layouts import misfit
from stages.export.rotation import RotatedFolder
from stages.export.smoothing import smoothed
from stages.export.tensors import Reading, TensorFolder

_USUAL = ExportConfig()


def formats(
    target: Target, model: ModelConfig, config: ExportConfig = _USUAL
) -> tuple[Format, ...]:
    """The variants that a bundle for `target` holds, of those asked for.

    ExportError if FP8 is among them and servers would read this model's wrongly, if the model has
    no such variant, or if none is asked for.
    """
    if (fault := misfit(model, config, target)) is not None:
        raise ExportError(fault)
    makers: dict[str, Callable[[], Format]] = {"bf16": lambda: Bf16(model)}
    if target == "cuda":
        makers["fp8"] = lambda: Fp8Blocks(model, scales=_scales(model, config))
        makers["fp4"] = lambda: Fp4Experts(model)
    else:
        makers["w8a8"] = lambda: Integers(model, mindie=config.mindie)
        makers["w4a8"] = lambda: Integers(model, "w4a8", mindie=config.mindie)
    forms = tuple(make() for variant, make in makers.items() if variant in config.variants)
    if not forms:
        raise ExportError(
            f"export.variants = {sorted(config.variants)}: none of them is one for {target}, which "
            f"has {', '.join(makers)}; name one of these"
        )
    in_blocks = [form for form in forms if isinstance(form, Fp8Blocks)]
    if in_blocks and (ragged := model.ragged_rows):
        shown = ", ".join(f"{name} = {rows}" for name, rows in ragged.items())
        raise ExportError(
            f"export.variants asks for {in_blocks[0].variant}, but of this model {shown} is no "
            f"multiple of {FP8_BLOCK}: servers load matrices of so many rows into one with those "
            "that follow, and would scale rows by another block's scale without a word; leave it "
            'out (export.variants = ["bf16", "w8a8"]), or train a model of other sizes'
        )
    return forms


def _scales(model: ModelConfig, config: ExportConfig) -> ScaleType | None:
    """Of FP8 blocks, if they are not to be the family's own, which V4's are always."""
    if config.fp8_scales is None or isinstance(model, V4Config):
        return None
    return "float32" if config.fp8_scales == "float32" else "powers"


class Preparation:
    """What is done to a model before a variant of it is written: nothing, but for integers.

    Their streams are rotated, their activations measured and their channels smoothed as the recipe
    asks. What several variants need is computed once.
    """

    def __init__(
        self, config: ExportSpec, corpus: Corpus, source: TensorFolder, reference: Transformer
    ) -> None:
        """`reference` is the model in `source`."""
        self._spec, self._corpus, self._reference = config, corpus, reference
        self._plain, self._asked = source, config.export

    def of(self, form: Format) -> tuple[Format, TensorFolder]:
        """The variant that knows its activations, and the weights that it is to hold."""
        if not isinstance(form, Integers):
            return form, self._plain
        form, source = replace(form, model=self._model), self._source
        measured = bool(self._asked.smooth or form.calibrated(source.names))
        if not self._asked.calibration_rows or not measured:
            return form, source
        ranges = self._ranges
        if self._asked.smooth:
            source, ranges = smoothed(source, form, ranges)
        known = {name: of_weight(ranges, name).whole for name in form.calibrated(source.names)}
        return replace(form, ranges=known), source

    @property
    def _model(self) -> ModelConfig:
        model = self._reference.config
        return without_mtp(model) if self._asked.rotate else model

    @cached_property
    def _source(self) -> TensorFolder:
        """The weights that all integer variants begin with."""
        if not self._asked.rotate:
            return self._plain
        folder, model = self._plain.folder, self._reference.config
        return RotatedFolder(folder, model, seed=self._spec.seed)

    @cached_property
    def _ranges(self) -> dict[str, Range]:
        """What the activations of the model in `_source` come to."""
        model = self._reference
        if self._asked.rotate:
            model = read_model(self._source, self._model, model)
        count, seed = self._asked.calibration_rows, self._spec.seed
        return measure(model, calibration_rows(self._corpus, count, seed=seed))


def read_model(source: TensorFolder, config: ModelConfig, like: Transformer) -> Transformer:
    """The float32 model in `source`, on the device of `like`; one tensor is read at a time."""
    model = Transformer(config).to(next(like.parameters()).device)
    load_state(model, Reading(source.names, source.read))
    return model.eval()


def without_mtp(model: ModelConfig) -> ModelConfig:
    """The same model without its MTP layer."""
    return type(model).model_validate({**dict(model), "num_nextn_predict_layers": 0})

"""What is measured, and what is shipped."""

import math
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from configs.base import Frozen
from configs.names import ModelName, NodeName, Word

Target = Literal["cuda", "ascend"]
Variant = Literal["bf16", "fp8", "fp4", "w8a8", "w4a8"]
VARIANTS: dict[Target, frozenset[Variant]] = {
    "cuda": frozenset({"bf16", "fp8", "fp4"}),
    "ascend": frozenset({"bf16", "w8a8", "w4a8"}),
}
"""Of each target."""


class EvaluateConfig(Frozen):
    """Held-out problems and text to judge a model on."""

    problems: PositiveInt = 300
    samples_per_problem: PositiveInt = 8
    """Sampled answers; one more is given greedily."""
    pass_at: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    """Report the chance that one of k samples is right, for each k; the order means nothing. That
    all samples of a problem are right is reported too."""
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: PositiveInt = 16
    max_held_out_tokens: PositiveInt = 100_000
    """Held-out tokens to score for each source."""

    @field_validator("pass_at")
    @classmethod
    def _in_rising_order(cls, ks: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(sorted(set(ks)))

    @model_validator(mode="after")
    def _samples_suffice(self) -> Self:
        if max(self.pass_at) > self.samples_per_problem:
            raise ValueError(
                f"pass_at asks for pass@{max(self.pass_at)} but samples_per_problem = "
                f"{self.samples_per_problem}; raise samples_per_problem"
            )
        return self


class ExportConfig(Frozen):
    """Bundles to write and how closely each must reproduce its source."""

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"targets"})
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("cuda", "ascend")
    parity_prompts: PositiveInt = 64
    """Held-out rows, fixed by the seed, on which a reloaded bundle is compared with its source."""
    min_top1_agreement: float = Field(default=0.9, ge=0, le=1)
    """Positions where source and quantised bundle agree on the likeliest next token."""
    max_kl_nats: float = Field(default=0.05, gt=0)
    """Mean KL(source || bundle) per position."""
    max_bits_per_byte_rise: float = Field(default=0.01, gt=0)
    """How many more bits per byte of held-out text a bundle may need than its source, as a share of
    what the source needs. A hundredth is what vendors of INT8 conversions take for no loss."""
    min_greedy_agreement: float = Field(default=0.5, ge=0, le=1)
    """Share of tokens that source and bundle both take where each goes on by itself, greedily, from
    openings of held-out texts, up to the first that differs. A near tie that rounding turns ends
    that text's agreement, so this is far below `min_top1_agreement`."""
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("bf16", "fp8", "w8a8")
    """Which of a target's variants to write; the order means nothing. `fp8` and `fp4` (V4 with its
    experts in FP4, as released) are cuda's alone, `w8a8` and `w4a8` (experts in INT4) ascend's."""
    fp8_scales: Literal["float32", "ue8m0"] | None = None
    """Of FP8 blocks: any float32, or powers of two in float32. None is what released models of V3
    and V3.2 have. V4's `fp8` has powers of two always, and its `fp4` has them in E8M0, as
    released."""
    calibration_rows: NonNegativeInt = 64
    """Rows of training text on which activations are measured, for the scales that ascend's
    integer variants fix; 0 has all of them scaled token by token."""
    smooth: bool = False
    """Whether ascend's integer variants carry outlying channels of activations over into weights
    first."""
    rotate: bool = False
    """Whether ascend's integer variants have their residual streams turned first, so that no
    channel stands out; they are without the MTP layer then."""
    mindie: bool = False
    """Whether ascend's config.json has the keys `quantize` and `mla_quantize`, which MindIE reads.
    `model_type` stays what other programs know."""
    problems: NonNegativeInt = 200
    """Held-out problems that each variant is asked through its own tokenizer, chat template and
    generation config; 0 asks none."""
    samples_per_problem: PositiveInt = 4
    """Answers sampled as the variant's generation config says; one more is given greedily."""
    max_new_tokens: PositiveInt = 16
    max_accuracy_loss: float = Field(default=0.05, ge=0, le=1)
    """Share of problems, rounded up to whole ones, by which a variant's greedy answers may be right
    less often than its source's."""
    max_shard_bytes: PositiveInt = 4_000_000_000

    @field_validator("variants")
    @classmethod
    def _each_once(cls, variants: tuple[Variant, ...]) -> tuple[Variant, ...]:
        return tuple(sorted(set(variants)))

    @model_validator(mode="after")
    def _smoothing_knows_activations(self) -> Self:
        if self.smooth and not self.calibration_rows:
            raise ValueError(
                "smooth = true, but calibration_rows = 0: which channels stand out is measured on "
                "them; raise calibration_rows, or leave smooth out"
            )
        return self


class Gate(Frozen):
    """What a figure must come to."""

    at_least: float | None = None
    at_most: float | None = None

    @model_validator(mode="after")
    def _bounds_leave_room(self) -> Self:
        if self.at_least is None and self.at_most is None:
            raise ValueError("a gate without at_least or at_most asks for nothing; give it one")
        low, high = self.at_least, self.at_most
        if low is not None and high is not None and low > high:
            raise ValueError(
                f"at_least = {low} is above at_most = {high}, which no figure meets; exchange them"
            )
        return self

    def __str__(self) -> str:
        """As a recipe's reader says it."""
        bounds = (("at least", self.at_least), ("at most", self.at_most))
        return " and ".join(f"{words} {bound}" for words, bound in bounds if bound is not None)

    def admits(self, value: float) -> bool:
        """Whether a figure of this value passes; one that is no number does not."""
        low = -math.inf if self.at_least is None else self.at_least
        high = math.inf if self.at_most is None else self.at_most
        return low <= value <= high


class EvaluateSection(EvaluateConfig):
    """`[evaluate]`: which models are judged, on what, and what they must come to."""

    models: dict[ModelName, NodeName] = Field(default_factory=dict)
    """Models by the name that their figures bear, each the node that makes it; all others are
    compared with the first. Empty means `before` and `after` post-training, or `model` without
    it."""
    corpus: Word | None = None
    """Whose held-out text and problems are asked, of `data.corpora`; none is the node `data`."""
    gates: dict[str, Gate] = Field(default_factory=dict)
    """What figures must come to. A bundle whose model falls short is written and marked, and given
    no alias."""


class ExportSection(ExportConfig):
    """`[export]`: which model is delivered, and what it is compared on."""

    checkpoint: NodeName | None = None
    """The node that makes the model; none is the last of the line."""
    corpus: Word | None = None
    """Whose held-out rows and problems prove a bundle, of `data.corpora`; none is that of
    `evaluate`."""


class EvaluateSpec(Frozen):
    """The evaluate stage's whole config."""

    seed: int
    evaluate: EvaluateConfig
    order: tuple[str, ...] = ()
    """Names of the models, the one first that all others are compared with; empty means by name."""
    has_baseline: bool = True
    """Whether the corpus is the one that the first model was pretrained on."""


class GateSpec(Frozen):
    """The gate stage's whole config."""

    gates: dict[str, Gate]


class ExportSpec(Frozen):
    """The export stage's whole config, for one target."""

    seed: int
    target: Target
    export: ExportConfig

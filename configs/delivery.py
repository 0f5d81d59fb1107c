"""What is measured, and what is shipped."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, field_validator, model_validator

from configs.base import Frozen

Target = Literal["cuda", "ascend"]
Variant = Literal["bf16", "fp8", "w8a8"]


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
    variants: Annotated[tuple[Variant, ...], Field(min_length=1)] = ("bf16", "fp8", "w8a8")
    """Which of a target's variants to write; the order means nothing. `fp8` is one of cuda's alone,
    `w8a8` one of ascend's."""
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


class EvaluateSpec(Frozen):
    """The evaluate stage's whole config."""

    seed: int
    evaluate: EvaluateConfig


class ExportSpec(Frozen):
    """The export stage's whole config, for one target."""

    seed: int
    target: Target
    export: ExportConfig

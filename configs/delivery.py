"""What is measured, and what is shipped."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from configs.base import Frozen

Target = Literal["cuda", "ascend"]


class EvaluateConfig(Frozen):
    """Held-out problems and text to judge a model on."""

    problems: PositiveInt = 300
    samples_per_problem: PositiveInt = 8
    pass_at: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1, 8)
    temperature: float = Field(default=1.0, ge=0)
    max_new_tokens: PositiveInt = 16
    max_held_out_tokens: PositiveInt = 100_000
    """Held-out tokens to score for each source."""

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
    max_shard_bytes: PositiveInt = 4_000_000_000


class EvaluateSpec(Frozen):
    """The evaluate stage's whole config."""

    seed: int
    evaluate: EvaluateConfig


class ExportSpec(Frozen):
    """The export stage's whole config, for one target."""

    seed: int
    target: Target
    export: ExportConfig

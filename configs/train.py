"""How the model is pretrained."""

from typing import Annotated, ClassVar, Literal, Protocol, Self

from pydantic import Field, PositiveInt, model_validator

from configs.base import Frozen
from configs.errors import ConfigError
from configs.model import AnyModelConfig, ModelConfig
from configs.names import NodeName, Word

Precision = Literal["fp8", "high"]
"""`fp8`: block-scaled E4M3 where `Fp8Config` says so; `high`: the backend's own dtype."""

Fp8Backend = Literal["auto", "reference", "cpu", "cublas", "triton"]
"""Who computes in FP8; `auto` takes the fastest that the device has."""


class Fp8Config(Frozen):
    """What `precision = "fp8"` means, part by part; defaults are DeepSeek-V3's (section 3.3).

    Every part that is a matrix product may be moved to the other side. What is none has no FP8
    form, and its entry is there to say so.
    """

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"telemetry_every_steps"})

    attention: Precision = "fp8"
    """Projections into and out of attention."""
    indexer: Precision = "fp8"
    """Queries and keys of a sparse attention's indexer; its heads' weights stay high."""
    dense_ffn: Precision = "fp8"
    shared_experts: Precision = "fp8"
    routed_experts: Precision = "fp8"
    gate: Precision = "high"
    """Scores of the routed experts."""
    head: Precision = "high"
    """Logits."""
    mtp_projection: Precision = "high"
    """What joins a state and the next token's embedding for the MTP layer."""
    compressor: Precision = "high"
    """Keys, values and weights of V4's pooled entries."""
    engram: Precision = "high"
    """Keys and values of a memory's rows."""
    embedding: Literal["high"] = "high"
    norms: Literal["high"] = "high"
    attention_operator: Literal["high"] = "high"
    loss: Literal["high"] = "high"

    fp4_experts: bool = False
    """Quantisation-aware training for FP4: the routed experts' weights are rounded to MXFP4, which
    FP8 holds without loss, and their gradients pass to the float32 weights as they are (V4)."""
    scaling: Literal["tile", "tensor"] = "tile"
    """One scale for each tile, or, to see why not, for each tensor."""
    gradient_scaling: Literal["tile", "block"] = "tile"
    """Tiles of activation gradients: 1 x 128, or, to see why not, 128 x 128 (V3, appendix B.2)."""
    telemetry_every_steps: PositiveInt = 20
    """How often clipped and flushed values and scales are counted; the first step always is."""

    @model_validator(mode="after")
    def _fp4_has_experts(self) -> Self:
        if self.fp4_experts and self.routed_experts == "high":
            raise ValueError(
                'fp4_experts = true, but routed_experts = "high": FP4 weights are multiplied in '
                'FP8; set routed_experts = "fp8", or drop fp4_experts'
            )
        if self.fp4_experts and self.scaling == "tensor":
            raise ValueError(
                'fp4_experts = true, but scaling = "tensor": FP4 weights keep their blocks of 32; '
                'set scaling = "tile", or drop fp4_experts'
            )
        return self

    @property
    def asked(self) -> frozenset[str]:
        """The parts that are to be FP8, whether or not a model has them."""
        return frozenset(part for part, value in self.model_dump().items() if value == "fp8")

    @property
    def coarse(self) -> str | None:
        """The setting that asks for coarser scales than FP8's own kernels have, if any."""
        if self.scaling == "tensor":
            return 'scaling = "tensor"'
        return 'gradient_scaling = "block"' if self.gradient_scaling == "block" else None

    def counts_at(self, step: int) -> bool:
        """Whether what FP8 does to tensors is counted at `step`, the first of which is 1."""
        return step == 1 or step % self.telemetry_every_steps == 0


class OptimConfig(Frozen):
    """AdamW with clipping; defaults are DeepSeek-V3's (section 4.2)."""

    learning_rate: float = Field(default=2.2e-4, gt=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    moments: Literal["bfloat16", "float32"] = "bfloat16"
    """Type in which AdamW keeps its moments (DeepSeek-V3, section 3.3.3)."""
    table_rate_factor: float = Field(default=5.0, gt=0)
    """Tables of n-grams learn at this many times the rate, and do not decay (arXiv 2601.07372)."""

    @model_validator(mode="after")
    def _moments_can_move(self) -> Self:
        # bfloat16 keeps 8 bits: an average that moves by less than half a step of it, 2^-8 of its
        # value at most, stands still, however long it is pulled. beta = 0.95 can be 8 % off so.
        slowest = max(self.beta1, self.beta2)
        if self.moments == "bfloat16" and slowest > 1 - 2**-6:
            name = "beta2" if slowest == self.beta2 else "beta1"
            raise ValueError(
                f"{name} = {slowest} with moments = 'bfloat16': so slow an average moves by less "
                f"than bfloat16 can hold, and may stay {2**-8 / (1 - slowest):.0%} wrong for ever; "
                f"set moments = 'float32' beside it, or {name} to {1 - 2**-6} or less"
            )
        return self


class BalanceConfig(Frozen):
    """Auxiliary-loss-free balancing and the sequence-wise loss beside it (section 4.2)."""

    bias_update_speed: float = Field(default=1e-3, ge=0)
    """gamma: how far the routing bias of an over- or underloaded expert moves after a step."""
    sequence_loss_weight: float = Field(default=1e-4, ge=0)
    """alpha of the sequence-wise balance loss."""


class IndexerConfig(Frozen):
    """How the indexer of sparse attention is trained (DeepSeek-V3.2-Exp, section 2.1).

    It learns from a loss of its own, which no other parameter receives a gradient from. Families
    without an indexer have no use for any of this.
    """

    dense_steps: int = Field(default=1000, ge=0)
    """First steps, in which attention is dense and the indexer learns its whole distribution; after
    them attention keeps to what the indexer picks, and it learns the distribution over that."""
    loss_weight: float = Field(default=1.0, gt=0)
    """Of the divergences, each a mean over queries, summed over the layers that have an indexer."""
    dense_learning_rate: float = Field(default=1e-3, gt=0)
    """Of the indexer in the first `dense_steps`; the model's schedule does not touch it, nor does
    the model's gradient in clipping."""
    sparse_learning_rate: float = Field(default=7.3e-6, gt=0)
    """Of the indexer after them: that of the whole model there, which was trained already. One that
    is still learning moves its attention away from so slow an indexer."""

    def learning_rate(self, step: int) -> float:
        """The indexer's rate at `step`, the first of which is 1."""
        return self.dense_learning_rate if step <= self.dense_steps else self.sparse_learning_rate


class PretrainConfig(Frozen):
    """Steps, batch, schedule and numerics of pretraining."""

    # How often held-out text is measured, and how much, bears on no weight. It is part of identity
    # all the same, because the figures are part of the artifact, in its `history.json`.
    provenance_fields: ClassVar[frozenset[str]] = frozenset({"checkpoint_every_steps"})

    steps: PositiveInt
    batch_sequences: PositiveInt = 16
    """Sequences a step, over all workers."""
    warmup_steps: int = Field(default=20, ge=0)
    decay_share: Annotated[float, Field(ge=0, le=1)] = 0.3
    """Last part of the steps, over which the learning rate falls to `final_learning_rate_share`."""
    final_learning_rate_share: Annotated[float, Field(ge=0, le=1)] = 0.1
    optim: OptimConfig = OptimConfig()
    balance: BalanceConfig = BalanceConfig()
    indexer: IndexerConfig = IndexerConfig()
    mtp_loss_weight: float = Field(default=0.3, ge=0)
    """lambda of the multi-token-prediction loss."""
    attend_across_documents: bool = False
    """DeepSeek packs without a mask between documents; small models learn faster with one."""
    precision: Precision = "fp8"
    fp8: Fp8Config = Fp8Config()
    checkpoint_every_steps: PositiveInt = 100
    evaluate_every_steps: int = Field(default=100, ge=0)
    """How often the loss on held-out text is measured, besides before the first step and after the
    last; 0 is never."""
    evaluate_rows: PositiveInt = 32
    """Held-out rows of each source that a measurement reads, always the same; all if it has
    fewer."""

    @model_validator(mode="after")
    def _warmup_fits(self) -> Self:
        if self.warmup_steps >= self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps} leaves nothing of steps = {self.steps}; "
                "lower warmup_steps"
            )
        return self


class PretrainPhase(PretrainConfig):
    """One phase of pretraining, and where it stands in the line."""

    corpus: Word | None = None
    """Which of `data.corpora` it reads; none is the node `data`."""
    after: NodeName | None = None
    """The phase, or the node, whose weights it begins with. None means the phase that stands before
    it; the first begins with values drawn anew, or with the imported model."""


class PretrainSection(PretrainPhase):
    """`[pretrain]`: the node `pretrain`; or, if phases are named, one node each.

    `[pretrain.phases.long]` is the node `pretrain.long`. A phase has this section's settings where
    it says nothing else.
    """

    phases: dict[Word, PretrainPhase] = Field(default_factory=dict)


class PretrainSpec(Frozen):
    """The pretrain stage's whole config."""

    seed: int
    model: AnyModelConfig
    pretrain: PretrainConfig
    rows_before: int = Field(default=0, ge=0)
    """Training rows of its corpus that the phases before it consumed: it goes on after them."""


class _Trained(Protocol):
    @property
    def precision(self) -> Precision:
        """Of the products."""

    @property
    def fp8(self) -> Fp8Config:
        """What `precision = "fp8"` means."""


def check_fp8(where: str, trained: _Trained, model: ModelConfig) -> None:
    """ConfigError unless the table of parts `where`.fp8 is about the parts that `model` has."""
    if trained.precision != "fp8":
        return
    there = ", ".join(sorted(model.parts))
    for part in sorted(trained.fp8.asked - Fp8Config().asked - model.parts):
        raise ConfigError(
            f'{where}.fp8.{part} = "fp8", but this model has no such part; drop it (it has {there})'
        )
    if not trained.fp8.asked & model.parts:
        raise ConfigError(
            f'{where}.precision = "fp8", but {where}.fp8 sets every part of this model to "high"; '
            f'set {where}.precision = "high", or one of {there} to "fp8"'
        )


def check_indexer(where: str, trained: PretrainConfig, model: ModelConfig) -> None:
    """ConfigError if no step of `where` is left in which attention is sparse."""
    dense_steps, steps = trained.indexer.dense_steps, trained.steps
    if model.has_indexer and dense_steps >= steps:
        raise ConfigError(
            f"{where}.indexer.dense_steps = {dense_steps} leaves none of {where}.steps = {steps} "
            "in which attention is as sparse as it is when the model is used; lower the first"
        )

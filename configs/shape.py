"""What every family of models has in common: its outer dimensions, YaRN, and the counting."""

import math
from abc import abstractmethod
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from configs.base import Frozen
from configs.engram import EngramConfig

Family = Literal["v3", "v32", "v4"]
ScoreFunction = Literal["sigmoid", "sqrt_softplus"]
FP8_BLOCK = 128
"""Rows, and columns, that one scale of an FP8 weight is for."""


class YarnConfig(Frozen):
    """Rotary frequencies stretched for contexts longer than those trained on (YaRN).

    Field names and meaning are those of `rope_scaling` in the released `config.json`.
    """

    factor: float = Field(default=40.0, gt=1)
    original_max_position_embeddings: PositiveInt = 4096
    beta_fast: float = Field(default=32.0, gt=0)
    beta_slow: float = Field(default=1.0, gt=0)
    mscale: float = Field(default=1.0, ge=0)
    mscale_all_dim: float = Field(default=1.0, ge=0)
    """Where it is not 0, the softmax scale carries (0.1 * this * ln(factor) + 1)^2."""

    @model_validator(mode="after")
    def _betas_ordered(self) -> Self:
        if self.beta_fast <= self.beta_slow:
            raise ValueError(
                f"beta_fast = {self.beta_fast} must exceed beta_slow = {self.beta_slow}; "
                "exchange them"
            )
        return self


class ModelConfig(Frozen):
    """A decoder of mixed experts, whichever its attention. Use a family's own class."""

    family: Family
    vocab_size: PositiveInt
    hidden_size: PositiveInt
    num_hidden_layers: PositiveInt
    num_attention_heads: PositiveInt
    qk_rope_head_dim: PositiveInt
    moe_intermediate_size: PositiveInt
    n_routed_experts: PositiveInt
    n_shared_experts: PositiveInt
    num_experts_per_tok: PositiveInt
    routed_scaling_factor: float = Field(gt=0)
    norm_topk_prob: bool = True
    num_nextn_predict_layers: Literal[0, 1] = 1
    """Multi-token-prediction layers after the last one."""
    max_position_embeddings: PositiveInt
    rope_theta: float = Field(default=10000.0, gt=0)
    rope_scaling: YarnConfig | None = None
    rms_norm_eps: float = Field(default=1e-6, gt=0)
    initializer_range: float = Field(default=0.006, gt=0)
    engram: EngramConfig | None = None
    """Conditional memory looked up by n-grams; none of the released models of these families has
    it."""

    @model_validator(mode="after")
    def _common_numbers_agree(self) -> Self:
        if self.qk_rope_head_dim % 2:
            raise ValueError(
                f"qk_rope_head_dim = {self.qk_rope_head_dim} is odd; rotary pairs need an even one"
            )
        if self.num_experts_per_tok > self.n_routed_experts:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok} exceeds n_routed_experts = "
                f"{self.n_routed_experts}; lower the first"
            )
        if self.engram and (beyond := [i for i in self.engram.layer_ids if i >= self.depth]):
            raise ValueError(
                f"engram.layer_ids holds {beyond[0]}, but num_hidden_layers = {self.depth}; "
                "layers are numbered from 0"
            )
        if self.engram and self.engram.pad_id >= self.vocab_size:
            raise ValueError(
                f"engram.pad_id = {self.engram.pad_id} is not below vocab_size = "
                f"{self.vocab_size}; name a token of the vocabulary"
            )
        return self

    @property
    def depth(self) -> int:
        """Decoder layers of the main model."""
        return self.num_hidden_layers

    @property
    def streams(self) -> int:
        """Residual streams; 1 unless the family has hyper-connections."""
        return 1

    @property
    def score_function(self) -> ScoreFunction:
        """What makes an expert's score of its logit."""
        return "sigmoid"

    @property
    def routing_groups(self) -> tuple[int, int]:
        """(groups of experts, groups that one token's experts may come from)."""
        return 1, 1

    @property
    def activation_limit(self) -> float | None:
        """What gate and up are clamped to in front of an expert's activation, if anything."""
        return None

    @property
    def has_indexer(self) -> bool:
        """Whether some layer attends to what an indexer picks."""
        return False

    @property
    def parts(self) -> frozenset[str]:
        """The kinds of matrix products that such a model has, as `Fp8Config` names them."""
        layers = range(self.depth + self.num_nextn_predict_layers)
        routed = [self.has_experts(layer) for layer in layers]
        there = {
            "attention": True,
            "indexer": self.has_indexer,
            "dense_ffn": not all(routed),
            "shared_experts": any(routed),
            "routed_experts": any(routed),
            "gate": any(routed),
            "head": True,
            "mtp_projection": self.num_nextn_predict_layers > 0,
            "compressor": False,
            "engram": self.engram is not None,
        }
        return frozenset(part for part, is_there in there.items() if is_there)

    @property
    def fused_rows(self) -> dict[str, int]:
        """Rows of the matrices that servers put on top of others into one, by what gives them.

        Each brings its own scales, one for each 128 rows, and servers find a row's scale by its
        number in the whole. Where one of these is no multiple of 128 (`ragged_rows`), the rows
        after it get another block's scale.
        """
        layers = range(self.depth + self.num_nextn_predict_layers)
        if not any(map(self.has_experts, layers)):
            return {}
        inner, shared = self.moe_intermediate_size, self.n_shared_experts
        rows = {"moe_intermediate_size": inner}
        if shared > 1:
            rows["n_shared_experts * moe_intermediate_size"] = shared * inner
        return rows

    @property
    def ragged_rows(self) -> dict[str, int]:
        """Those of `fused_rows` for which FP8 would be wrong in servers; empty if it is right."""
        return {name: rows for name, rows in self.fused_rows.items() if rows % FP8_BLOCK}

    @abstractmethod
    def has_experts(self, layer: int) -> bool:
        """Whether `layer` routes to experts; the MTP layer is number `num_hidden_layers`."""

    def routes_by_hash(self, layer: int) -> bool:
        """Whether `layer` takes its experts from a table by token instead of by score."""
        return False

    @property
    def num_moe_layers(self) -> int:
        """Decoder layers with experts, without the MTP layer."""
        return sum(self.has_experts(layer) for layer in range(self.depth))

    def parameters(self, *, active: bool = False) -> int:
        """Weights of the main model (no MTP layer), routing biases and hash tables included.

        With `active`, only what one token visits is counted.
        """
        layers = sum(self.layer_parameters(layer, active=active) for layer in range(self.depth))
        return layers + self._outer_parameters()

    @abstractmethod
    def layer_parameters(self, layer: int, *, active: bool = False) -> int:
        """Weights of one decoder layer, the engram in front of it included."""

    def training_flops_per_token(self, context_tokens: int) -> float:
        """Floating-point operations of one training step, per token: the model's, whatever else
        an implementation computes.

        2 a product forward and 4 backward. Each active weight multiplies once (the input embedding
        is a look-up), and attention multiplies in rows of `context_tokens` tokens, one document
        each.
        """
        weights = self.parameters(active=True) - self.hidden_size * self.vocab_size
        layers = self.depth
        if self.num_nextn_predict_layers:
            weights += self.layer_parameters(layers, active=True)
            # The head once more, and the joint of the states with the next token's embedding.
            joint = (self.streams + 1) * self.hidden_size**2
            weights += self.hidden_size * self.vocab_size + joint
            layers += 1
        attention = sum(self.attention_products(layer, context_tokens) for layer in range(layers))
        return 6.0 * (weights + attention)

    @abstractmethod
    def attention_products(self, layer: int, context_tokens: int) -> float:
        """Multiplications that attention of one layer does for a token beside those by weights,
        in the mean over a row of `context_tokens` tokens."""

    def _outer_parameters(self) -> int:
        """Embedding, final norm and head."""
        return self.hidden_size * (2 * self.vocab_size + 1)

    def _engram_parameters(self, layer: int, *, active: bool) -> int:
        if self.engram is None or layer not in self.engram.layer_ids:
            return 0
        return self.engram.parameters(layer, self.hidden_size, self.streams, active=active)

    def _expert_parameters(self, *, active: bool) -> int:
        """Gate weights, routed and shared experts of one layer, without biases or tables."""
        width = self.hidden_size
        routed = self.num_experts_per_tok if active else self.n_routed_experts
        expert = 3 * width * self.moe_intermediate_size
        return self.n_routed_experts * width + expert * (routed + self.n_shared_experts)


def mean_keys(keys: float, most: float = math.inf) -> float:
    """How many of so many keys a causal query sees in the mean, if it looks at the `most` at most
    of those that stand before it."""
    return keys / 2 if keys <= most else most - most * most / (2 * keys)

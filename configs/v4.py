"""DeepSeek-V4: attention over compressed keys and values, hyper-connections, hash routing."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from configs.shape import ModelConfig, ScoreFunction, YarnConfig, mean_keys

AttentionKind = Literal["window", "csa", "hca"]


class V4Config(ModelConfig):
    """A DeepSeek-V4 shaped transformer (arXiv 2606.19348).

    Field names are those of the released `config.json`. Defaults are V4-Flash's.
    """

    family: Literal["v4"]
    vocab_size: PositiveInt = 129280
    hidden_size: PositiveInt = 4096
    num_hidden_layers: PositiveInt = 43
    num_attention_heads: PositiveInt = 64
    head_dim: PositiveInt = 512
    """Width of a head, and of the one vector that is key and value of all heads."""
    qk_rope_head_dim: PositiveInt = 64
    """The last dims of a head, which rotate."""
    q_lora_rank: PositiveInt = 1024
    o_groups: PositiveInt = 8
    o_lora_rank: PositiveInt = 1024
    sliding_window: PositiveInt = 128
    compress_ratios: tuple[NonNegativeInt, ...] = (0, 0, *(4, 128) * 20, 4)
    """Tokens a compressed entry stands for, by layer: 0 (window only), `csa_ratio` or
    `hca_ratio`. The MTP layer, which has a window only, is not listed."""
    csa_ratio: PositiveInt = 4
    hca_ratio: PositiveInt = 128
    index_n_heads: PositiveInt = 64
    index_head_dim: PositiveInt = 128
    index_topk: PositiveInt = 512
    moe_intermediate_size: PositiveInt = 2048
    n_routed_experts: PositiveInt = 256
    n_shared_experts: PositiveInt = 1
    num_experts_per_tok: PositiveInt = 6
    num_hash_layers: int = Field(default=3, ge=0)
    """How many of the first layers take their experts from a table by token."""
    routed_scaling_factor: float = Field(default=1.5, gt=0)
    swiglu_limit: float = Field(default=10.0, gt=0)
    hc_mult: PositiveInt = 4
    """Residual streams."""
    hc_sinkhorn_iters: PositiveInt = 20
    hc_eps: float = Field(default=1e-6, gt=0)
    max_position_embeddings: PositiveInt = 4096
    compress_rope_theta: float = Field(default=160000.0, gt=0)
    rope_scaling: YarnConfig | None = None
    """YaRN of the compressing layers; window layers never have it, nor has the softmax scale."""

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        if len(self.compress_ratios) != self.num_hidden_layers:
            raise ValueError(
                f"compress_ratios has {len(self.compress_ratios)} entries, but num_hidden_layers "
                f"= {self.num_hidden_layers}; give one for each layer"
            )
        if self.csa_ratio == self.hca_ratio:
            raise ValueError(
                f"csa_ratio = hca_ratio = {self.csa_ratio}, so compress_ratios cannot tell the two "
                "kinds of layer apart; change either"
            )
        allowed = (0, self.csa_ratio, self.hca_ratio)
        for layer, ratio in enumerate(self.compress_ratios):
            if ratio not in allowed:
                raise ValueError(
                    f"compress_ratios[{layer}] = {ratio} is none of 0, csa_ratio = "
                    f"{self.csa_ratio} and hca_ratio = {self.hca_ratio}; change it"
                )
        for name, width in (("head_dim", self.head_dim), ("index_head_dim", self.index_head_dim)):
            if width < self.qk_rope_head_dim:
                raise ValueError(
                    f"{name} = {width} is below qk_rope_head_dim = {self.qk_rope_head_dim}, which "
                    "it must hold; raise the first"
                )
        if self.num_attention_heads % self.o_groups:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not divisible by o_groups = "
                f"{self.o_groups}; change either"
            )
        yarn = self.rope_scaling
        if yarn and yarn.mscale != yarn.mscale_all_dim:
            raise ValueError(
                f"rope_scaling.mscale = {yarn.mscale} differs from mscale_all_dim = "
                f"{yarn.mscale_all_dim}, but this family scales no magnitudes; leave both out"
            )
        if self.num_hash_layers > self.num_hidden_layers:
            raise ValueError(
                f"num_hash_layers = {self.num_hash_layers} exceeds num_hidden_layers = "
                f"{self.num_hidden_layers}; lower the first"
            )
        return self

    @property
    def streams(self) -> int:
        """`hc_mult`."""
        return self.hc_mult

    @property
    def score_function(self) -> ScoreFunction:
        """sqrt(softplus(logit))."""
        return "sqrt_softplus"

    @property
    def activation_limit(self) -> float | None:
        """`swiglu_limit`."""
        return self.swiglu_limit

    @property
    def has_indexer(self) -> bool:
        """In the layers that compress by `csa_ratio`."""
        return self.csa_ratio in self.compress_ratios

    @property
    def parts(self) -> frozenset[str]:
        """With compressors in the layers that pool keys."""
        return super().parts | ({"compressor"} if any(self.compress_ratios) else set())

    def attention_kind(self, layer: int) -> AttentionKind:
        """What `layer` attends to beside its window; the MTP layer has the window alone."""
        if layer >= self.num_hidden_layers or self.compress_ratios[layer] == 0:
            return "window"
        return "csa" if self.compress_ratios[layer] == self.csa_ratio else "hca"

    @property
    def fused_rows(self) -> dict[str, int]:
        """Those of all families, and the query's bottleneck."""
        return {**super().fused_rows, "q_lora_rank": self.q_lora_rank}

    def has_experts(self, layer: int) -> bool:
        """Every layer."""
        return True

    def routes_by_hash(self, layer: int) -> bool:
        """The first `num_hash_layers`."""
        return layer < self.num_hash_layers

    def attention_parameters(self, layer: int) -> int:
        """Projections, norms, sinks, compressor and indexer of one layer."""
        width, heads, head = self.hidden_size, self.num_attention_heads, self.head_dim
        total = self.q_lora_rank * (width + 1 + heads * head)
        total += width * head + head
        total += heads * head * self.o_lora_rank + self.o_groups * self.o_lora_rank * width
        total += heads
        match self.attention_kind(layer):
            case "window":
                return total
            case "hca":
                return total + self._compressor_parameters(head, self.hca_ratio, series=1)
            case "csa":
                total += self._compressor_parameters(head, self.csa_ratio, series=2)
                total += self._compressor_parameters(self.index_head_dim, self.csa_ratio, series=2)
                queries = self.q_lora_rank * self.index_n_heads * self.index_head_dim
                return total + queries + width * self.index_n_heads

    def _compressor_parameters(self, head: int, ratio: int, *, series: int) -> int:
        """Keys, gates, position biases and norm; overlapping blocks have two series of each."""
        return series * head * (2 * self.hidden_size + ratio) + head

    def attention_products(self, layer: int, context_tokens: int) -> float:
        """Of the window and of compressed entries; of `csa` the picked ones, which are scored."""
        keys = mean_keys(context_tokens, self.sliding_window)
        scores = 0.0
        match self.attention_kind(layer):
            case "csa":
                entries = context_tokens / self.csa_ratio
                keys += mean_keys(entries, self.index_topk)
                scores = self.index_n_heads * self.index_head_dim * mean_keys(entries)
            case "hca":
                keys += mean_keys(context_tokens / self.hca_ratio)
        return self.num_attention_heads * 2 * self.head_dim * keys + scores

    def layer_parameters(self, layer: int, *, active: bool = False) -> int:
        """Attention, experts, norms, hyper-connections, and the engram in front, if any."""
        total = self.attention_parameters(layer) + 2 * self.hidden_size
        total += self._expert_parameters(active=active)
        if self.routes_by_hash(layer):
            total += self.num_experts_per_tok * (1 if active else self.vocab_size)
        else:
            total += self.n_routed_experts
        mixes = (2 + self.streams) * self.streams
        total += 2 * (mixes * (self.streams * self.hidden_size + 1) + 3)
        return total + self._engram_parameters(layer, active=active)

    def _outer_parameters(self) -> int:
        """Also the mixing of the streams in front of the final norm."""
        head = self.streams * (self.streams * self.hidden_size + 1) + 1
        return super()._outer_parameters() + head

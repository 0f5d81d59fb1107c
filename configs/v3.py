"""DeepSeek-V3 and V3.2: latent attention, node-limited routing, and V3.2's lightning indexer."""

from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator

from configs.shape import ModelConfig, mean_keys


class V3Config(ModelConfig):
    """A DeepSeek-V3 shaped transformer: MLA, DeepSeekMoE, optional MTP layer.

    Field names are those of Hugging Face's `config.json`, so that export is a renaming of nothing.
    Defaults are DeepSeek-V3's (arXiv 2412.19437, section 4.2 and the released config).
    """

    family: Literal["v3"] = "v3"
    vocab_size: PositiveInt = 129280
    hidden_size: PositiveInt = 7168
    num_hidden_layers: PositiveInt = 61
    first_k_dense_replace: int = Field(default=3, ge=0)
    """How many of the first layers have a dense feed-forward instead of experts."""
    num_attention_heads: PositiveInt = 128
    q_lora_rank: PositiveInt | None = 1536
    """Width of the query bottleneck; none means one plain projection."""
    kv_lora_rank: PositiveInt = 512
    qk_nope_head_dim: PositiveInt = 128
    qk_rope_head_dim: PositiveInt = 64
    v_head_dim: PositiveInt = 128
    intermediate_size: PositiveInt = 18432
    moe_intermediate_size: PositiveInt = 2048
    n_routed_experts: PositiveInt = 256
    n_shared_experts: PositiveInt = 1
    num_experts_per_tok: PositiveInt = 8
    n_group: PositiveInt = 8
    topk_group: PositiveInt = 4
    routed_scaling_factor: float = Field(default=2.5, gt=0)
    max_position_embeddings: PositiveInt = 4096

    @model_validator(mode="after")
    def _numbers_agree(self) -> Self:
        if self.first_k_dense_replace > self.num_hidden_layers:
            raise ValueError(
                f"first_k_dense_replace = {self.first_k_dense_replace} exceeds "
                f"num_hidden_layers = {self.num_hidden_layers}; lower the first"
            )
        if self.n_routed_experts % self.n_group:
            raise ValueError(
                f"n_routed_experts = {self.n_routed_experts} is not divisible by "
                f"n_group = {self.n_group}; change either"
            )
        if self.n_routed_experts // self.n_group < 2:
            raise ValueError(
                f"n_routed_experts / n_group = {self.n_routed_experts // self.n_group}, but a "
                "group's score is the sum of its two best experts; use fewer groups"
            )
        if self.topk_group > self.n_group:
            raise ValueError(
                f"topk_group = {self.topk_group} exceeds n_group = {self.n_group}; lower the first"
            )
        reachable = self.topk_group * (self.n_routed_experts // self.n_group)
        if self.num_experts_per_tok > reachable:
            raise ValueError(
                f"num_experts_per_tok = {self.num_experts_per_tok}, but topk_group = "
                f"{self.topk_group} groups hold only {reachable} experts; raise topk_group"
            )
        return self

    @property
    def routing_groups(self) -> tuple[int, int]:
        """Node-limited routing: `n_group`, of which a token reaches `topk_group`."""
        return self.n_group, self.topk_group

    @property
    def qk_head_dim(self) -> int:
        """Width of one query or key head."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def fused_rows(self) -> dict[str, int]:
        """Those of all families, the query's bottleneck and dense layers' gates."""
        rows = super().fused_rows
        if self.q_lora_rank is not None:
            rows["q_lora_rank"] = self.q_lora_rank
        if self.first_k_dense_replace:
            rows["intermediate_size"] = self.intermediate_size
        return rows

    def has_experts(self, layer: int) -> bool:
        """All but the first `first_k_dense_replace`."""
        return layer >= self.first_k_dense_replace

    def attention_parameters(self) -> int:
        """Parameters of one MLA block, its two latent norms included."""
        width, heads = self.hidden_size, self.num_attention_heads
        if self.q_lora_rank is None:
            query = width * heads * self.qk_head_dim
        else:
            query = self.q_lora_rank * (width + 1 + heads * self.qk_head_dim)
        key_value = width * (self.kv_lora_rank + self.qk_rope_head_dim) + self.kv_lora_rank
        key_value += self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + key_value + heads * self.v_head_dim * width

    def layer_parameters(self, layer: int, *, active: bool = False) -> int:
        """Attention, feed-forward, norms, and the engram in front, if any."""
        total = self.attention_parameters() + 2 * self.hidden_size
        total += self._engram_parameters(layer, active=active)
        if not self.has_experts(layer):
            return total + 3 * self.hidden_size * self.intermediate_size
        return total + self._expert_parameters(active=active) + self.n_routed_experts

    def attention_products(self, layer: int, context_tokens: int) -> float:
        """Queries with keys and weights with values, of all that stands before."""
        head = self.qk_head_dim + self.v_head_dim
        return self.num_attention_heads * head * self._attended(context_tokens)

    def _attended(self, context_tokens: int) -> float:
        """Keys that a query looks at, in the mean."""
        return mean_keys(context_tokens)


class V32Config(V3Config):
    """V3 with DeepSeek Sparse Attention: a lightning indexer picks the tokens attended to.

    Defaults are DeepSeek-V3.2's released config.
    """

    family: Literal["v32"]  # type: ignore[assignment]
    q_lora_rank: PositiveInt = 1536
    """The indexer reads the query's bottleneck, so this family always has one."""
    index_n_heads: PositiveInt = 64
    index_head_dim: PositiveInt = 128
    index_topk: PositiveInt = 2048

    @model_validator(mode="after")
    def _indexer_agrees(self) -> Self:
        if self.index_head_dim < self.qk_rope_head_dim:
            raise ValueError(
                f"index_head_dim = {self.index_head_dim} is below qk_rope_head_dim = "
                f"{self.qk_rope_head_dim}, which it must hold; raise the first"
            )
        return self

    @property
    def has_indexer(self) -> bool:
        """In every layer."""
        return True

    def attention_parameters(self) -> int:
        """MLA's and the indexer's, its LayerNorm's two vectors included."""
        queries = self.q_lora_rank * self.index_n_heads * self.index_head_dim
        keys = self.hidden_size * self.index_head_dim + 2 * self.index_head_dim
        indexer = queries + keys + self.hidden_size * self.index_n_heads
        return super().attention_parameters() + indexer

    def attention_products(self, layer: int, context_tokens: int) -> float:
        """Of the keys that are picked, and the indexer's scores of all."""
        scores = self.index_n_heads * self.index_head_dim * mean_keys(context_tokens)
        return super().attention_products(layer, context_tokens) + scores

    def _attended(self, context_tokens: int) -> float:
        return mean_keys(context_tokens, self.index_topk)

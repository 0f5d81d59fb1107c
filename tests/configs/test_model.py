"""Promises of the model's arithmetic, against the published sizes."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.model import V3Config, V4Config, V32Config, model_config

TINY: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "q_lora_rank": None,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "intermediate_size": 128,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_group": 2,
    "topk_group": 1,
    "max_position_embeddings": 256,
}


TINY_V32 = TINY | {"family": "v32", "q_lora_rank": 16, "index_n_heads": 4, "index_head_dim": 16}
TINY_V4: dict[str, Any] = {
    "family": "v4",
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "head_dim": 32,
    "qk_rope_head_dim": 8,
    "q_lora_rank": 16,
    "o_groups": 2,
    "o_lora_rank": 12,
    "compress_ratios": (0, 4, 16),
    "hca_ratio": 16,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 4,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_hash_layers": 1,
    "max_position_embeddings": 256,
}


def test_the_defaults_are_the_released_models_to_the_last_parameter() -> None:
    assert V3Config().parameters() == 671_026_419_200
    assert V32Config(family="v32").parameters() == 671_877_944_064
    assert V4Config(family="v4").parameters() == 284_334_567_511


def test_a_token_visits_37_38_and_14_billion_parameters() -> None:
    assert V3Config().parameters(active=True) == 37_552_297_472
    assert V32Config(family="v32").parameters(active=True) == 38_403_822_336
    # The table's row that a token reads is counted, not the table.
    assert V4Config(family="v4").parameters(active=True) == 13_799_632_489


def test_a_table_without_a_family_is_the_first_family() -> None:
    assert type(model_config(TINY)) is V3Config
    assert type(model_config(TINY_V32)) is V32Config
    assert type(model_config(TINY_V4)) is V4Config
    for fields in (TINY, TINY_V32, TINY_V4):
        made = model_config(fields)
        assert model_config(made.model_dump(mode="json")) == made


def test_the_count_equals_a_sum_over_every_tensor() -> None:
    width, vocab = 64, 512
    query, compressed = 64 * 4 * 24, 64 * (32 + 8) + 32
    attention = query + compressed + 32 * 4 * (16 + 16) + 4 * 16 * 64
    dense = attention + 2 * width + 3 * 64 * 128
    sparse = attention + 2 * width + 8 * 64 + 8 + (8 + 1) * 3 * 64 * 32
    assert V3Config(**TINY).parameters() == dense + 2 * sparse + width + 2 * vocab * width


def test_a_query_bottleneck_replaces_the_plain_projection() -> None:
    plain = V3Config(**TINY).attention_parameters()
    narrow = V3Config(**TINY | {"q_lora_rank": 16}).attention_parameters()
    assert narrow - plain == (64 * 16 + 16 + 16 * 4 * 24) - 64 * 4 * 24


def test_flops_grow_with_the_context_only_by_attention() -> None:
    model = V3Config(**TINY)
    per_key = 6 * 4 * 4 * (24 + 16) / 2
    short, long = (model.training_flops_per_token(tokens) for tokens in (128, 256))
    assert long - short == pytest.approx(128 * per_key)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"n_group": 3}, "n_routed_experts = 8 is not divisible by n_group = 3"),
        ({"n_group": 8, "topk_group": 1}, "sum of its two best experts"),
        ({"topk_group": 3}, "topk_group = 3 exceeds n_group = 2"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5.*hold only 4"),
        ({"qk_rope_head_dim": 7}, "qk_rope_head_dim = 7 is odd"),
        ({"first_k_dense_replace": 4}, "first_k_dense_replace = 4.*num_hidden_layers = 3"),
        ({"hidden_size": 0}, "greater than 0"),
        ({"rope_theta": float("inf")}, "finite"),
    ],
)
def test_impossible_dimensions_are_refused_with_both_numbers(
    change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        V3Config(**TINY | change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"q_lora_rank": None}, "q_lora_rank"),
        ({"index_head_dim": 4}, "index_head_dim = 4 is below qk_rope_head_dim = 8"),
        ({"n_group": 3}, "n_routed_experts = 8 is not divisible by n_group = 3"),
        ({"engram": {"layer_ids": [1, 3]}}, "layer_ids holds 3, but num_hidden_layers = 3"),
        ({"engram": {"layer_ids": [1, 1]}}, r"layer_ids = \[1, 1\].*none twice"),
        ({"rope_scaling": {"beta_fast": 1.0}}, "beta_fast = 1.0 must exceed beta_slow = 1.0"),
        ({"rope_scaling": {"factor": 1.0}}, "greater than 1"),
    ],
)
def test_impossible_dimensions_of_v32_are_refused_with_both_numbers(
    change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        model_config(TINY_V32 | change)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"num_hidden_layers": 4}, "compress_ratios has 3 entries, but num_hidden_layers = 4"),
        ({"compress_ratios": (0, 4, 8)}, r"compress_ratios\[2\] = 8 is none of 0, csa_ratio = 4"),
        ({"hca_ratio": 4, "compress_ratios": (0, 4, 4)}, "csa_ratio = hca_ratio = 4"),
        ({"head_dim": 6}, "head_dim = 6 is below qk_rope_head_dim = 8"),
        ({"index_head_dim": 6}, "index_head_dim = 6 is below qk_rope_head_dim = 8"),
        ({"qk_rope_head_dim": 9}, "qk_rope_head_dim = 9 is odd"),
        ({"o_groups": 3}, "num_attention_heads = 4 is not divisible by o_groups = 3"),
        ({"num_hash_layers": 4}, "num_hash_layers = 4 exceeds num_hidden_layers = 3"),
        ({"num_experts_per_tok": 9}, "num_experts_per_tok = 9 exceeds n_routed_experts = 8"),
        ({"rope_scaling": {"mscale": 0.5}}, "mscale = 0.5 differs from mscale_all_dim = 1.0"),
    ],
)
def test_impossible_dimensions_of_v4_are_refused_with_both_numbers(
    change: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(ValidationError, match=complaint):
        model_config(TINY_V4 | change)


def test_a_config_never_changes() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        V3Config(**TINY).hidden_size = 128

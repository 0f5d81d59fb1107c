"""Promises of the model's arithmetic, against the published sizes."""

from typing import Any

import pytest
from pydantic import ValidationError

from configs.model import V3Config

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


def test_the_default_is_deepseek_v3_to_the_last_parameter() -> None:
    assert V3Config().parameters() == 671_026_419_200


def test_a_token_of_deepseek_v3_visits_37_billion_parameters() -> None:
    assert V3Config().parameters(active=True) == 37_552_297_472


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


def test_a_config_never_changes() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        V3Config(**TINY).hidden_size = 128  # type: ignore[misc]

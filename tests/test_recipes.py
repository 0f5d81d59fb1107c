"""Promises of the recipes that are shipped."""

import pytest

from configs.recipe import load_recipe, shipped_recipes


def test_the_shop_window_and_the_test_recipe_are_shipped() -> None:
    assert {"tiny", "smoke"} <= set(shipped_recipes())


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_and_bears_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_has_quantised_widths_that_no_reader_mis_sizes(name: str) -> None:
    """Blocks of 128 must be whole, or there must be one: readers disagree about ragged ones."""
    model = load_recipe(name).model
    widths = {
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "moe_intermediate_size": model.moe_intermediate_size,
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": model.q_lora_rank or 0,
        "heads * v_head_dim": model.num_attention_heads * model.v_head_dim,
        "heads * qk_head_dim": model.num_attention_heads * model.qk_head_dim,
        "rows of kv_a_proj": model.kv_lora_rank + model.qk_rope_head_dim,
        "rows of kv_b_proj": model.num_attention_heads
        * (model.qk_nope_head_dim + model.v_head_dim),
    }
    assert {key: width for key, width in widths.items() if width > 128 and width % 128} == {}


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_leaves_room_for_its_answers(name: str) -> None:
    recipe = load_recipe(name)
    context = recipe.model.max_position_embeddings
    assert recipe.posttrain.max_new_tokens < context
    assert recipe.evaluate.max_new_tokens < context

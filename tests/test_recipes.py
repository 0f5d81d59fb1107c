"""Promises of the recipes that are shipped."""

from typing import Any

import pytest

from configs.model import ModelConfig, V3Config, V4Config, V32Config
from configs.reading import load_recipe, shipped_recipes
from pipeline.graph import make_graph
from pipeline.production import production
from stages.hashing import Hashes

FULL_SIZE = {
    *("deepseek-v3", "deepseek-v3.2", "deepseek-v4-flash", "deepseek-v4-pro", "article-v4"),
}
RUNS_HERE = sorted(set(shipped_recipes()) - FULL_SIZE)

RELEASED_V3: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "routed_scaling_factor": 2.5,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840,
    "rope_theta": 10000,
    "rms_norm_eps": 1e-6,
}
RELEASED_V3_YARN = {
    "factor": 40,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
}
RELEASED_V32 = RELEASED_V3 | {"index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048}
RELEASED_FLASH: dict[str, Any] = {
    "vocab_size": 129280,
    "hidden_size": 4096,
    "num_hidden_layers": 43,
    "num_attention_heads": 64,
    "head_dim": 512,
    "qk_rope_head_dim": 64,
    "q_lora_rank": 1024,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 2048,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "num_hash_layers": 3,
    "swiglu_limit": 10.0,
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 512,
    "sliding_window": 128,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "hc_eps": 1e-6,
    "rope_theta": 10000,
    "compress_rope_theta": 160000,
    "compress_ratios": (0, 0, *(4, 128) * 20, 4),
    "max_position_embeddings": 1048576,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.02,
}
RELEASED_PRO = RELEASED_FLASH | {
    "hidden_size": 7168,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "q_lora_rank": 1536,
    "o_groups": 16,
    "n_routed_experts": 384,
    "moe_intermediate_size": 3072,
    "routed_scaling_factor": 2.5,
    "index_topk": 1024,
    "compress_ratios": (128, 128, *(4, 128) * 29, 4),
}
RELEASED_V4_YARN = {
    "factor": 16,
    "original_max_position_embeddings": 65536,
    "beta_fast": 32,
    "beta_slow": 1,
}
RELEASED: dict[str, tuple[type[ModelConfig], dict[str, Any], dict[str, Any]]] = {
    "deepseek-v3": (V3Config, RELEASED_V3, RELEASED_V3_YARN),
    "deepseek-v3.2": (V32Config, RELEASED_V32, RELEASED_V3_YARN),
    "deepseek-v4-flash": (V4Config, RELEASED_FLASH, RELEASED_V4_YARN),
    "deepseek-v4-pro": (V4Config, RELEASED_PRO, RELEASED_V4_YARN),
}
"""What the released `config.json` of each says of the model, without the MTP layer's ratio."""


def test_the_shop_window_and_the_test_recipe_are_shipped() -> None:
    assert {"tiny", "smoke"} <= set(shipped_recipes())
    assert set(shipped_recipes()) >= FULL_SIZE


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_loads_and_bears_its_own_name(name: str) -> None:
    assert load_recipe(name).name == name


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_becomes_a_whole_line(name: str) -> None:
    recipe = load_recipe(name)
    after = {"loss_parity"} if recipe.parity else {"posttrain", "evaluate", "export"}
    stages = {node.planned.stage.name for node in make_graph(production(recipe), Hashes())}
    assert stages == {"data", "pretrain", *after}


def test_every_family_has_a_recipe_that_runs_here() -> None:
    families = {load_recipe(name).model.family for name in RUNS_HERE}
    assert families == {"v3", "v32", "v4"}
    assert any(load_recipe(name).model.engram for name in RUNS_HERE)


@pytest.mark.parametrize("name", RELEASED)
def test_a_full_size_recipe_has_the_released_shape(name: str) -> None:
    kind, fields, yarn = RELEASED[name]
    model = load_recipe(name).model
    assert type(model) is kind
    assert {field: getattr(model, field) for field in fields} == fields
    assert model.rope_scaling is not None
    assert {field: getattr(model.rope_scaling, field) for field in yarn} == yarn
    assert model.engram is None
    said = set(fields) | {"family", "rope_scaling", "engram", "initializer_range"}
    # V4's two rates are no fields of a released config, whose layers name them one by one.
    assert set(type(model).model_fields) - said <= {"csa_ratio", "hca_ratio"}


@pytest.mark.parametrize(
    ("name", "degrees"), [("deepseek-v3", (16, 64, 2)), ("deepseek-v3.2", (16, 32, 1))]
)
def test_v3_and_its_successor_are_divided_into_the_papers_stages(
    name: str, degrees: tuple[int, int, int]
) -> None:
    cluster = load_recipe(name).cluster
    assert cluster.ep is not None
    assert (cluster.pp, cluster.ep, cluster.stage_trainers // cluster.ep) == degrees


def test_the_articles_shape_has_the_articles_size_and_a_fifth_of_it_in_tables() -> None:
    model = load_recipe("article-v4").model
    assert isinstance(model, V4Config)
    assert model.engram is not None
    assert model.parameters() == pytest.approx(1e12, rel=0.01)
    assert model.parameters(active=True) == pytest.approx(32e9, rel=0.02)
    rows = sum(sum(map(sum, model.engram.table_rows(layer))) for layer in model.engram.layer_ids)
    tables = rows * model.engram.head_dim
    expert = 3 * model.hidden_size * model.moe_intermediate_size
    routed = model.num_moe_layers * model.n_routed_experts * expert
    assert 0.20 <= tables / (tables + routed) <= 0.25


@pytest.mark.parametrize("name", RUNS_HERE)
def test_a_recipe_that_runs_here_has_widths_that_no_reader_of_fp8_mis_sizes(name: str) -> None:
    """Blocks of 128 must be whole, or there must be one: readers disagree about ragged ones."""
    model = load_recipe(name).model
    widths = {"hidden_size": model.hidden_size, "experts": model.moe_intermediate_size}
    match model:
        case V4Config():
            widths |= _v4_widths(model)
        case V3Config():
            widths |= _v3_widths(model)
    if isinstance(model, V32Config):
        widths["rows of wk"] = model.index_head_dim
        widths["rows of the indexer's wq_b"] = model.index_n_heads * model.index_head_dim
    assert {key: width for key, width in widths.items() if width > 128 and width % 128} == {}


def _v3_widths(model: V3Config) -> dict[str, int]:
    heads, latent = model.num_attention_heads, model.kv_lora_rank + model.qk_rope_head_dim
    return {
        "intermediate_size": model.intermediate_size,
        "kv_lora_rank": model.kv_lora_rank,
        "q_lora_rank": model.q_lora_rank or 0,
        "heads * v_head_dim": heads * model.v_head_dim,
        "heads * qk_head_dim": heads * model.qk_head_dim,
        # 512 + 64 is the released models' own, which every reader has to take.
        "rows of kv_a_proj": 0 if latent == 576 else latent,
        "rows of kv_b_proj": heads * (model.qk_nope_head_dim + model.v_head_dim),
    }


def _v4_widths(model: V4Config) -> dict[str, int]:
    heads = model.num_attention_heads * model.head_dim
    return {
        "head_dim": model.head_dim,
        "q_lora_rank": model.q_lora_rank,
        "heads * head_dim": heads,
        "columns of wo_a": heads // model.o_groups,
        "o_groups * o_lora_rank": model.o_groups * model.o_lora_rank,
        "rows of the indexer's wq_b": model.index_n_heads * model.index_head_dim,
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_a_shipped_recipe_leaves_room_for_its_answers(name: str) -> None:
    recipe = load_recipe(name)
    context = recipe.model.max_position_embeddings
    if recipe.posttrain is None:
        assert recipe.parity is not None
        return
    assert recipe.posttrain.max_new_tokens < context
    assert recipe.evaluate is not None
    assert recipe.evaluate.max_new_tokens < context


def test_the_comparison_of_precisions_sees_ten_million_parameters_and_no_token_twice() -> None:
    recipe = load_recipe("parity")
    assert recipe.parity is not None
    assert recipe.parity.limit == 0.0025
    assert recipe.model.parameters() >= 10_000_000
    assert {source.type for source in recipe.data.sources.values()} == {"stdlib"}
    step = recipe.pretraining["pretrain"].batch_sequences * recipe.data.sequence_tokens
    assert recipe.pretraining["pretrain"].steps * step <= recipe.data.train_tokens


def test_the_recipe_of_v4_that_runs_here_has_every_kind_of_layer() -> None:
    model = load_recipe("tiny-v4").model
    assert isinstance(model, V4Config)
    kinds = {model.attention_kind(layer) for layer in range(model.num_hidden_layers)}
    assert kinds == {"window", "csa", "hca"}
    routes = {model.routes_by_hash(layer) for layer in range(model.num_hidden_layers)}
    assert routes == {False, True}
    # A row is longer than what the window, either compression and the selection hold.
    tokens = load_recipe("tiny-v4").data.sequence_tokens
    assert tokens > max(model.sliding_window, model.hca_ratio, model.csa_ratio * model.index_topk)


def test_the_servable_recipes_differ_from_each_other_by_family_alone() -> None:
    v3, v32, v4 = (load_recipe(f"servable{end}").model for end in ("", "-v3.2", "-v4"))
    assert (v3.family, v32.family, v4.family) == ("v3", "v32", "v4")
    context = {"max_position_embeddings"}
    own = {name for name in type(v3).model_fields if name not in context | {"family"}}
    assert {name: getattr(v32, name) for name in own} == {name: getattr(v3, name) for name in own}
    shared = own & set(V4Config.model_fields) - {"rope_scaling", "routed_scaling_factor"}
    differing = {name for name in shared if getattr(v3, name) != getattr(v4, name)}
    assert differing == {"num_hidden_layers", "num_attention_heads", "rope_theta"}


def test_a_family_is_part_of_what_a_model_is_and_the_first_was_before_there_were_others() -> None:
    """V3's artifacts, made before, must be found again."""

    def config(*sets: str) -> dict[str, Any]:
        recipe = load_recipe("smoke", sets=sets)
        fields = make_graph(production(recipe), Hashes())["pretrain"].identity.fields
        model: dict[str, Any] = fields["config"]["model"]
        return model

    assert "family" not in config()
    assert config("model.family=v3") == config()
    sparse = config("model.family=v32", "pretrain.indexer.dense_steps=4")
    assert sparse == config() | {"family": "v32"}

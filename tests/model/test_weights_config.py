"""`config.json` of every family: what is written comes back, released files are read, and numbers
that disagree are named."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import StrictDataclassClassValidationError
from transformers import (
    DeepseekV3Config,
    DeepseekV4Config,
    DeepseekV32Config,
    PreTrainedConfig,
)

from configs.engram import EngramConfig
from configs.errors import ArtifactError
from configs.model import ModelConfig, V3Config, V4Config, V32Config, YarnConfig
from model.weights.config import from_hf_config, to_hf_config
from model.weights.files import save_pretrained
from tests.references import TINY, TINY_V4, TINY_V32, random_model, tiny, tiny_v4, tiny_v32

V4_YARN = YarnConfig(factor=16.0, original_max_position_embeddings=65536)
CONFIGS = [
    TINY,
    tiny(q_lora_rank=None, rope_theta=7.0),
    tiny(rope_scaling=YarnConfig(factor=4.0, mscale=0.7, mscale_all_dim=0.5)),
    tiny(rope_scaling=YarnConfig(beta_fast=8, beta_slow=2, mscale=0, mscale_all_dim=0)),
    tiny(rope_scaling=YarnConfig(mscale=1.0, mscale_all_dim=0)),
    tiny(engram=EngramConfig(layer_ids=(0,), table_sizes=(11, 13, 17), seed=3)),
    tiny(num_nextn_predict_layers=0, norm_topk_prob=False, n_shared_experts=3),
    V3Config(),
    TINY_V32,
    tiny_v32(index_topk=3, first_k_dense_replace=2),
    V32Config(family="v32", rope_scaling=YarnConfig()),
    TINY_V4,
    tiny_v4(num_nextn_predict_layers=0, num_hash_layers=4, rope_theta=9.0),
    tiny_v4(csa_ratio=3, hca_ratio=7, compress_ratios=(3, 7, 0, 0)),
    tiny_v4(rope_scaling=V4_YARN, compress_rope_theta=333.0, swiglu_limit=7.5),
    tiny_v4(qk_rope_head_dim=6, head_dim=22),
    V4Config(family="v4", rope_scaling=V4_YARN),
]
RELEASED_V3: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "ep_size": 1,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.02,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "rope_scaling": {
        "type": "yarn",
        "factor": 40,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
RELEASED_V32 = RELEASED_V3 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
RELEASED_V4: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"],
    "model_type": "deepseek_v4",
    "attention_bias": False,
    "compress_ratios": [0, 0, *[4, 128] * 20, 4, 0],
    "compress_rope_theta": 160000,
    "expert_dtype": "fp4",
    "hc_eps": 1e-06,
    "hc_mult": 4,
    "hc_sinkhorn_iters": 20,
    "head_dim": 512,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 512,
    "initializer_range": 0.02,
    "max_position_embeddings": 1048576,
    "moe_intermediate_size": 2048,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 64,
    "num_experts_per_tok": 6,
    "num_hash_layers": 3,
    "num_hidden_layers": 43,
    "num_key_value_heads": 1,
    "num_nextn_predict_layers": 1,
    "o_groups": 8,
    "o_lora_rank": 1024,
    "q_lora_rank": 1024,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "type": "yarn",
        "factor": 16,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 1.5,
    "scoring_func": "sqrtsoftplus",
    "sliding_window": 128,
    "swiglu_limit": 10.0,
    "tie_word_embeddings": False,
    "topk_method": "noaux_tc",
    "vocab_size": 129280,
}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
def test_configs_come_back_as_they_were(config: ModelConfig) -> None:
    assert from_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.family)
def test_configs_come_back_from_transformers(config: ModelConfig) -> None:
    kinds = {"v3": DeepseekV3Config, "v32": DeepseekV32Config, "v4": DeepseekV4Config}
    theirs = kinds[config.family](**to_hf_config(config))
    back = from_hf_config(json.loads(theirs.to_json_string(use_diff=False)))
    if config.rope_scaling is not None and config.family == "v4":
        # They write no magnitudes for this family, which has none.
        assert back.rope_scaling == config.rope_scaling
    assert back == config


class AsServers(PreTrainedConfig):
    """V4's config as vLLM has it: all fields kept, one table of rotation, no kinds of layer of its
    own."""

    model_type = "deepseek_v4"

    def __init__(
        self, rope_scaling: Any = None, rope_parameters: Any = None, **fields: Any
    ) -> None:
        self.max_position_embeddings = fields["max_position_embeddings"]
        self.rope_theta = fields["rope_theta"]
        self.rope_parameters = rope_scaling or rope_parameters
        super().__init__(**fields)


def test_servers_of_v4_find_what_they_read_and_no_kind_of_layer_that_they_refuse() -> None:
    config = CONFIGS[-1]
    assert isinstance(config, V4Config)
    written = to_hf_config(config)
    read = AsServers(**written)
    assert read.num_hash_layers == config.num_hash_layers
    assert read.layer_types == written["layer_types"]
    with pytest.raises(StrictDataclassClassValidationError, match="mlp_layer_types"):
        AsServers(**written, mlp_layer_types=["hash_moe"] * config.depth)
    kinds = DeepseekV4Config(**written).mlp_layer_types
    assert kinds is not None
    assert kinds.count("hash_moe") == config.num_hash_layers
    # vllm-ascend reads these of every V4 config.
    assert read.rope_parameters.keys() >= {
        *("rope_type", "factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
    }


def test_the_released_v3_config_is_read() -> None:
    expected = V3Config(
        max_position_embeddings=163840, initializer_range=0.02, rope_scaling=YarnConfig()
    )
    assert from_hf_config(RELEASED_V3) == expected


def test_the_released_v32_config_is_read() -> None:
    expected = V32Config(
        family="v32",
        max_position_embeddings=163840,
        initializer_range=0.02,
        rope_scaling=YarnConfig(),
    )
    assert from_hf_config(RELEASED_V32) == expected


def test_the_released_v4_config_is_read() -> None:
    expected = V4Config(
        family="v4",
        max_position_embeddings=1048576,
        initializer_range=0.02,
        rope_scaling=V4_YARN,
    )
    assert from_hf_config(RELEASED_V4) == expected
    # And written so that those who read released files find what they found there.
    written = to_hf_config(expected)
    for name in RELEASED_V4.keys() - {"expert_dtype", "rope_scaling"}:
        assert written[name] == RELEASED_V4[name], name
    assert written["rope_scaling"].items() >= RELEASED_V4["rope_scaling"].items()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"mscale": 1.0}, (1.0, 0.0)),
        ({"mscale_all_dim": 0.5}, (0.0, 0.5)),
        ({}, (0.0, 0.0)),
        ({"mscale": None, "mscale_all_dim": None}, (0.0, 0.0)),
    ],
)
def test_absent_magnitudes_of_yarn_are_none(
    given: dict[str, Any], expected: tuple[float, float]
) -> None:
    rope = {"type": "yarn", "factor": 4, "original_max_position_embeddings": 16} | given
    config = from_hf_config(RELEASED_V3 | {"rope_scaling": rope})
    assert config.rope_scaling is not None
    assert (config.rope_scaling.mscale, config.rope_scaling.mscale_all_dim) == expected


def test_both_spellings_of_rotary_fields_mean_the_same() -> None:
    released = dict(RELEASED_V3)
    rope = dict(released.pop("rope_scaling"))
    rope["rope_type"] = rope.pop("type")
    released["rope_parameters"] = rope | {"rope_theta": released.pop("rope_theta")}
    assert from_hf_config(released) == from_hf_config(RELEASED_V3)


def test_the_memory_lies_in_config_json_without_its_place() -> None:
    engram = EngramConfig(layer_ids=(1,), table_device="host")
    written = to_hf_config(tiny(engram=engram))["engram"]
    assert written["layer_ids"] == [1]
    assert "table_device" not in written
    back = from_hf_config(to_hf_config(tiny(engram=engram)))
    assert back.engram == EngramConfig(layer_ids=(1,))


def test_a_share_of_a_head_gives_its_width_back_to_those_who_round_down() -> None:
    for head in range(2, 66, 2):
        for width in range(2, head + 1, 2):
            config = tiny_v4(head_dim=head, qk_rope_head_dim=width, index_head_dim=64)
            assert int(head * to_hf_config(config)["partial_rotary_factor"]) == width


V3_FAULTS: list[tuple[dict[str, Any], str]] = [
    (
        {"model_type": "llama"},
        "model_type = 'llama' is unknown; known: deepseek_v3, deepseek_v32, deepseek_v4",
    ),
    ({"model_type": None}, "model_type = None is unknown"),
    (
        {"rope_scaling": {"type": "linear", "factor": 2}},
        "rope_scaling.rope_type = 'linear', but only 'default' and 'yarn' are read",
    ),
    ({"rope_scaling": {"type": "yarn"}}, "rope_scaling.factor is missing"),
    ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "rope_scaling.factor = 0.5: "),
    ({"rope_scaling": "yarn"}, "rope_scaling = 'yarn', expected a table"),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.5}},
        "rope_scaling.attention_factor = 1.5 is not read",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4, "truncate": False}},
        "rope_scaling.truncate = False",
    ),
    (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 5.0}},
        r"rope_theta = 10000.0 disagrees with rope_parameters.rope_theta = 5.0",
    ),
    ({"scoring_func": "softmax"}, "scoring_func = 'softmax', but only 'sigmoid' is read"),
    ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ({"rope_interleave": False}, "rope_interleave = False"),
    ({"num_key_value_heads": 1}, "num_attention_heads = 2 disagrees with num_key_value_heads = 1"),
    ({"n_group": 3}, "n_routed_experts = 8 is not divisible by n_group = 3"),
    ({"n_group": None}, "n_group = None: Input should be a valid integer"),
    ({"topk_group": 5}, "topk_group = 5 exceeds n_group = 4"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok = 5, but topk_group = 2 groups hold only 4"),
    ({"qk_rope_head_dim": 5}, "qk_rope_head_dim = 5 is odd"),
    ({"hidden_size": 0}, "hidden_size = 0: Input should be greater than 0"),
    ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers = 2: "),
    ({"first_k_dense_replace": 9}, "first_k_dense_replace = 9 exceeds num_hidden_layers = 2"),
    ({"engram": {"layer_ids": [7]}}, "engram.layer_ids holds 7, but num_hidden_layers = 2"),
    ({"engram": {"layers": [1]}}, r"engram.layers = \[1\]: Extra inputs"),
]
V32_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"q_lora_rank": None}, "q_lora_rank = None"),
    ({"index_head_dim": 2}, "index_head_dim = 2 is below qk_rope_head_dim = 4"),
    ({"layer_types": ["full_attention"] * 2}, "layer_types = .*'full_attention'.* disagrees with"),
    (
        {"mlp_layer_types": ["sparse", "sparse"]},
        "mlp_layer_types = .* disagrees with mlp_layer_types by first_k_dense_replace",
    ),
]
V4_FAULTS: list[tuple[dict[str, Any], str]] = [
    (
        {"compress_ratios": [0, 4, 8, 4, 4]},
        "compress_ratios ends with 4 for the MTP layer",
    ),
    (
        {"compress_ratios": [0, 4, 8]},
        "compress_ratios has 3 entries, but num_hidden_layers = 4",
    ),
    ({"compress_ratios": "4"}, "compress_ratios = '4', expected a list"),
    (
        {"compress_ratios": [0, 8, 8, 4, 0]},
        r"compress_ratios = \[0, 8, 8, 4\] disagrees with layer_types .* = \[0, 4, 8, 4\]",
    ),
    (
        {"layer_types": ["full_attention"] * 4},
        "layer_types holds 'full_attention'; known: sliding_attention, compressed_sparse",
    ),
    (
        {"compress_ratios": [0, 4, 16, 4, 0], "layer_types": None},
        r"compress_ratios\[2\] = 16 is none of 0, csa_ratio = 4 and hca_ratio = 8",
    ),
    ({"compress_ratios": None, "layer_types": None}, "compress_ratios is missing"),
    (
        {"num_hash_layers": 2, "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"]},
        "num_hash_layers = 2 disagrees with mlp_layer_types = 1",
    ),
    (
        {"mlp_layer_types": ["moe", "hash_moe", "moe", "moe"]},
        "mlp_layer_types = .* disagrees with its hash layers first",
    ),
    ({"num_hash_layers": None, "mlp_layer_types": None}, "num_hash_layers is missing"),
    ({"partial_rotary_factor": 0.25}, r"qk_rope_head_dim = 8 disagrees with .* 0.25 \* 24 = 6"),
    (
        {"qk_rope_head_dim": None, "partial_rotary_factor": None, "rope_parameters": None},
        "qk_rope_head_dim is missing",
    ),
    ({"rope_theta": 5.0}, "rope_theta = 5.0 disagrees with rope_parameters.main.rope_theta"),
    (
        {"rope_parameters": {"main": {"rope_type": "yarn", "rope_theta": 10000.0}}},
        "rope_parameters.main.rope_type = 'yarn', but window layers are never stretched",
    ),
    (
        {"rope_scaling": {"type": "yarn", "factor": 4, "attention_factor": 1.2}},
        "rope_scaling.attention_factor = 1.2 is not read",
    ),
    ({"scoring_func": "sigmoid"}, "scoring_func = 'sigmoid', but only 'sqrtsoftplus' is read"),
    ({"num_key_value_heads": 2}, "num_key_value_heads = 2, but only 1 is read"),
    ({"o_groups": 3}, "num_attention_heads = 4 is not divisible by o_groups = 3"),
]


@pytest.mark.parametrize(
    ("config", "change", "message"),
    [
        pytest.param(config, change, message, id=f"{config.family}-{message[:40]}")
        for config, faults in ((TINY, V3_FAULTS), (TINY_V32, V32_FAULTS), (TINY_V4, V4_FAULTS))
        for change, message in faults
    ],
)
def test_a_config_that_cannot_be_is_refused_by_field_and_value(
    config: ModelConfig, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArtifactError, match=f"^config.json: {message}"):
        from_hf_config(to_hf_config(config) | change)


@pytest.mark.parametrize("config", [TINY, TINY_V32, TINY_V4], ids=lambda config: config.family)
def test_a_field_that_is_missing_from_the_config_is_named(config: ModelConfig) -> None:
    given = {"hidden_size", "vocab_size", "num_experts_per_tok", "moe_intermediate_size"}
    given |= {"v3": {"kv_lora_rank"}, "v32": {"index_topk"}, "v4": {"o_groups"}}[config.family]
    for name in given:
        raw = to_hf_config(config)
        del raw[name]
        with pytest.raises(ArtifactError, match=f"^config.json: {name} is missing; complete it"):
            from_hf_config(raw)


@pytest.mark.parametrize("config", [TINY, TINY_V32, TINY_V4], ids=lambda config: config.family)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"factor": 4.0}, "rope_scaling.factor = 40.0 disagrees with {where}.factor = 4.0"),
        (
            {"original_max_position_embeddings": 9},
            "rope_scaling.original_max_position_embeddings = 4096 disagrees with {where}.* = 9",
        ),
        ({"beta_fast": 8}, "rope_scaling.beta_fast = 32.0 disagrees with {where}.beta_fast = 8.0"),
        (
            {"rope_type": "default"},
            "rope_scaling.rope_type = 'yarn' disagrees with {where}.rope_type = 'default'",
        ),
    ],
)
def test_a_config_that_stretches_in_two_ways_is_refused(
    config: ModelConfig, change: dict[str, Any], message: str
) -> None:
    raw = to_hf_config(config.model_copy(update={"rope_scaling": YarnConfig()}))
    nested = config.family == "v4"
    where = "rope_parameters.compress" if nested else "rope_parameters"
    rope = raw["rope_parameters"]["compress"] if nested else raw["rope_parameters"]
    from_hf_config(raw)
    rope.update(change)
    with pytest.raises(ArtifactError, match=f"^config.json: {message.format(where=where)}"):
        from_hf_config(raw)


def test_magnitudes_of_yarn_must_agree_and_a_table_of_a_base_alone_says_nothing_of_it() -> None:
    raw = to_hf_config(tiny(rope_scaling=YarnConfig()))
    alone = raw | {"rope_parameters": {"rope_theta": raw["rope_theta"]}}
    assert from_hf_config(alone).rope_scaling == YarnConfig()
    raw["rope_parameters"]["mscale"] = 0.5
    message = "rope_scaling.mscale = 1.0 disagrees with rope_parameters.mscale = 0.5"
    with pytest.raises(ArtifactError, match=message):
        from_hf_config(raw)


def test_numbers_that_are_no_numbers_are_named() -> None:
    with pytest.raises(ArtifactError, match=r"^config.json: rms_norm_eps = nan: "):
        from_hf_config(to_hf_config(TINY) | {"rms_norm_eps": math.nan})


@pytest.mark.parametrize("config", [TINY, TINY_V4], ids=["v3", "v4"])
def test_a_folder_in_fp8_tells_servers_the_type_of_experts_beside_the_scheme(
    config: ModelConfig, tmp_path: Path
) -> None:
    """vLLM takes FP4 for meant where V4's config is silent there."""
    save_pretrained(random_model(config), tmp_path, dtype="float8")
    written = json.loads((tmp_path / "config.json").read_text())
    expected = "fp8" if isinstance(config, V4Config) else None
    assert written.get("expert_dtype") == expected
    assert written["quantization_config"].get("expert_dtype") == expected

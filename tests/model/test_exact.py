"""Every family against `transformers`: the same logits from the same folder, both ways.

Both directions run in float32 on random models in which nothing is zero or one by initialisation:
norms, routing biases, sinks, hash tables, stream mixings and position biases are drawn too, or a
tensor that went to the wrong place would not show.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV4Config,
    DeepseekV4ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from model.weights.config import from_hf_config, table_of
from model.weights.files import load_pretrained, save_pretrained
from tests.model.transformers_twin import loaded
from tests.references import random_model

LARGEST_ERROR = 1e-4
"""Of a logit, as a share of the logits' standard deviation."""
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "beta_fast": 4.0,
}
"""With 16 rotary dims at this base, some pairs keep their rate, some do not, some lie between."""

V3: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 40,
    "intermediate_size": 56,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
    "n_shared_experts": 1,
    "n_routed_experts": 16,
    "kv_lora_rank": 20,
    "q_lora_rank": 28,
    "qk_rope_head_dim": 16,
    "v_head_dim": 12,
    "qk_nope_head_dim": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 4,
    "first_k_dense_replace": 1,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
V3_SHAPES: dict[str, dict[str, Any]] = {
    "released-like": {},
    "plain-queries": {"q_lora_rank": None},
    "one-group": {"n_group": 1, "topk_group": 1},
    "two-groups": {"n_group": 2, "topk_group": 1},
    "all-groups": {"n_group": 4, "topk_group": 4, "routed_scaling_factor": 1.0},
    "two-dense-two-shared": {"first_k_dense_replace": 2, "n_shared_experts": 2},
    "three-dense": {"first_k_dense_replace": 3, "num_hidden_layers": 4},
    "all-dense": {"first_k_dense_replace": 3},
    "unnormalised-gates": {"norm_topk_prob": False, "rms_norm_eps": 1e-3},
    "other-base": {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}},
    "yarn": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
    "yarn-half": {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.5}},
    "yarn-on-table": {"rope_parameters": YARN},
    "yarn-on-softmax": {"rope_parameters": YARN | {"mscale_all_dim": 0.8}, "q_lora_rank": None},
}
V32 = V3 | {"index_n_heads": 32, "index_head_dim": 32, "index_topk": 7}
V32_SHAPES: dict[str, dict[str, Any]] = {
    "sparse": {},
    "one-kept": {"index_topk": 1, "num_hidden_layers": 2},
    "all-kept": {"index_topk": 64},
    "many-heads": {"index_n_heads": 64, "index_head_dim": 16, "first_k_dense_replace": 0},
    "yarn": {"rope_parameters": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}},
}
WINDOW, CSA, HCA = (
    "sliding_attention",
    "compressed_sparse_attention",
    "heavily_compressed_attention",
)
V4: dict[str, Any] = {
    "vocab_size": 80,
    "hidden_size": 40,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "head_dim": 24,
    "qk_rope_head_dim": 16,
    "q_lora_rank": 28,
    "o_groups": 2,
    "o_lora_rank": 12,
    "num_experts_per_tok": 3,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "layer_types": [WINDOW, CSA, HCA, CSA],
    "compress_rates": {CSA: 4, HCA: 8},
    "num_hash_layers": 1,
    "sliding_window": 9,
    "index_n_heads": 32,
    "index_head_dim": 32,
    "index_topk": 3,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "compress_rope_theta": 400.0,
}
V4_YARN = {k: v for k, v in YARN.items() if k != "rope_theta"}
V4_SHAPES: dict[str, dict[str, Any]] = {
    "every-kind": {},
    "window-only": {"layer_types": [WINDOW] * 2, "num_hidden_layers": 2, "num_hash_layers": 0},
    "csa-only": {"layer_types": [CSA] * 2, "num_hidden_layers": 2, "num_hash_layers": 2},
    "hca-only": {"layer_types": [HCA] * 2, "num_hidden_layers": 2, "num_hash_layers": 0},
    "released-ratios": {
        "compress_rates": {CSA: 4, HCA: 128},
        "num_hash_layers": 3,
        "max_position_embeddings": 320,
    },
    "unequal-ratios": {"compress_rates": {CSA: 3, HCA: 5}, "sliding_window": 4},
    "yarn": {"rope_parameters": V4_YARN},
    "yarn-and-hash": {"rope_parameters": V4_YARN, "num_hash_layers": 3},
    "two-streams": {"hc_mult": 2, "hc_sinkhorn_iters": 3, "n_shared_experts": 1},
    "low-limit": {"swiglu_limit": 0.5, "norm_topk_prob": True, "routed_scaling_factor": 2.5},
    "one-group": {"o_groups": 1, "qk_rope_head_dim": 8, "index_topk": 1},
}
CASES = [
    pytest.param(config, model, base | change, id=f"{family}-{name}")
    for family, config, model, base, shapes in (
        ("v3", DeepseekV3Config, DeepseekV3ForCausalLM, V3, V3_SHAPES),
        ("v32", DeepseekV32Config, DeepseekV32ForCausalLM, V32, V32_SHAPES),
        ("v4", DeepseekV4Config, DeepseekV4ForCausalLM, V4, V4_SHAPES),
    )
    for name, change in shapes.items()
]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """Their progress bars and advice go nowhere."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


def draw(model: nn.Module, experts: int, *, seed: int = 0) -> None:
    """Make every parameter and stored buffer random, whatever it was initialised to."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith("tid2eid"):
                order = torch.rand(tensor.shape[0], experts, generator=generator).argsort(1)
                tensor.copy_(order[:, : tensor.shape[1]])
            elif tensor.dim() == 1 or name.endswith("position_bias"):
                tensor.add_(0.3 * torch.randn(tensor.shape, generator=generator))
            else:
                tensor.copy_(0.2 * torch.randn(tensor.shape, generator=generator))


def some_tokens(fields: dict[str, Any]) -> Tensor:
    """Two rows long enough to cross every window, ratio and top-k of the shape."""
    length = fields["max_position_embeddings"] - 27
    generator = torch.Generator().manual_seed(1)
    return torch.randint(fields["vocab_size"], (2, length), generator=generator)


def assert_same_logits(found: Tensor, expected: Tensor) -> None:
    assert float(expected.std()) > 0.3
    error = float((found - expected).abs().max() / expected.std())
    assert error <= LARGEST_ERROR


@pytest.mark.parametrize(("config", "kind", "fields"), CASES)
@torch.no_grad()
def test_what_transformers_saves_gives_the_same_logits(
    config: type[PretrainedConfig],
    kind: type[PreTrainedModel],
    fields: dict[str, Any],
    tmp_path: Path,
) -> None:
    theirs = kind(config(**fields)).eval()
    draw(theirs, fields["n_routed_experts"])
    theirs.save_pretrained(tmp_path)
    ours = load_pretrained(tmp_path)
    tokens = some_tokens(fields)
    assert ours.config.num_nextn_predict_layers == 0
    assert_same_logits(ours(tokens), theirs(tokens).logits)


@pytest.mark.parametrize(("config", "kind", "fields"), CASES)
@torch.no_grad()
def test_transformers_reads_what_is_saved_here(
    config: type[PretrainedConfig],
    kind: type[PreTrainedModel],
    fields: dict[str, Any],
    tmp_path: Path,
) -> None:
    raw = config(**fields).to_dict() | {"num_nextn_predict_layers": 1}
    ours = random_model(from_hf_config(raw))
    draw(ours, fields["n_routed_experts"], seed=2)
    save_pretrained(ours, tmp_path)
    theirs, told = loaded(kind.from_pretrained, tmp_path, dtype=torch.float32)
    assert not told["missing_keys"]
    assert not told["mismatched_keys"]
    mtp = table_of(ours.config).mtp_prefix(ours.config)
    assert all(name.startswith(mtp) for name in told["unexpected_keys"])
    tokens = some_tokens(fields)
    assert_same_logits(ours(tokens), theirs.eval()(tokens).logits)

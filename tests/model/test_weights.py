"""Models as folders: nothing is lost on the way, whatever the family, type or number of files."""

import inspect
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.engram import EngramConfig
from configs.errors import ConfigError
from configs.model import ModelConfig
from model.transformer import Transformer
from model.weights.config import read_config
from model.weights.families import from_hf, narrowest, to_hf
from model.weights.files import load_pretrained, load_state, read_tensors, save_pretrained
from model.weights.reading import INDEX, WEIGHTS
from tests.references import (
    TINY,
    TINY_V4,
    TINY_V32,
    random_model,
    random_tokens,
    tiny,
    tiny_v4,
    tiny_v32,
)

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
ENGRAM = EngramConfig(layer_ids=(1,), table_sizes=(40, 40), n_embed_per_ngram=8, n_head_per_ngram=2)
FAMILIES = [TINY, TINY_V32, TINY_V4]
CONFIGS = [
    TINY,
    tiny(q_lora_rank=None),
    tiny(num_nextn_predict_layers=0),
    tiny(engram=ENGRAM),
    TINY_V32,
    tiny_v32(num_nextn_predict_layers=0),
    TINY_V4,
    tiny_v4(num_nextn_predict_layers=0, num_hash_layers=4),
    tiny_v4(engram=ENGRAM),
]


def family_of(config: ModelConfig) -> str:
    return config.family


def assert_equal_states(a: Transformer, b: Transformer) -> None:
    for (name, one), (other, two) in zip(
        a.state_dict().items(), b.state_dict().items(), strict=True
    ):
        assert name == other
        assert one.dtype == two.dtype, name
        assert torch.equal(one, two), name


@pytest.mark.parametrize("config", CONFIGS, ids=family_of)
@torch.no_grad()
def test_a_model_comes_back_bit_for_bit(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_pretrained(model, tmp_path)
    back = load_pretrained(str(tmp_path))
    assert back.config == config
    assert not back.training
    assert_equal_states(back, model)
    assert torch.equal(back(random_tokens(2, 9)), model(random_tokens(2, 9)))


@pytest.mark.parametrize("config", FAMILIES, ids=family_of)
def test_loading_draws_no_random_number(
    config: ModelConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_pretrained(random_model(config), tmp_path)
    before = torch.get_rng_state()
    model = load_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


@pytest.mark.parametrize("config", FAMILIES, ids=family_of)
def test_many_files_hold_what_one_does(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_pretrained(model, tmp_path, max_shard_bytes=20_000)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(set(index["weight_map"].values()))
    assert len(files) > 3
    assert not (tmp_path / WEIGHTS).exists()
    stored: dict[str, Tensor] = {}
    for file in files:
        tensors = load_file(tmp_path / file)
        assert len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000
        assert all(index["weight_map"][name] == file for name in tensors)
        stored |= tensors
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in stored.values())
    assert_equal_states(load_pretrained(tmp_path), model)
    (tmp_path / INDEX).unlink()
    assert_equal_states(load_pretrained(tmp_path), model)
    # A later save leaves nothing of an earlier one behind.
    save_pretrained(model, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {WEIGHTS, "config.json"}


def test_files_hold_the_released_names_and_shapes(tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / WEIGHTS).items()}
    for expert in range(8):
        prefix = f"model.layers.1.mlp.experts.{expert}"
        assert shapes[f"{prefix}.gate_proj.weight"] == (16, 32)
        assert shapes[f"{prefix}.up_proj.weight"] == (16, 32)
        assert shapes[f"{prefix}.down_proj.weight"] == (32, 16)
    attention = "model.layers.0.self_attn"
    assert shapes[f"{attention}.q_b_proj.weight"] == (2 * (8 + 4), 16)
    assert shapes[f"{attention}.kv_a_proj_with_mqa.weight"] == (16 + 4, 32)
    assert shapes[f"{attention}.kv_b_proj.weight"] == (2 * (8 + 12), 16)
    assert shapes["model.layers.1.mlp.gate.e_score_correction_bias"] == (8,)
    for leaf in ("enorm", "hnorm", "eh_proj", "embed_tokens", "shared_head.norm"):
        assert f"model.layers.2.{leaf}.weight" in shapes
    assert shapes["model.layers.2.shared_head.head.weight"] == shapes["lm_head.weight"] == (64, 32)
    assert not any("gate_up_proj" in name for name in shapes)
    assert sum(torch.Size(s).numel() for n, s in shapes.items() if ".2." not in n[:15]) == (
        TINY.parameters()
    )


def test_the_indexer_lies_where_v32_has_it(tmp_path: Path) -> None:
    save_pretrained(random_model(TINY_V32), tmp_path)
    shapes = {name: tuple(t.shape) for name, t in load_file(tmp_path / WEIGHTS).items()}
    for layer in range(3):  # the MTP layer's is the third
        prefix = f"model.layers.{layer}.self_attn.indexer"
        assert shapes[f"{prefix}.wq_b.weight"] == (32 * 6, 16)
        assert shapes[f"{prefix}.wk.weight"] == (6, 32)
        assert shapes[f"{prefix}.k_norm.weight"] == shapes[f"{prefix}.k_norm.bias"] == (6,)
        assert shapes[f"{prefix}.weights_proj.weight"] == (32, 32)


RELEASED_V4 = {
    "embed.weight": (64, 32),
    "head.weight": (64, 32),
    "norm.weight": (32,),
    "hc_head_fn": (4, 128),
    "hc_head_base": (4,),
    "hc_head_scale": (1,),
    "layers.1.attn_norm.weight": (32,),
    "layers.1.ffn_norm.weight": (32,),
    "layers.1.hc_attn_fn": (24, 128),
    "layers.1.hc_ffn_scale": (3,),
    "layers.1.attn.attn_sink": (4,),
    "layers.1.attn.wq_a.weight": (20, 32),
    "layers.1.attn.q_norm.weight": (20,),
    "layers.1.attn.wq_b.weight": (96, 20),
    "layers.1.attn.wkv.weight": (24, 32),
    "layers.1.attn.kv_norm.weight": (24,),
    "layers.1.attn.wo_a.weight": (24, 48),
    "layers.1.attn.wo_b.weight": (32, 24),
    "layers.1.attn.compressor.wkv.weight": (48, 32),
    "layers.1.attn.compressor.wgate.weight": (48, 32),
    "layers.1.attn.compressor.ape": (4, 48),
    "layers.1.attn.compressor.norm.weight": (24,),
    "layers.1.attn.indexer.wq_b.weight": (512, 20),
    "layers.1.attn.indexer.weights_proj.weight": (32, 32),
    "layers.1.attn.indexer.compressor.wkv.weight": (32, 32),
    "layers.1.attn.indexer.compressor.ape": (4, 32),
    "layers.2.attn.compressor.wkv.weight": (24, 32),
    "layers.2.attn.compressor.ape": (8, 24),
    "layers.0.ffn.gate.tid2eid": (64, 2),
    "layers.1.ffn.gate.bias": (8,),
    "layers.1.ffn.experts.7.w1.weight": (16, 32),
    "layers.1.ffn.experts.7.w2.weight": (32, 16),
    "layers.1.ffn.shared_experts.w3.weight": (16, 32),
    "mtp.0.e_proj.weight": (32, 32),
    "mtp.0.h_proj.weight": (32, 32),
    "mtp.0.enorm.weight": (32,),
    "mtp.0.norm.weight": (32,),
    "mtp.0.hc_head_fn": (4, 128),
    "mtp.0.hc_attn_base": (24,),
    "mtp.0.attn.wo_b.weight": (32, 24),
    "mtp.0.ffn.gate.bias": (8,),
    "mtp.0.ffn.experts.0.w3.weight": (16, 32),
}
"""Some of each kind (the released model's code, `inference/model.py`)."""


def test_v4_lies_on_disk_under_its_released_names(tmp_path: Path) -> None:
    save_pretrained(random_model(TINY_V4), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    found = {name: tuple(t.shape) for name, t in tensors.items() if name in RELEASED_V4}
    assert found == RELEASED_V4
    assert not any(name.startswith("model.") or "self_attn" in name for name in tensors)
    assert tensors["layers.0.ffn.gate.tid2eid"].dtype == torch.int32
    main = sum(t.numel() for name, t in tensors.items() if not name.startswith("mtp."))
    assert main == TINY_V4.parameters()


def test_gate_and_up_are_the_first_and_the_second_half() -> None:
    state = random_model().state_dict()
    renamed = to_hf(TINY, state)
    stacked = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(renamed[EXPERT], stacked[3, 16:])
    assert torch.equal(renamed[EXPERT.replace("up_proj", "gate_proj")], stacked[3, :16])
    state = random_model(TINY_V4).state_dict()
    renamed = to_hf(TINY_V4, state)
    stacked = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(renamed["layers.1.ffn.experts.3.w1.weight"], stacked[3, :16])
    assert torch.equal(renamed["layers.1.ffn.experts.3.w3.weight"], stacked[3, 16:])


@pytest.mark.parametrize("config", CONFIGS, ids=family_of)
def test_the_naming_is_a_bijection(config: ModelConfig) -> None:
    state = random_model(config).state_dict()
    renamed = to_hf(config, state)
    back = from_hf(config, renamed)
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)


@pytest.mark.parametrize("config", FAMILIES, ids=family_of)
def test_an_mtp_layer_of_which_nothing_is_stored_is_none(
    config: ModelConfig, tmp_path: Path
) -> None:
    # So transformers leaves it: the layer gone, the field as it was.
    model = random_model(config)
    save_pretrained(model, tmp_path)
    prefix = "mtp.0." if config.family == "v4" else f"model.layers.{config.depth}."
    tensors = load_file(tmp_path / WEIGHTS)
    save_file({n: t for n, t in tensors.items() if not n.startswith(prefix)}, tmp_path / WEIGHTS)
    assert read_config(tmp_path).num_nextn_predict_layers == 1
    back = load_pretrained(tmp_path)
    assert back.config.num_nextn_predict_layers == 0
    with torch.no_grad():
        assert torch.equal(back(random_tokens(2, 9)), model(random_tokens(2, 9)))


def test_tensors_are_read_one_at_a_time(tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path)
    stored = read_tensors(tmp_path)
    assert len(stored) == len(list(stored)) == len(load_file(tmp_path / WEIGHTS))
    assert EXPERT in stored
    assert "model.layers.1.mlp.experts.8.up_proj.weight" not in stored
    assert torch.equal(stored[EXPERT], load_file(tmp_path / WEIGHTS)[EXPERT])


@pytest.mark.parametrize("config", FAMILIES, ids=family_of)
def test_a_loaded_model_keeps_its_weights_when_the_files_change(
    config: ModelConfig, tmp_path: Path
) -> None:
    save_pretrained(random_model(config), tmp_path)
    model = load_pretrained(tmp_path)
    weights = tmp_path / WEIGHTS
    with weights.open("r+b") as file:
        file.write(b"\xff" * weights.stat().st_size)
    assert_equal_states(model, random_model(config))


def test_state_is_copied_into_a_model_that_exists() -> None:
    source, target = random_model(seed=1), random_model(seed=2)
    load_state(target, to_hf(TINY, source.state_dict()))
    assert_equal_states(target, source)


@pytest.mark.parametrize("config", CONFIGS, ids=family_of)
def test_bfloat16_rounds_all_but_what_must_stay_exact(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_pretrained(model, tmp_path, dtype="bfloat16")
    exact = to_hf(config, model.state_dict())
    for name, tensor in load_file(tmp_path / WEIGHTS).items():
        if narrowest(config, name) in ("bfloat16", "float8"):
            assert tensor.dtype == torch.bfloat16
            assert torch.equal(tensor, exact[name].bfloat16())
        else:
            assert tensor.dtype != torch.bfloat16
            assert torch.equal(tensor.to(exact[name].dtype), exact[name]), name
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "bfloat16"
    back = load_pretrained(tmp_path)
    assert {parameter.dtype for parameter in back.parameters()} == {torch.float32}


KEPT_EXACT = {
    "model.layers.1.mlp.gate.e_score_correction_bias": TINY,
    "layers.1.ffn.gate.bias": TINY_V4,
    "layers.1.attn.attn_sink": TINY_V4,
    "layers.1.attn.indexer.compressor.ape": TINY_V4,
    "mtp.0.hc_head_base": TINY_V4,
    "layers.3.hc_ffn_fn": TINY_V4,
    "hc_head_scale": TINY_V4,
}


@pytest.mark.parametrize(("name", "config"), KEPT_EXACT.items(), ids=list(KEPT_EXACT))
def test_what_released_models_hold_in_float32_is_never_narrower(
    name: str, config: ModelConfig
) -> None:
    assert narrowest(config, name) == "float32"


@pytest.mark.parametrize("config", FAMILIES, ids=family_of)
@torch.no_grad()
def test_a_model_can_be_loaded_and_run_in_bfloat16(config: ModelConfig, tmp_path: Path) -> None:
    model = random_model(config)
    save_pretrained(model, tmp_path)
    narrow = load_pretrained(tmp_path, dtype=torch.bfloat16)
    assert narrow.lm_head.weight.dtype == torch.bfloat16
    for name, buffer in narrow.named_buffers():
        if name.endswith("e_score_correction_bias"):
            assert buffer.dtype == torch.float32
    tokens = random_tokens(2, 9)
    expected = model(tokens)
    # Rounding may send a token to another expert or entry, which moves its logits by far; most
    # stay within the 2^-8 of each of some tens of roundings in a row.
    error = (narrow(tokens) - expected).abs().median() / expected.std()
    assert 1e-4 < float(error) < 0.1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_fp8_that_could_not_be_computed_is_refused_before_loading(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    message = f"^dtype = {dtype} with precision = 'fp8', .*; load with dtype=torch.float32, or "
    with pytest.raises(ConfigError, match=message):
        load_pretrained(tmp_path / "nowhere", dtype=dtype, precision="fp8")


def test_a_type_that_is_not_written_is_refused(tmp_path: Path) -> None:
    save = inspect.unwrap(save_pretrained)  # Tests check types of their own before it.
    with pytest.raises(ConfigError, match="dtype = 'fp8' is not one that is written; take float32"):
        save(random_model(), tmp_path / "copy", dtype="fp8")
    assert not (tmp_path / "copy").exists()


@torch.no_grad()
def test_a_loaded_memory_lies_where_it_is_told(tmp_path: Path) -> None:
    written = random_model(tiny(engram=ENGRAM))
    save_pretrained(written, tmp_path)
    kept = load_pretrained(tmp_path, device="meta", table_device="host")
    on_cpu = {name for name, p in kept.named_parameters() if not p.is_meta}
    assert on_cpu == {"model.layers.1.engram.table.weight"}
    expected = written.state_dict()
    assert all(torch.equal(kept.state_dict()[name], expected[name]) for name in on_cpu)
    assert all(p.is_meta for p in load_pretrained(tmp_path, device="meta").parameters())
    tokens = random_tokens(2, 9)
    assert torch.equal(load_pretrained(tmp_path, table_device="host")(tokens), written(tokens))
    save_pretrained(random_model(), tmp_path)
    assert load_pretrained(tmp_path, table_device="host").config == TINY


def test_float16_and_bfloat16_files_are_widened(tmp_path: Path) -> None:
    save_pretrained(random_model(), tmp_path)
    tensors: dict[str, Tensor] = load_file(tmp_path / WEIGHTS)
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / WEIGHTS)
    model = load_pretrained(tmp_path)
    head = model.lm_head.weight
    assert head.dtype == torch.float32
    assert torch.equal(head, tensors["lm_head.weight"].half().float())

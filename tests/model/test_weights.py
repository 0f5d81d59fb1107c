"""Models as folders: nothing is lost on the way, and every damage is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import ArtifactError
from configs.model import V3Config
from model.weights.files import INDEX, WEIGHTS, load_pretrained, save_pretrained
from model.weights.v3 import from_hf, from_hf_config, to_hf, to_hf_config
from tests.references import TINY, random_model, random_tokens, tiny

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model."""
    save_pretrained(random_model(), tmp_path)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Apply `change` to the tensors of a folder."""
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS)


@pytest.mark.parametrize("config", [TINY, tiny(q_lora_rank=None), tiny(num_nextn_predict_layers=0)])
def test_a_model_comes_back_bit_for_bit(config: V3Config, tmp_path: Path) -> None:
    model = random_model(config)
    save_pretrained(model, tmp_path)
    back = load_pretrained(tmp_path)
    assert back.config == config
    assert not back.training
    for (name, a), (other, b) in zip(
        model.state_dict().items(), back.state_dict().items(), strict=True
    ):
        assert name == other
        assert torch.equal(a, b), name
    with torch.no_grad():
        assert torch.equal(back(random_tokens(2, 9)), model(random_tokens(2, 9)))


def test_files_hold_the_released_names_and_shapes(folder: Path) -> None:
    shapes = {name: tuple(t.shape) for name, t in load_file(folder / WEIGHTS).items()}
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


def test_gate_and_up_are_the_first_and_the_second_half() -> None:
    state = random_model().state_dict()
    renamed = to_hf(TINY, state)
    stacked = state["model.layers.1.mlp.experts.gate_up_proj"]
    assert torch.equal(renamed[EXPERT], stacked[3, 16:])
    assert torch.equal(renamed[EXPERT.replace("up_proj", "gate_proj")], stacked[3, :16])


def test_a_folder_in_several_files_is_read_by_its_index(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for number, names in enumerate((sorted(tensors)[::2], sorted(tensors)[1::2])):
        name = f"model-{number}.safetensors"
        save_file({n: tensors[n] for n in names}, folder / name)
        weight_map |= dict.fromkeys(names, name)
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    tokens = random_tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(load_pretrained(folder)(tokens), random_model()(tokens))
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(ArtifactError, match=r"model-1\.safetensors: no such file"):
        load_pretrained(folder)


@pytest.mark.parametrize(
    "name",
    [EXPERT, "model.norm.weight", "model.embed_tokens.weight", "model.layers.2.enorm.weight"],
)
def test_a_missing_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.pop(name))
    with pytest.raises(ArtifactError, match=f"^{name} is missing"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", [EXPERT.replace(".3.", ".8."), "model.layers.7.norm.weight"])
def test_an_unexpected_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(ArtifactError, match=f"^{name} is in the checkpoint but not in the model"):
        load_pretrained(folder)


@pytest.mark.parametrize("name", [EXPERT, "lm_head.weight", "model.layers.1.mlp.gate.weight"])
def test_a_misshapen_tensor_is_named_with_both_shapes(folder: Path, name: str) -> None:
    rewrite(folder, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    if name == "lm_head.weight":  # its copy would differ first
        rewrite(folder, lambda tensors: tensors.pop("model.layers.2.shared_head.head.weight"))
    with pytest.raises(ArtifactError, match=rf"^{name} has shape \[\d+, 32\] .* \[\d+, 32\]"):
        load_pretrained(folder)


def test_copies_of_the_mtp_layer_may_be_absent_but_not_differ(folder: Path) -> None:
    copy = "model.layers.2.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors[copy].add_(1))
    with pytest.raises(ArtifactError, match=f"^{copy} differs from model.embed_tokens.weight"):
        load_pretrained(folder)
    rewrite(folder, lambda tensors: tensors.pop(copy))
    assert load_pretrained(folder).config == TINY


def test_a_file_cut_short_is_named(folder: Path) -> None:
    whole = (folder / WEIGHTS).read_bytes()
    for length in (0, 5, len(whole) // 2, len(whole) - 1):
        (folder / WEIGHTS).write_bytes(whole[:length])
        with pytest.raises(ArtifactError, match=r"model\.safetensors: not a whole"):
            load_pretrained(folder)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"model\.safetensors: no such file"):
        load_pretrained(folder)


def test_a_folder_without_a_readable_config_is_no_model_folder(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json: not valid JSON"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json: no such file"):
        load_pretrained(folder)


def test_configs_come_back_as_they_were() -> None:
    for config in (TINY, tiny(q_lora_rank=None, rope_theta=7.0), V3Config()):
        assert from_hf_config(json.loads(json.dumps(to_hf_config(config)))) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type = 'llama', expected 'deepseek_v3'"),
        ({"model_type": None}, "model_type = None"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 40}}, "rope_type = 'yarn'"),
        ({"rope_parameters": None, "rope_scaling": {"type": "yarn"}}, "rope_type = 'yarn'"),
        ({"scoring_func": "softmax"}, "scoring_func = 'softmax', but only 'sigmoid' is read"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings = True"),
        ({"n_group": 3}, "n_routed_experts = 8 is not divisible by n_group = 3"),
    ],
)
def test_a_config_of_another_model_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        from_hf_config(to_hf_config(TINY) | change)


def test_a_field_that_is_missing_from_the_config_is_named() -> None:
    raw = to_hf_config(TINY)
    del raw["kv_lora_rank"]
    with pytest.raises(ArtifactError, match="kv_lora_rank is missing"):
        from_hf_config(raw)


def test_the_naming_is_a_bijection() -> None:
    state = random_model().state_dict()
    back = from_hf(TINY, to_hf(TINY, state))
    assert set(back) == set(state)
    assert all(torch.equal(back[name], state[name]) for name in state)

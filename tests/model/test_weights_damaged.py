"""Folders that hold no whole model: one error says which file or tensor, and never a weight is
made up."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import ArtifactError
from configs.model import ModelConfig
from model.weights.files import load_pretrained, save_pretrained
from model.weights.reading import INDEX, WEIGHTS
from tests.references import TINY, TINY_V4, TINY_V32, random_model

EXPERT = "model.layers.1.mlp.experts.3.up_proj.weight"
INDEXER = "model.layers.2.self_attn.indexer.k_norm.bias"
FOLDERS = {"v3": TINY, "v32": TINY_V32, "v4": TINY_V4}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A whole model."""
    save_pretrained(random_model(), tmp_path)
    return tmp_path


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A whole model in several files with an index."""
    save_pretrained(random_model(), tmp_path, max_shard_bytes=30_000)
    return tmp_path


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any], file: str = WEIGHTS) -> None:
    """Apply `change` to the tensors of a file."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file)


def shards(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("model-*.safetensors"))


def read_index(folder: Path) -> dict[str, Any]:
    index: dict[str, Any] = json.loads((folder / INDEX).read_text())
    return index


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("v3", EXPERT),
        ("v3", "model.norm.weight"),
        ("v3", "model.embed_tokens.weight"),
        ("v3", "model.layers.2.enorm.weight"),  # of an MTP layer of which the rest is there
        ("v3", "model.layers.1.mlp.gate.e_score_correction_bias"),
        ("v32", INDEXER),
        ("v4", "layers.0.ffn.gate.tid2eid"),
        ("v4", "layers.1.ffn.experts.7.w3.weight"),
        ("v4", "layers.1.attn.indexer.compressor.ape"),
        ("v4", "hc_head_scale"),
        ("v4", "mtp.0.hc_head_fn"),
    ],
)
def test_a_missing_tensor_is_named(family: str, name: str, tmp_path: Path) -> None:
    save_pretrained(random_model(FOLDERS[family]), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.pop(name))
    with pytest.raises(
        ArtifactError, match=f": {name} is missing from the checkpoint, but config.json"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("v3", EXPERT.replace(".3.", ".8.")),
        ("v3", "model.layers.7.norm.weight"),
        ("v3", INDEXER),
        ("v3", "embed.weight"),
        ("v4", "layers.0.ffn.gate.bias"),
        ("v4", "layers.0.attn.compressor.ape"),
        ("v4", "mtp.1.norm.weight"),
    ],
)
def test_an_unexpected_tensor_is_named(family: str, name: str, tmp_path: Path) -> None:
    save_pretrained(random_model(FOLDERS[family]), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: torch.zeros(2)}))
    with pytest.raises(
        ArtifactError, match=f": {name} is in the checkpoint but not in the model that"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("config", [TINY, TINY_V4], ids=lambda config: config.family)
def test_a_tensor_under_two_of_its_names_is_unexpected(config: ModelConfig, tmp_path: Path) -> None:
    save_pretrained(random_model(config), tmp_path)
    name, other = {
        "v3": ("model.norm.weight", "norm.weight"),
        "v4": ("norm.weight", "model.norm.weight"),
    }[config.family]
    rewrite(tmp_path, lambda tensors: tensors.update({other: tensors[name].clone()}))
    with pytest.raises(
        ArtifactError, match=f": {other} is in the checkpoint but not in the model that"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("family", "name"),
    [
        ("v3", EXPERT),
        ("v3", "lm_head.weight"),
        ("v3", "model.layers.1.mlp.gate.weight"),
        ("v32", "model.layers.1.self_attn.indexer.weights_proj.weight"),
        ("v4", "layers.1.ffn.experts.7.w1.weight"),
        ("v4", "layers.1.attn.wq_a.weight"),
    ],
)
def test_a_misshapen_tensor_is_named_with_both_shapes(
    family: str, name: str, tmp_path: Path
) -> None:
    save_pretrained(random_model(FOLDERS[family]), tmp_path)
    rewrite(tmp_path, lambda tensors: tensors.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(ArtifactError, match=rf": {name} has shape \[\d+, 32\] .* \[\d+, 32\]"):
        load_pretrained(tmp_path)


def test_a_tensor_of_the_wrong_kind_of_number_is_named(tmp_path: Path) -> None:
    save_pretrained(random_model(TINY_V4), tmp_path)
    table = "layers.0.ffn.gate.tid2eid"
    rewrite(tmp_path, lambda tensors: tensors.update({table: tensors[table].float()}))
    with pytest.raises(
        ArtifactError, match=rf": {table} is stored as .*32, .* torch.int64; take the file"
    ):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("expert", [-1, 8])
def test_a_table_that_names_no_expert_is_refused(expert: int, tmp_path: Path) -> None:
    save_pretrained(random_model(TINY_V4), tmp_path)
    table = "layers.0.ffn.gate.tid2eid"
    rewrite(tmp_path, lambda tensors: tensors[table][5].fill_(expert))
    with pytest.raises(
        ArtifactError, match=f": {table} names expert {expert}, but n_routed_experts = 8; take the"
    ):
        load_pretrained(tmp_path)


def test_copies_of_the_mtp_layer_may_be_absent_but_not_differ(folder: Path) -> None:
    copy = "model.layers.2.embed_tokens.weight"
    rewrite(folder, lambda tensors: tensors[copy].add_(1))
    with pytest.raises(ArtifactError, match=f": {copy} differs from model.embed_tokens.weight"):
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


def test_a_shard_cut_short_is_named(sharded: Path) -> None:
    path = sharded / shards(sharded)[1]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(ArtifactError, match=rf"{path.name}: not a whole safetensors file"):
        load_pretrained(sharded)


def test_an_index_that_names_an_absent_shard_is_refused(sharded: Path) -> None:
    path = sharded / shards(sharded)[1]
    path.unlink()
    with pytest.raises(ArtifactError, match=rf"{path.name}: no such file"):
        load_pretrained(sharded)
    (sharded / INDEX).unlink()
    with pytest.raises(ArtifactError, match=rf"{path.name}: no such file, but .* is one of \d"):
        load_pretrained(sharded)


def test_an_index_that_disagrees_with_its_files_is_refused(sharded: Path) -> None:
    first, second, *_ = shards(sharded)
    original = (sharded / INDEX).read_text()
    index = read_index(sharded)
    name = next(name for name, file in index["weight_map"].items() if file == first)
    index["weight_map"][name] = second
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=f"{name} should lie in {second}, but is not there"):
        load_pretrained(sharded)
    del index["weight_map"][name]
    (sharded / INDEX).write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=f"does not list {name}, which lies in {first}"):
        load_pretrained(sharded)
    (sharded / INDEX).write_text(original)
    rewrite(sharded, lambda tensors: tensors.pop(name), first)
    with pytest.raises(ArtifactError, match=f"{name} should lie in {first}, but is not there"):
        load_pretrained(sharded)


def test_a_tensor_in_two_files_is_refused(sharded: Path) -> None:
    first, second, *_ = shards(sharded)
    name, tensor = next(iter(load_file(sharded / first).items()))
    rewrite(sharded, lambda tensors: tensors.update({name: tensor}), second)
    with pytest.raises(ArtifactError, match=f": {name} lies in {first} and in {second}"):
        load_pretrained(sharded)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("{", "not valid JSON"),
        ("", "not valid JSON"),
        ("{}", "not an index of tensors"),
        ("[]", "not an index of tensors"),
        ('{"weight_map": 3}', "not an index of tensors"),
        ('{"weight_map": {"a": 3}}', "not an index of tensors"),
        (
            '{"weight_map": {"a": "b.safetensors"}}',
            r"b\.safetensors: no such file; .* fetch the file",
        ),
        ('{"weight_map": {"a": "/b.safetensors"}}', "names '/b.safetensors', which is no file"),
        ('{"weight_map": {"a": "../b.safetensors"}}', "names '../b.safetensors', which is no file"),
    ],
)
def test_an_index_that_is_none_is_refused(sharded: Path, body: str, message: str) -> None:
    (sharded / INDEX).write_text(body)
    with pytest.raises(ArtifactError, match=message):
        load_pretrained(sharded)


def test_a_folder_without_a_readable_config_is_no_model_folder(folder: Path) -> None:
    for body in ("{", "\x00"):
        (folder / "config.json").write_text(body)
        with pytest.raises(ArtifactError, match=r"config\.json: not valid JSON"):
            load_pretrained(folder)
    (folder / "config.json").write_text("[1]")
    with pytest.raises(ArtifactError, match=r"config\.json: holds a list, expected a table"):
        load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ArtifactError, match=r"config\.json: no such file"):
        load_pretrained(folder)

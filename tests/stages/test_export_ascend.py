"""Promises of the Ascend variants."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.model import V3Config
from stages.export.ascend import Int8Rows
from stages.export.tensors import TensorFolder
from tests.stages.bundles import MODEL, make_bundle

GLOBALS = {"model_quant_type", "version", "group_size", "metadata", "optional"}
LINEARS = {
    *("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("ascend")
    make_bundle(root, "ascend", max_shard_bytes=500_000)
    return root


@pytest.fixture(scope="module")
def description(root: Path) -> dict[str, Any]:
    path = root / "bundle" / "w8a8" / "quant_model_description.json"
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def _is_quantised(name: str) -> bool:
    layer = int(name.split(".")[2]) if name.startswith("model.layers.") else MODEL.num_hidden_layers
    return layer < MODEL.num_hidden_layers and name.split(".")[-2] in LINEARS


def test_the_description_has_one_row_for_each_tensor(
    root: Path, description: dict[str, Any]
) -> None:
    stored = TensorFolder(root / "bundle" / "w8a8")
    assert description.keys() - GLOBALS == set(stored.names)
    assert description.keys() >= GLOBALS
    assert description["model_quant_type"] == "W8A8_DYNAMIC"


def test_rows_say_how_each_tensor_is_stored(root: Path, description: dict[str, Any]) -> None:
    stored = TensorFolder(root / "bundle" / "w8a8")
    source = TensorFolder(root / "checkpoint").names
    assert any(_is_quantised(name) for name in source)
    for name in source:
        tensor = stored.read(name)
        if _is_quantised(name):
            scale, offset = (stored.read(f"{name}_{part}") for part in ("scale", "offset"))
            kinds = {description[part] for part in (name, f"{name}_scale", f"{name}_offset")}
            assert kinds == {"W8A8_DYNAMIC"}
            assert tensor.dtype == torch.int8
            assert scale.dtype == offset.dtype == torch.float32
            assert scale.shape == offset.shape == (tensor.shape[0], 1)
            assert not offset.any()
        else:
            wide = name.endswith("e_score_correction_bias")
            assert description[name] == "FLOAT"
            assert tensor.dtype == (torch.float32 if wide else torch.bfloat16)


def test_fused_linears_have_one_kind(description: dict[str, Any]) -> None:
    """The server fuses these pairs into one GEMM and refuses pairs of two kinds."""
    fused = {"up_proj": "gate_proj", "kv_a_proj_with_mqa": "q_a_proj"}
    for name, kind in description.items():
        for one, other in fused.items():
            if f".{one}." in name:
                assert description[name.replace(f".{one}.", f".{other}.")] == kind


def test_a_model_without_query_bottleneck_has_its_query_quantised() -> None:
    assert Int8Rows(num_hidden_layers=1).parts("model.layers.0.self_attn.q_proj.weight")[1:]


@pytest.mark.parametrize("variant", ["bf16", "w8a8"])
def test_no_config_names_a_quantisation(root: Path, variant: str) -> None:
    config = json.loads((root / "bundle" / variant / "config.json").read_text())
    assert "quantization_config" not in config
    assert V3Config.model_validate({k: config[k] for k in MODEL.model_dump() if k in config})


def test_each_int8_weight_is_within_half_a_step_of_its_source(root: Path) -> None:
    stored, source = TensorFolder(root / "bundle" / "w8a8"), TensorFolder(root / "checkpoint")
    for name in filter(_is_quantised, source.names):
        x = source.read(name).numpy().astype(np.float64)
        weight, scale = (stored.read(part).numpy() for part in (name, f"{name}_scale"))
        for row, (values, integers) in enumerate(zip(x, weight, strict=True)):
            step = np.abs(values).max() / 127
            assert np.isclose(scale[row, 0], step, rtol=1e-6, atol=0)
            assert np.abs(integers * np.float64(scale[row, 0]) - values).max() <= step * 0.50001
            assert np.abs(integers.astype(int)).max() == 127


def test_a_row_of_zeros_stays_zero() -> None:
    form, name = Int8Rows(num_hidden_layers=1), "model.layers.0.self_attn.o_proj.weight"
    x = torch.zeros(3, 8)
    x[1] = torch.linspace(-1, 1, 8)
    parts = form.encode(name, x)
    decoded = form.decode(name, parts.__getitem__)
    assert parts[f"{name}_scale"][[0, 2]].tolist() == [[1.0], [1.0]]
    assert not decoded[[0, 2]].any()
    torch.testing.assert_close(decoded[1], x[1], atol=0.5 / 127 + 1e-7, rtol=0)


def test_both_names_of_the_index_say_the_same(root: Path) -> None:
    folder = root / "bundle" / "w8a8"
    names = ("model.safetensors.index.json", "quant_model_weights.safetensors.index.json")
    one, other = (json.loads((folder / name).read_text()) for name in names)
    assert one == other
    stored = TensorFolder(folder)
    assert one["weight_map"] == stored.file_of
    assert one["metadata"]["total_size"] == sum(stored.read(n).nbytes for n in stored.names)
    assert all(file.startswith("quant_model_weights-") for file in stored.file_of.values())


def test_nothing_for_ascend_is_fp8(root: Path) -> None:
    for variant in ("bf16", "w8a8"):
        stored = TensorFolder(root / "bundle" / variant)
        kinds = {stored.read(name).dtype for name in stored.names}
        assert kinds <= {torch.bfloat16, torch.float32, torch.int8}

"""Promises of the Ascend variants."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.model import ModelConfig
from model.weights.config import read_config
from stages.export.ascend import Int8Rows
from stages.export.tensors import TensorFolder
from tests.stages.bundles import MODEL, MODELS, files_of, make_bundle, unquantised_dtype

GLOBALS = {"model_quant_type", "version", "group_size", "metadata", "optional"}
LINEARS = {
    "v3": {
        *("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    },
    "v4": {"wq_a", "wq_b", "wkv", "w1", "w2", "w3"},
}
LINEARS["v32"] = LINEARS["v3"]
"""What ModelSlim's recipes quantise, wherever it is not in a compressor."""
FUSED = {
    "v3": {"up_proj": "gate_proj", "kv_a_proj_with_mqa": "q_a_proj"},
    "v4": {"w3": "w1", "wkv": "wq_a"},
}
FUSED["v32"] = FUSED["v3"]
"""Pairs that the server makes one GEMM of."""


@dataclass(frozen=True)
class Made:
    """A bundle's folder and the model it was made of."""

    root: Path
    model: ModelConfig

    @property
    def family(self) -> str:
        return self.model.family

    def folder(self, variant: str) -> Path:
        """The files of one variant."""
        return files_of(self.root / "bundle") / variant

    def is_quantised(self, name: str) -> bool:
        """By the rules as ModelSlim's recipes put them."""
        if name.startswith(("mtp.", f"model.layers.{self.model.num_hidden_layers}.")):
            return False
        *path, module, _ = ("", *name.split("."))
        return module in LINEARS[self.family] and "compressor" not in path


@pytest.fixture(scope="module", params=MODELS)
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Made:
    root, model = tmp_path_factory.mktemp("ascend"), MODELS[request.param]
    make_bundle(
        root, "ascend", model, max_shard_bytes=500_000, min_top1_agreement=0.5, max_kl_nats=0.1
    )
    return Made(root, model)


@pytest.fixture(scope="module")
def description(made: Made) -> dict[str, Any]:
    path = made.folder("w8a8") / "quant_model_description.json"
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def test_the_description_has_one_row_for_each_tensor(
    made: Made, description: dict[str, Any]
) -> None:
    stored = TensorFolder(made.folder("w8a8"))
    assert description.keys() - GLOBALS == set(stored.names)
    assert description.keys() >= GLOBALS
    assert description["model_quant_type"] == "W8A8_DYNAMIC"


def test_rows_say_how_each_tensor_is_stored(made: Made, description: dict[str, Any]) -> None:
    stored = TensorFolder(made.folder("w8a8"))
    source = TensorFolder(files_of(made.root / "checkpoint")).names
    assert any(made.is_quantised(name) for name in source)
    for name in source:
        tensor = stored.read(name)
        if made.is_quantised(name):
            scale, offset = (stored.read(f"{name}_{part}") for part in ("scale", "offset"))
            kinds = {description[part] for part in (name, f"{name}_scale", f"{name}_offset")}
            assert kinds == {"W8A8_DYNAMIC"}
            assert tensor.dtype == torch.int8
            assert scale.dtype == offset.dtype == torch.float32
            assert scale.shape == offset.shape == (tensor.shape[0], 1)
            assert not offset.any()
        else:
            assert description[name] == "FLOAT"
            assert tensor.dtype == unquantised_dtype(name)


def test_fused_linears_have_one_kind(made: Made, description: dict[str, Any]) -> None:
    """The server refuses pairs of two kinds."""
    for one, other in FUSED[made.family].items():
        kinds = {
            name: kind
            for name, kind in description.items()
            if f".{one}." in name and "compressor" not in name
        }
        assert "W8A8_DYNAMIC" in kinds.values()
        for name, kind in kinds.items():
            assert description[name.replace(f".{one}.", f".{other}.")] == kind


def test_a_model_without_query_bottleneck_has_its_query_quantised() -> None:
    assert Int8Rows(MODEL).parts("model.layers.0.self_attn.q_proj.weight")[1:]


@pytest.mark.parametrize("variant", ["bf16", "w8a8"])
def test_no_config_names_a_quantisation(made: Made, variant: str) -> None:
    folder = made.folder(variant)
    config = json.loads((folder / "config.json").read_text())
    assert not {"quantization_config", "expert_dtype"} & config.keys()
    assert read_config(folder) == made.model


def test_each_int8_weight_is_within_half_a_step_of_its_source(made: Made) -> None:
    stored = TensorFolder(made.folder("w8a8"))
    source = TensorFolder(files_of(made.root / "checkpoint"))
    quantised = list(filter(made.is_quantised, source.names))
    assert len(quantised) > 20
    for name in quantised:
        x = source.read(name).numpy().astype(np.float64)
        weight, scale = (stored.read(part).numpy() for part in (name, f"{name}_scale"))
        for row, (values, integers) in enumerate(zip(x, weight, strict=True)):
            step = np.abs(values).max() / 127
            assert np.isclose(scale[row, 0], step, rtol=1e-6, atol=0)
            assert np.abs(integers * np.float64(scale[row, 0]) - values).max() <= step * 0.50001
            assert np.abs(integers.astype(int)).max() == 127


def test_a_row_of_zeros_stays_zero() -> None:
    form, name = Int8Rows(MODEL), "model.layers.0.self_attn.o_proj.weight"
    x = torch.zeros(3, 8)
    x[1] = torch.linspace(-1, 1, 8)
    parts = form.encode(name, x)
    decoded = form.decode(name, parts.__getitem__)
    assert parts[f"{name}_scale"][[0, 2]].tolist() == [[1.0], [1.0]]
    assert not decoded[[0, 2]].any()
    torch.testing.assert_close(decoded[1], x[1], atol=0.5 / 127 + 1e-7, rtol=0)


def test_both_names_of_the_index_say_the_same(made: Made) -> None:
    folder = made.folder("w8a8")
    names = ("model.safetensors.index.json", "quant_model_weights.safetensors.index.json")
    one, other = (json.loads((folder / name).read_text()) for name in names)
    assert one == other
    stored = TensorFolder(folder)
    assert one["weight_map"] == stored.file_of
    assert one["metadata"]["total_size"] == sum(stored.read(n).nbytes for n in stored.names)
    assert all(file.startswith("quant_model_weights-") for file in stored.file_of.values())


def test_nothing_for_ascend_is_fp8(made: Made) -> None:
    for variant in ("bf16", "w8a8"):
        stored = TensorFolder(made.folder(variant))
        kinds = {stored.read(name).dtype for name in stored.names}
        assert kinds <= {torch.bfloat16, torch.float32, torch.int8, torch.int32}

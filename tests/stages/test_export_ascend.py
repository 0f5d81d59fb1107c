"""Promises of the Ascend variants."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.delivery import ExportConfig, Variant
from configs.errors import ExportError
from configs.model import ModelConfig
from model.weights.config import read_config
from model.weights.families import to_hf
from model.weights.files import load_pretrained
from stages.export.ascend import Integers
from stages.export.calibration import Range
from stages.export.schemes import Static8
from stages.export.tensors import TensorFolder
from stages.export.variants import formats
from tests.stages.bundles import (
    LOOSE,
    MODEL,
    MODEL_ENGRAM,
    MODELS,
    files_of,
    make_bundle,
    unquantised_dtype,
)

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
STATIC = {
    "v3": {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"},
    "v4": set[str](),
}
STATIC["v32"] = STATIC["v3"]
"""Whose activations the recipes calibrate."""
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

    def tensors(self, name: str, variant: str) -> dict[str, tuple[str, torch.dtype, list[int]]]:
        """Each stored tensor of a source tensor: kind, type, shape."""
        shape = list(TensorFolder(files_of(self.root / "checkpoint")).read(name).shape)
        if not self.is_quantised(name):
            return {name: ("FLOAT", unquantised_dtype(name), shape)}
        (rows, columns), stem = shape, name.removesuffix("weight")
        *path, module, _ = name.split(".")
        if module in STATIC[self.family]:
            return {
                name: ("W8A8", torch.int8, shape),
                f"{stem}quant_bias": ("W8A8", torch.int32, [rows]),
                f"{stem}input_scale": ("W8A8", torch.float32, [1]),
                f"{stem}input_offset": ("W8A8", torch.float32, [1]),
                f"{stem}deq_scale": ("W8A8", torch.float32, [rows]),
            }
        packed = variant == "w4a8" and "experts" in path
        kind = "W4A8_DYNAMIC" if packed else "W8A8_DYNAMIC"
        found = {
            name: (kind, torch.int8, [rows // 2 if packed else rows, columns]),
            f"{stem}weight_scale": (kind, torch.float32, [rows, 1]),
            f"{stem}weight_offset": (kind, torch.float32, [rows, 1]),
        }
        if packed:
            parts = 16 if module in ("down_proj", "w2") else 1
            found[f"{stem}scale_bias"] = (kind, torch.float32, [rows, parts])
        return found


@pytest.fixture(scope="module", params=MODELS)
def made(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Made:
    root, model = tmp_path_factory.mktemp("ascend"), MODELS[request.param]
    make_bundle(
        root,
        "ascend",
        model,
        max_shard_bytes=500_000,
        variants=("bf16", "w4a8", "w8a8"),
        **LOOSE,
    )
    return Made(root, model)


@pytest.fixture(scope="module", params=["w8a8", "w4a8"])
def variant(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def description(made: Made, variant: str) -> dict[str, Any]:
    path = made.folder(variant) / "quant_model_description.json"
    read: dict[str, Any] = json.loads(path.read_text())
    return read


def test_tensors_types_shapes_and_rows_are_those_of_the_format(
    made: Made, variant: str, description: dict[str, Any]
) -> None:
    stored = TensorFolder(made.folder(variant))
    source = TensorFolder(files_of(made.root / "checkpoint")).names
    expected = {k: v for name in source for k, v in made.tensors(name, variant).items()}
    found = {
        name: (description[name], stored.read(name).dtype, list(stored.read(name).shape))
        for name in stored.names
    }
    assert found == expected
    assert description.keys() - GLOBALS == set(stored.names)
    of_model = "W4A8_DYNAMIC" if variant == "w4a8" else "W8A8"
    if made.family == "v4" and variant == "w8a8":
        of_model = "W8A8_DYNAMIC"
    assert description["model_quant_type"] == of_model
    assert (description["version"], description["group_size"]) == ("1.0.0", 0)
    assert description["metadata"] == description["optional"] == {}


def test_nothing_has_an_offset_but_activations(made: Made, variant: str) -> None:
    stored = TensorFolder(made.folder(variant))
    assert not any(stored.read(n).any() for n in stored.names if n.endswith("weight_offset"))
    static = [n for n in stored.names if n.endswith("input_offset")]
    assert all(-128 <= float(stored.read(n)) == round(float(stored.read(n))) <= 127 for n in static)
    assert len({float(stored.read(n)) for n in static}) > 1 or made.family == "v4"


def test_scales_are_bfloat16_numbers(made: Made, variant: str) -> None:
    """A server keeps them in the model's type."""
    stored = TensorFolder(made.folder(variant))
    kept = [n for n in stored.names if n.endswith(("weight_scale", "input_scale"))]
    assert kept
    for name in kept:
        scale = stored.read(name)
        assert torch.equal(scale, scale.bfloat16().float()), name


def test_fused_linears_have_one_kind(made: Made, description: dict[str, Any]) -> None:
    """The server refuses pairs of two kinds."""
    for one, other in FUSED[made.family].items():
        kinds = {
            name: kind
            for name, kind in description.items()
            if f".{one}." in name and "compressor" not in name
        }
        assert {"W8A8_DYNAMIC", "W8A8", "W4A8_DYNAMIC"} & set(kinds.values())
        for name, kind in kinds.items():
            assert description[name.replace(f".{one}.", f".{other}.")] == kind


def test_a_model_without_query_bottleneck_has_its_query_quantised() -> None:
    assert Integers(MODEL).parts("model.layers.0.self_attn.q_proj.weight")[1:]


@pytest.mark.parametrize("variant", ["bf16", "w8a8", "w4a8"])
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
        x, stem = source.read(name).numpy().astype(np.float64), name.removesuffix("weight")
        if f"{stem}deq_scale" in stored.file_of:
            scale = stored.read(f"{stem}deq_scale") / stored.read(f"{stem}input_scale")
        else:
            scale = stored.read(f"{stem}weight_scale").flatten()
        for row, (values, integers) in enumerate(zip(x, stored.read(name).numpy(), strict=True)):
            step = float(scale[row])
            # Rounded up to a number of bfloat16.
            assert 1 <= step / (np.abs(values).max() / 127) * 1.000001 < 1.0079
            assert np.abs(integers * step - values).max() <= step * 0.50001
            assert np.abs(integers.astype(int)).max() >= 126


def test_two_rows_of_four_bits_share_a_byte() -> None:
    form, name = Integers(MODEL, "w4a8"), "model.layers.1.mlp.experts.0.down_proj.weight"
    x = torch.arange(-8, 8).float().repeat(2, 1).mul(torch.tensor([[1.0], [-2.0]]))
    x[:, 0] = 0
    parts = form.encode(name, x)
    assert parts[name].shape == (1, 16)
    scale = parts[f"{name}_scale"].flatten().tolist()
    assert scale == [1.0, 2.0]
    for column, byte in enumerate(parts[name][0].tolist()):
        low, high = byte & 15, (byte >> 4) & 15
        signed = [code - 16 if code > 7 else code for code in (low, high)]
        assert [signed[0] * 1.0, signed[1] * 2.0] == x[:, column].tolist()
    bias = parts["model.layers.1.mlp.experts.0.down_proj.scale_bias"]
    assert torch.equal(bias, 8 * x)


def test_a_row_of_zeros_stays_zero() -> None:
    form, name = Integers(MODEL), "model.layers.0.self_attn.o_proj.weight"
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
    for variant in ("bf16", "w8a8", "w4a8"):
        stored = TensorFolder(made.folder(variant))
        kinds = {stored.read(name).dtype for name in stored.names}
        assert kinds <= {torch.bfloat16, torch.float32, torch.int8, torch.int32}


def test_without_calibration_all_activations_are_scaled_as_they_come(tmp_path: Path) -> None:
    make_bundle(
        tmp_path,
        "ascend",
        variants=("w8a8",),
        calibration_rows=0,
        **LOOSE,
    )
    folder = files_of(tmp_path / "bundle") / "w8a8"
    rows = json.loads((folder / "quant_model_description.json").read_text())
    assert {"W8A8_DYNAMIC", "FLOAT"} == {v for k, v in rows.items() if k not in GLOBALS}
    assert rows["model_quant_type"] == "W8A8_DYNAMIC"


def test_mindie_finds_its_keys_on_request() -> None:
    name = "model.layers.0.self_attn.q_a_proj.weight"
    asked: list[tuple[Variant, dict[str, tuple[float, float]]]] = [
        ("w8a8", {name: (-1.0, 1.0)}),
        ("w8a8", {}),
        ("w4a8", {}),
    ]
    entries = [
        dict(Integers(MODEL, variant, ranges, mindie=True).config_entries)
        for variant, ranges in asked
    ]
    assert entries == [
        {"quantize": "w8a8_dynamic", "mla_quantize": "w8a8"},
        {"quantize": "w8a8_dynamic", "mla_quantize": "w8a8_dynamic"},
        {"quantize": "w4a8_dynamic", "mla_quantize": "w8a8_dynamic"},
    ]


@pytest.mark.parametrize(
    ("sizes", "settings", "message"),
    [
        (
            {"moe_intermediate_size": 72},
            {"variants": ("w4a8",)},
            r"moe_intermediate_size = 72 .* multiple of 16 and the second of 8; leave w4a8 out",
        ),
        ({"hidden_size": 132}, {"variants": ("w4a8",)}, "hidden_size = 132: .*leave w4a8 out"),
        ({"hidden_size": 120}, {"rotate": True}, "hidden_size = 120, of which 8 channels"),
        ({"engram": MODEL_ENGRAM.engram}, {"rotate": True}, "rotate = true, .* leave rotate out"),
    ],
)
def test_what_a_model_cannot_have_is_refused(
    sizes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    assert formats("ascend", MODEL, ExportConfig(**settings))
    model = MODEL.model_copy(update=sizes)
    assert formats("ascend", model)
    with pytest.raises(ExportError, match=message):
        formats("ascend", model, ExportConfig(**settings))


@pytest.mark.parametrize("variant", ["w8a8", "w4a8"])
def test_what_is_written_is_read_back(made: Made, variant: str) -> None:
    """By the reader of folders from elsewhere, which shares no code with the format."""
    folder = made.folder(variant)
    read = to_hf(made.model, load_pretrained(folder).state_dict())
    form = Integers(made.model, cast_variant(variant), ranges_of(made, folder))
    stored = TensorFolder(folder)
    for name, tensor in read.items():
        meant = form.decode(name, stored.read).to(tensor.dtype)
        torch.testing.assert_close(tensor, meant, rtol=3e-7, atol=0)


def cast_variant(name: str) -> Variant:
    assert name in ("w8a8", "w4a8")
    return "w8a8" if name == "w8a8" else "w4a8"


def ranges_of(made: Made, folder: Path) -> dict[str, tuple[float, float]]:
    """Which weights are static, whatever their ranges."""
    rows = json.loads((folder / "quant_model_description.json").read_text())
    return {name: (-1.0, 1.0) for name, kind in rows.items() if kind == "W8A8"}


def test_a_module_that_sees_nothing_of_a_short_row_has_the_range_it_had() -> None:
    seen = Range(torch.zeros(3), torch.ones(3))
    seen.widen(torch.empty(2, 0, 3))
    assert (seen.low_C.tolist(), seen.high_C.tolist()) == ([0, 0, 0], [1, 1, 1])


def test_a_card_of_integers_sends_nobody_to_transformers(made: Made) -> None:
    """It would take the integers for weights, without a word."""
    for variant in ("w8a8", "w4a8"):
        card = (made.folder(variant) / "README.md").read_text()
        assert "library_name" not in card
        assert "from_pretrained" not in card
        assert "| transformers 5.23.0 | no: integers" in card
    card = (made.folder("bf16") / "README.md").read_text()
    assert "library_name: transformers" in card


def test_a_scale_of_activations_has_a_reciprocal_that_bfloat16_holds() -> None:
    """Or nearly: of the smallest scale alone it is off by up to 2^-9, half a step of the largest of
    255; of the best of eight in a row by half as much."""
    worst = 0.0
    for high in torch.linspace(0.3, 7.0, 400).tolist():
        scale, offset = Static8(-0.4 * high, high).of_inputs()
        worst = max(worst, abs(float((1 / scale).bfloat16()) * float(scale) - 1))
        # 1.4 high is covered by 255 steps, of which at most one in 16 is left unused.
        assert 1 <= float(scale) * 255 / (1.4 * high) < 1.0079 + 8 * 2.0**-7
        assert -128 <= float(offset) <= 127
    assert worst <= 2.0**-10

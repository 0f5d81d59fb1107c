"""A variant that lacks a tensor, or has one too many, is found by its headers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from configs.errors import ArtifactError
from configs.v3 import V3Config
from stages.export import footprint
from stages.export.stored import check_tensors, kind_of, read_config, read_stored
from tests.stages.bundles import MODELS, make_bundle

LOOSE: dict[str, Any] = {
    "min_top1_agreement": 0.3,
    "max_kl_nats": 0.5,
    "max_bits_per_byte_rise": 0.5,
    "min_greedy_agreement": 0.0,
    "calibration_rows": 4,
    "problems": 0,
    "parity_prompts": 4,
}
HOMES = {"bf16": "cuda", "fp8": "cuda", "fp4": "cuda", "w8a8": "ascend", "w4a8": "ascend"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    """Folders by family and kind."""
    found = {}
    for family, model in MODELS.items():
        for target in ("cuda", "ascend"):
            root = tmp_path_factory.mktemp(f"{family}-{target}")
            kinds = [k for k, home in HOMES.items() if home == target]
            kinds = [k for k in kinds if k != "fp4" or family == "v4"]
            bundle, _ = make_bundle(root, target, model, variants=kinds, **LOOSE)
            for variant in bundle.parity:
                if HOMES[variant] == target:
                    found[family, variant] = bundle.path(variant)
    return found


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("kind", HOMES)
def test_what_export_writes_is_whole(
    made: dict[tuple[str, str], Path], family: str, kind: str
) -> None:
    if kind == "fp4" and family != "v4":
        assert (family, kind) not in made
        return
    folder = made[family, kind]
    config, stored = read_config(folder), read_stored(folder)
    assert kind_of(folder) == kind
    assert config == MODELS[family]
    check_tensors(folder, config, stored)
    bytes_on_disk = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    parts = footprint.parts(config, stored)
    assert sum(part.tensors for part in parts) == len(stored)
    # What the files hold beside tensors is their headers.
    assert 0 < bytes_on_disk - sum(part.bytes for part in parts) < 0.1 * bytes_on_disk
    names = {part.name for part in parts}
    assert {"routed experts", "shared experts", "MTP layer", "attention", "router"} <= names
    assert ("indexer" in names) == (family != "v3")


Change = Callable[[dict[str, Tensor]], None]


def _drop(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def _drop_all(part: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        gone = [name for name in tensors if part in name]
        assert gone
        for name in gone:
            del tensors[name]

    return change


def _cut(name: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:-1].clone()

    return change


def _copy(name: str, other: str) -> Change:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[other] = tensors[name].clone()

    return change


Q_A = "model.layers.0.self_attn.q_a_proj."
EXPERT = "model.layers.1.mlp.experts.5.down_proj.weight"
FAULTS = [
    ("v3", "bf16", _drop(EXPERT), f"{EXPERT} is missing"),
    ("v3", "bf16", _drop_all("layers.3."), r"model.layers.3.\S+ is missing"),
    ("v3", "bf16", _cut(EXPERT), rf"{EXPERT} has shape \[127, 128\], \[128, 128\] in the model"),
    ("v3", "bf16", _copy(EXPERT, EXPERT.replace(".5.", ".8.")), "experts.8.* no part of the model"),
    ("v3", "fp8", _drop(f"{EXPERT}_scale_inv"), "nothing lies beside it, which must be one of"),
    ("v3", "w8a8", _drop(f"{EXPERT}_offset"), "weight_scale lies beside it, which must be one of"),
    ("v3", "w8a8", _drop(f"{Q_A}quant_bias"), "deq_scale, input_offset, input_scale lies beside"),
    ("v3", "w8a8", _drop(f"{EXPERT}_scale"), "weight_offset lies beside it, which must be one of"),
    ("v3", "w4a8", _cut(f"{EXPERT.removesuffix('weight')}scale_bias"), "scale_bias has shape"),
    ("v32", "fp8", _drop_all("indexer"), r"indexer\S+ is missing"),
    ("v4", "bf16", _drop_all("compressor"), r"compressor\S+ is missing"),
    ("v4", "fp8", _drop_all("mtp.0."), r"mtp.0.\S+ is missing"),
]


@pytest.mark.parametrize(("family", "kind", "change", "message"), FAULTS)
def test_a_lost_or_foreign_tensor_is_named(
    made: dict[tuple[str, str], Path],
    tmp_path: Path,
    family: str,
    kind: str,
    change: Change,
    message: str,
) -> None:
    """Even where the index, which is written again, agrees with the files."""
    folder = tmp_path / kind
    shutil.copytree(made[family, kind], folder)
    (path,) = folder.glob("*.safetensors")
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    index = {
        "metadata": {"total_size": sum(one.nbytes for one in tensors.values())},
        "weight_map": dict.fromkeys(tensors, path.name),
    }
    for name in folder.glob("*.index.json"):
        name.write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match=message):
        check_tensors(folder, read_config(folder), read_stored(folder))


def test_an_index_or_description_of_other_files_is_named(
    made: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "w8a8"
    shutil.copytree(made["v3", "w8a8"], folder)
    config, stored = read_config(folder), read_stored(folder)
    description = folder / "quant_model_description.json"
    rows = json.loads(description.read_text())
    del rows[EXPERT]
    description.write_text(json.dumps(rows))
    with pytest.raises(ArtifactError, match=f"{EXPERT} is stored but not described"):
        check_tensors(folder, config, stored)
    for index in folder.glob("*.index.json"):
        body = json.loads(index.read_text())
        body["metadata"]["total_size"] += 1
        index.write_text(json.dumps(body))
    with pytest.raises(ArtifactError, match="total_size = "):
        check_tensors(folder, config, stored)


def test_a_description_of_another_type_than_what_is_stored_is_named(
    made: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = shutil.copytree(made["v3", "w8a8"], tmp_path / "w8a8")
    path = folder / "quant_model_description.json"
    rows = json.loads(path.read_text())
    path.write_text(json.dumps(rows | {EXPERT: "FLOAT"}))
    with pytest.raises(ArtifactError, match=f"{EXPERT} is said to be FLOAT, but is stored as I8"):
        check_tensors(folder, read_config(folder), read_stored(folder))


def test_a_cut_file_is_no_file_of_tensors(
    made: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "bf16"
    shutil.copytree(made["v3", "bf16"], folder)
    (path,) = folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ArtifactError, match="not a whole safetensors file"):
        read_stored(folder)


def test_the_released_v3_caches_70272_bytes_a_token() -> None:
    """61 layers, 512 + 64 values of two bytes."""
    released = V3Config()
    assert footprint.cache_bytes(released, 1) == 70_272
    assert footprint.cache_bytes(released, 1000) == 70_272_000


def test_v4_caches_a_window_and_a_share_of_what_is_behind() -> None:
    model = MODELS["v4"]
    # Window 8 in all four layers, ratio 4 with the indexer's key in two, ratio 8 in one.
    values = 4 * 8 * 32 + 2 * 16 * (32 + 32) + 8 * 32
    assert footprint.cache_bytes(model, 64) == 2 * values


def test_experts_are_shared_out_and_the_rest_is_on_each(
    made: dict[tuple[str, str], Path],
) -> None:
    folder = made["v3", "bf16"]
    config, stored = read_config(folder), read_stored(folder)
    one, two, *_ = footprint.spread(config, stored)
    experts = sum(entry.bytes for name, entry in stored.items() if ".experts." in name)
    assert one.bytes == sum(entry.bytes for entry in stored.values())
    assert one.bytes - two.bytes == experts // 2
    assert footprint.fewest([one, two], 10, one.bytes + 10) == 1
    assert footprint.fewest([one, two], 10, one.bytes + 9) == 2
    assert footprint.fewest([one, two], 10, two.bytes) is None

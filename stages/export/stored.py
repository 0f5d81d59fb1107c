"""What a variant's files hold, by their headers alone, against what its config says they must.

Bundles of this field are known to lose experts, indexers or MTP layers without a word; whoever
loads them finds random values or zeros there. So every tensor of the config's model must be stored
in its shape, every quantised weight with its scales, and nothing beside them.
"""

import json
import re
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from configs.errors import ArtifactError
from configs.model import ModelConfig
from model.transformer import Transformer
from model.weights import families
from model.weights.config import from_hf_config, read_json, speaking_of, table_of
from stages.export.ascend import DESCRIPTION
from stages.export.companions import BESIDE, fault
from stages.export.formats import INDEX

_PACKED = frozenset({"I8", "U8", "F4"})
"""Types of which one byte may hold two values, along either dim."""
_QUANTISED = _PACKED | {"F8_E4M3"}
_GLOBAL = re.compile(r"model_quant_type|version|group_size|metadata|optional|\w+_type")
"""Rows of ModelSlim's description that are not tensors."""


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor, as the header of its file describes it."""

    file: str
    dtype: str
    """As safetensors call it, such as `BF16`."""
    shape: tuple[int, ...]
    bytes: int


def read_config(folder: Path) -> ModelConfig:
    """The model that `config.json` describes; ArtifactError if it cannot be read."""
    with speaking_of(folder):
        return from_hf_config(read_json(folder))


def kind_of(folder: Path) -> str:
    """Which variant a folder holds, whatever it is called: bf16, fp8, fp4, w8a8 or w4a8."""
    path = folder / DESCRIPTION
    if path.is_file():
        return "w4a8" if "W4A8_DYNAMIC" in _read_description(path).values() else "w8a8"
    with speaking_of(folder):
        config = read_json(folder)
    if "quantization_config" not in config:
        return "bf16"
    return "fp4" if config.get("expert_dtype") == "fp4" else "fp8"


def read_stored(folder: Path) -> dict[str, Stored]:
    """Every tensor in a folder's safetensors, by name.

    ArtifactError if there is none, a header is damaged, or a name occurs twice.
    """
    found: dict[str, Stored] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for name, one in _header(path):
            if name in found:
                raise ArtifactError(
                    f"{name} lies in {found[name].file} and in {one.file}; delete one of the files"
                )
            found[name] = one
    if not found:
        raise ArtifactError(f"{folder}: holds no safetensors; name the folder of a variant")
    return found


def check_tensors(folder: Path, config: ModelConfig, stored: Mapping[str, Stored]) -> None:
    """ArtifactError unless `stored` are the tensors of `config`, whole, and so its indices say."""
    _check_indices(folder, stored)
    expected = _expected(config)
    optional = table_of(config).copies(config).keys()
    for name, shape in expected.items():
        if name not in stored:
            if name in optional:
                continue
            raise ArtifactError(
                f"{folder}: {name} is missing, but config.json describes a model that has it; "
                "export again"
            )
        _check_shape(folder, name, stored[name], shape)
    modules = {
        name.rpartition(".")[0] for name in expected if _is_quantised(name, stored.get(name))
    }
    for name in stored.keys() - expected.keys():
        module, _, leaf = name.rpartition(".")
        if module not in modules or leaf not in BESIDE:
            raise ArtifactError(
                f"{folder}: {name} is stored, but no part of the model that config.json describes; "
                "take the files of one export"
            )
    for module in sorted(modules):
        beside = {
            leaf: stored[f"{module}.{leaf}"].shape
            for leaf in BESIDE
            if f"{module}.{leaf}" in stored
        }
        rows, columns = expected[f"{module}.weight"]
        if (wrong := fault(beside, rows, columns)) is not None:
            raise ArtifactError(
                f"{folder}: {module}.weight is stored as {stored[f'{module}.weight'].dtype}, but "
                f"{wrong}; export again"
            )
    _check_description(folder, stored)


def _expected(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors of a model, by their stored names."""
    with torch.device("meta"):
        state = Transformer(config).state_dict()
    return {name: tuple(x.shape) for name, x in families.to_hf(config, state).items()}


def _header(path: Path) -> Iterator[tuple[str, Stored]]:
    """The tensors that a file's header names; each must lie within the file."""
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            room = path.stat().st_size - 8 - length
            if room < 0:
                raise ValueError("it ends within its header")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        for name, one in header.items():
            begin, end = one["data_offsets"]
            if not 0 <= begin <= end <= room:
                raise ValueError(f"{name} ends after byte {room:,} of its data")
            yield name, Stored(path.name, one["dtype"], tuple(one["shape"]), end - begin)
    except (OSError, struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(
            f"{path}: not a whole safetensors file ({error}); copy it again, or export again"
        ) from None


def _check_indices(folder: Path, stored: Mapping[str, Stored]) -> None:
    """Every index names exactly these tensors, their files and their bytes."""
    paths = sorted(folder.glob("*.safetensors.index.json"))
    if not paths and len({one.file for one in stored.values()}) > 1:
        raise ArtifactError(f"{folder / INDEX}: no such file, but there are several weight files")
    lies_in = {name: one.file for name, one in stored.items()}
    total = sum(one.bytes for one in stored.values())
    for path in paths:
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            weight_map, told = dict(index["weight_map"]), index["metadata"]["total_size"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ArtifactError(
                f"{path}: not an index of tensors ({error!r}); export again"
            ) from None
        if wrong := sorted(weight_map.items() ^ lies_in.items()):
            raise ArtifactError(
                f"{path}: disagrees with the weight files about {wrong[0][0]}; export again"
            )
        if told != total:
            raise ArtifactError(
                f"{path}: total_size = {told}, but the tensors have {total} bytes; export again"
            )


def _check_shape(folder: Path, name: str, one: Stored, shape: tuple[int, ...]) -> None:
    packed = one.dtype in _PACKED and 2 * prod(one.shape) == prod(shape)
    if one.shape != shape and not packed:
        raise ArtifactError(
            f"{folder}: {name} has shape {list(one.shape)}, {list(shape)} in the model that "
            "config.json describes; take the files of one export"
        )


def _check_description(folder: Path, stored: Mapping[str, Stored]) -> None:
    """ModelSlim's description, if there is one, has a row for each tensor and for no other."""
    path = folder / DESCRIPTION
    if not path.is_file():
        return
    told = _read_description(path)
    rows = {name for name in told if not _GLOBAL.fullmatch(name)}
    if wrong := sorted(rows ^ stored.keys()):
        raise ArtifactError(
            f"{path}: {wrong[0]} is "
            + ("described but not stored" if wrong[0] in rows else "stored but not described")
            + "; export again"
        )
    for name, one in stored.items():
        if name.endswith(".weight") and (told[name] == "FLOAT") == (one.dtype == "I8"):
            raise ArtifactError(
                f"{path}: {name} is said to be {told[name]}, but is stored as {one.dtype}; export "
                "again"
            )


def _read_description(path: Path) -> dict[str, Any]:
    """Rows by tensor, and what is said of the whole."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise ArtifactError(f"{path}: cannot be read ({error}); export again") from None


def _is_quantised(name: str, one: Stored | None) -> bool:
    return name.endswith(".weight") and one is not None and one.dtype in _QUANTISED

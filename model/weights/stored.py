"""The tensors of a model's folder by name, read from disk one at a time, at full width.

A folder holds one `model.safetensors`, or several files with an index that says which tensor lies
where, or several without. Weights in FP8 or FP4 come with their scales as tensors of their own;
here they appear as one float32 weight.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import ArtifactError
from model.weights.scaled import widen

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_QUANTISED = frozenset({"F8_E4M3", "I8", "U8"})
_NUMBERED = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")


class StoredTensors(Mapping[str, Tensor]):
    """Stored tensors by name. Bytes are mapped, and read when a tensor is asked for."""

    def __init__(self, folder: Path, tile: tuple[int, int]) -> None:
        """Read the headers; `tile` is the block of FP8 weights.

        ArtifactError names the file or tensor that is missing, damaged or in two places.
        """
        self._open: dict[str, Any] = {}  # safetensors gives its reader no public type
        self._file_of: dict[str, str] = {}
        self._tile = tile
        index = folder / INDEX
        listed = _read_index(index) if index.is_file() else None
        for file in sorted(set(listed.values())) if listed is not None else _files(folder):
            self._add(folder / file)
        if listed is not None:
            self._check_index(index, listed)
        self._scales_of = self._find_scales()
        self._names = [name for name in self._file_of if name not in self._scales_of.values()]

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, as stored, or widened to float32 if it was stored with scales."""
        scales = self._scales_of.get(name)
        if scales is None:
            return self._read(name)
        return widen(name, self._read(name), self._read(scales), self._tile)

    def __iter__(self) -> Iterator[str]:
        """Names, without those of scales."""
        return iter(self._names)

    def __len__(self) -> int:
        """Tensors, without scales."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; nothing is read."""
        return name in self._file_of and name not in self._scales_of.values()

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file; the checkpoint is incomplete")
        try:
            file = self._open[path.name] = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ArtifactError(f"{path}: not a whole safetensors file: {error}") from None
        for name in file.keys():  # noqa: SIM118 - it is not iterable itself
            if name in self._file_of:
                raise ArtifactError(
                    f"{name} lies in {self._file_of[name]} and in {path.name}; delete one of the "
                    "files"
                )
            self._file_of[name] = path.name

    def _check_index(self, index: Path, listed: Mapping[str, str]) -> None:
        for name, file in listed.items():
            if self._file_of.get(name) != file:
                raise ArtifactError(f"{index}: {name} should lie in {file}, but is not there")
        for name, file in self._file_of.items():
            if name not in listed:
                raise ArtifactError(f"{index}: does not list {name}, which lies in {file}")

    def _find_scales(self) -> dict[str, str]:
        """Names of quantised weights -> names of their scales."""
        found = {}
        for name, file in self._file_of.items():
            kind = str(self._open[file].get_slice(name).get_dtype())
            if kind not in _QUANTISED or not name.endswith("weight"):
                continue
            possible = (f"{name}_scale_inv", f"{name.removesuffix('.weight')}.scale")
            scales = next((one for one in possible if one in self._file_of), None)
            if scales is None:
                raise ArtifactError(
                    f"{name} is stored as {kind}, but its scales are missing: there is neither "
                    f"{possible[0]} nor {possible[1]}"
                )
            found[name] = scales
        return found

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._file_of[name]].get_tensor(name)
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    """Tensor names -> file names, as the index has them."""
    try:
        listed = json.loads(path.read_text())["weight_map"]
        files = {str(name): str(file) for name, file in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path}: not an index of tensors: {error!r}") from None
    if outside := [file for file in files.values() if Path(file).name != file]:
        raise ArtifactError(f"{path}: names {outside[0]!r}, which is no file of its folder")
    return files


def _files(folder: Path) -> list[str]:
    """The weight files of a folder without an index; none may be missing of a numbered set."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    names = sorted(path.name for path in folder.glob("*.safetensors"))
    if not names:
        raise ArtifactError(f"{folder / WEIGHTS}: no such file; the checkpoint is incomplete")
    numbered = [(name, match) for name in names if (match := _NUMBERED.fullmatch(name))]
    for name, match in numbered:
        number, count = match.groups()
        for wanted in range(1, int(count) + 1):
            other = name.replace(f"-{number}-of-", f"-{wanted:0{len(number)}d}-of-")
            if other not in names:
                raise ArtifactError(
                    f"{folder / other}: no such file, but {name} is one of {int(count)}; the "
                    "checkpoint is incomplete"
                )
    return names

"""The tensors of a model's folder by name, read from disk one at a time, at full width.

A folder holds one `model.safetensors`, or several files with an index that says which tensor lies
where, or several without. Weights in FP8, FP4 or INT8 come with their scales as tensors of their
own; here they appear as one float32 weight. What servers scale activations by is passed over.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import ArtifactError
from model.weights.reading import (
    INDEX,
    SUFFIX,
    WEIGHTS,
    missing_weights,
    read_json_file,
    require_not_pointer,
    require_safetensors,
)
from model.weights.scaled import FP8, INT8, UINT8, scales_of, widen, widen_integers

_QUANTISED = frozenset({FP8, INT8, UINT8})
_OF_ACTIVATIONS = ("activation_scale", "input_scale")
"""Beside FP8 weights of a static scheme; they say nothing of the weights."""
_NUMBERED = re.compile(r".*-(\d+)-of-(\d+)\.safetensors")


class StoredTensors(Mapping[str, Tensor]):
    """Stored tensors by name. Bytes are mapped, and read when a tensor is asked for."""

    def __init__(self, folder: Path, tile: tuple[int, int] | None) -> None:
        """Read the headers; `tile` is the block of FP8 weights, none if it is the whole matrix.

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
        hidden = {one for scales in self._scales_of.values() for one in scales}
        hidden |= self._scales_of_activations()
        self._names = dict.fromkeys(name for name in self._file_of if name not in hidden)

    def __getitem__(self, name: str) -> Tensor:
        """One tensor, as stored, or widened to float32 if it was stored with scales."""
        match self._scales_of.get(name, ()):
            case ():
                return self._read(name)
            case (scales,):
                return widen(name, self._read(name), self._read(scales), self._tile)
            case names:
                beside = [self._read(one) for one in names]
                return widen_integers(name, self._read(name), names, beside)

    def __iter__(self) -> Iterator[str]:
        """Names, without those of scales."""
        return iter(self._names)

    def __len__(self) -> int:
        """Tensors, without scales."""
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; nothing is read."""
        return name in self._names

    def _add(self, path: Path) -> None:
        if not path.is_file():
            raise ArtifactError(
                f"{path}: no such file; the checkpoint is incomplete, so fetch the file"
            )
        require_safetensors(path.parent, path.name)
        require_not_pointer(path)
        try:
            file = self._open[path.name] = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ArtifactError(
                f"{path}: not a whole safetensors file: {error}; fetch the file again"
            ) from None
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
                raise ArtifactError(
                    f"{index}: {name} should lie in {file}, but is not there; take the index and "
                    "the files of one save"
                )
        for name, file in self._file_of.items():
            if name not in listed:
                raise ArtifactError(
                    f"{index}: does not list {name}, which lies in {file}; take the index and the "
                    "files of one save"
                )

    def _find_scales(self) -> dict[str, tuple[str, ...]]:
        """Names of quantised weights -> names of their scales."""
        stored = self._file_of.keys()
        return {
            name: scales_of(name, self._kind(name), stored)
            for name in stored
            if name.endswith("weight") and self._kind(name) in _QUANTISED
        }

    def _scales_of_activations(self) -> set[str]:
        quantised = [name for name in self._scales_of if self._kind(name) == FP8]
        return {
            f"{name.removesuffix('weight')}{leaf}" for name in quantised for leaf in _OF_ACTIVATIONS
        }

    def _kind(self, name: str) -> str:
        """What safetensors calls the type of a stored tensor."""
        return str(self._open[self._file_of[name]].get_slice(name).get_dtype())

    def _read(self, name: str) -> Tensor:
        tensor: Tensor = self._open[self._file_of[name]].get_tensor(name)
        return tensor


def _read_index(path: Path) -> dict[str, str]:
    """Tensor names -> file names, as the index has them."""
    raw = read_json_file(path)
    listed = raw.get("weight_map") if isinstance(raw, dict) else None
    if not isinstance(listed, dict) or not all(isinstance(file, str) for file in listed.values()):
        raise ArtifactError(
            f"{path}: not an index of tensors: it has no weight_map from names to files; take the "
            "index of the save, or delete it if all files are there"
        )
    files: dict[str, str] = listed
    if outside := [file for file in files.values() if Path(file).name != file]:
        raise ArtifactError(
            f"{path}: names {outside[0]!r}, which is no file of its folder; take the index of the "
            "save, or delete it if all files are there"
        )
    return files


def _files(folder: Path) -> list[str]:
    """The weight files of a folder without an index; none may be missing of a numbered set."""
    if (folder / WEIGHTS).is_file():
        return [WEIGHTS]
    names = sorted(path.name for path in folder.glob(f"*{SUFFIX}"))
    if not names:
        raise missing_weights(folder, WEIGHTS)
    numbered = [(name, match) for name in names if (match := _NUMBERED.fullmatch(name))]
    for name, match in numbered:
        number, count = match.groups()
        for wanted in range(1, int(count) + 1):
            other = name.replace(f"-{number}-of-", f"-{wanted:0{len(number)}d}-of-")
            if other not in names:
                raise ArtifactError(
                    f"{folder / other}: no such file, but {name} is one of {int(count)}; the "
                    "checkpoint is incomplete, so fetch the file"
                )
    return names

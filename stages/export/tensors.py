"""Weights on disk: a folder of safetensors read by name, and written shard by shard.

Writing holds one shard and one source tensor in memory at a time, whatever the model's size; so a
model is never cut by hand, and a 600 GB one is exported by the same lines as a 3 MB one.
"""

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import ExportError
from stages.export.formats import INDEX, Format


class TensorFolder:
    """Every tensor in a folder's `*.safetensors`, by name; bytes are mapped, not loaded."""

    def __init__(self, folder: Path) -> None:
        """Read the headers; ExportError if there are no tensors or one lies in two files."""
        self.folder = folder
        self.file_of: dict[str, str] = {}
        self._open: dict[str, Any] = {}  # safetensors gives its reader no public type
        for path in sorted(folder.glob("*.safetensors")):
            try:
                self._open[path.name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise ExportError(f"{path}: not a whole safetensors file: {error}") from None
            for name in self._open[path.name].keys():  # noqa: SIM118 - it is not iterable itself
                if name in self.file_of:
                    raise ExportError(
                        f"{folder}: tensor {name} lies in {self.file_of[name]} and in "
                        f"{path.name}; delete one of the files"
                    )
                self.file_of[name] = path.name
        if not self.file_of:
            raise ExportError(f"{folder}: holds no safetensors; name the folder of a model")

    @property
    def names(self) -> list[str]:
        """All names, layers in numerical order."""
        return sorted(self.file_of, key=_natural)

    def read(self, name: str) -> Tensor:
        """One tensor, as stored; ExportError if there is none of that name."""
        if name not in self.file_of:
            raise ExportError(f"{self.folder}: tensor {name} is missing; export again")
        tensor: Tensor = self._open[self.file_of[name]].get_tensor(name)
        return tensor

    def kind(self, name: str) -> str:
        """What safetensors calls the type of a tensor, such as `I8`; reads headers only."""
        return str(self._open[self.file_of[name]].get_slice(name).get_dtype())

    def count_values(self) -> int:
        """Elements of all tensors together; reads headers only."""
        slices = (self._open[file].get_slice(name) for name, file in self.file_of.items())
        return sum(torch.Size(one.get_shape()).numel() for one in slices)

    def check_index(self) -> None:
        """ExportError unless the index names exactly these tensors, files and bytes."""
        path = self.folder / INDEX
        index = json.loads(path.read_text())
        wrong = sorted(index["weight_map"].items() ^ self.file_of.items())
        if wrong:
            raise ExportError(f"{path}: disagrees with the files about {wrong[0]}; export again")
        total = sum(self.read(name).nbytes for name in self.file_of)
        if index["metadata"]["total_size"] != total:
            raise ExportError(
                f"{path}: total_size = {index['metadata']['total_size']}, but the tensors have "
                f"{total} bytes; export again"
            )


class Reading(Mapping[str, Tensor]):
    """Tensors by name, each read when it is asked for."""

    def __init__(self, names: Iterable[str], read: Callable[[str], Tensor]) -> None:
        """`read` gives the tensor of a name."""
        self._names, self._read = dict.fromkeys(names), read

    def __getitem__(self, name: str) -> Tensor:
        """What `read` gives; KeyError for a name that is not among them."""
        if name not in self._names:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        """Whether there is such a tensor; nothing is read."""
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        """The names, in their order."""
        return iter(self._names)

    def __len__(self) -> int:
        """How many there are."""
        return len(self._names)


def write_weights(
    source: TensorFolder,
    form: Format,
    folder: Path,
    *,
    max_shard_bytes: int,
    before_write: Callable[[], None],
) -> int:
    """Write `source` into `folder` as `form` says, with its index; returns the tensors' bytes.

    A shard is closed before the source tensor that would take it over `max_shard_bytes`; a tensor
    larger than that has a shard of its own. `before_write` runs before each file is written, and
    stops the export by raising. ExportError if a source tensor holds a value that is not finite.
    """
    weight_map: dict[str, str] = {}
    drafts: list[tuple[Path, list[str]]] = []
    total_bytes = 0
    for shard in _shards(source, form, max_shard_bytes):
        draft = folder / f"{form.stem}-{len(drafts) + 1:05d}.draft"
        before_write()
        save_file(shard, draft, metadata={"format": "pt"})
        # safetensors makes files that only their owner can read; a server may be someone else.
        draft.chmod(folder.stat().st_mode & 0o666)
        drafts.append((draft, list(shard)))
        total_bytes += _bytes(shard)
        shard.clear()
    for number, (draft, names) in enumerate(drafts, start=1):
        file = f"{form.stem}-{number:05d}-of-{len(drafts):05d}.safetensors"
        os.replace(draft, folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    for index_name in form.index_names:
        write_json(folder / index_name, index)
    return total_bytes


def write_json(path: Path, body: Any) -> None:
    """Write any JSON value, two spaces deep; keys keep the order they were put in."""
    path.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _shards(
    source: TensorFolder, form: Format, max_shard_bytes: int
) -> Iterable[dict[str, Tensor]]:
    """Each shard is one and the same dict: the caller empties it before asking for the next."""
    shard: dict[str, Tensor] = {}
    for name in source.names:
        x = source.read(name)
        if not torch.isfinite(x).all():
            raise ExportError(
                f"tensor {name}: {int((~torch.isfinite(x)).sum())} of {x.numel()} values are not "
                "finite; export a checkpoint from before the training broke"
            )
        encoded = form.encode(name, x.float() if x.is_floating_point() else x)
        if shard and _bytes(shard) + _bytes(encoded) > max_shard_bytes:
            yield shard
        shard |= encoded
    yield shard


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def _natural(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts `layers.2` before `layers.10`."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in name.split("."))

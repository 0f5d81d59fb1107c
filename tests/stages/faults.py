"""Faults for bundles: what an exporter could do wrong, done to a variant's folder on disk.

Each fault leaves the folder as an exporter would that made this mistake and no other: indexes and
description agree with the weights, unless they are the fault. It returns names, of tensors or
files; whoever proves the folder must name one of them. Faults that are drawn take whichever tensor
a seed chooses among those that the format stores, so they know no format.
"""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from stages.export.formats import INDEX, Format

DESCRIPTION = "quant_model_description.json"
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Written:
    """A variant's folder as the exporter left it."""

    folder: Path
    form: Format
    source: tuple[str, ...]
    """The source's tensors."""

    def owner(self, part: str) -> str:
        """The source tensor of which `part` is stored."""
        return next(name for name in self.source if part in self.form.parts(name))

    def named(self, *parts: str) -> set[str]:
        """Stored tensors, and those of the source that they are of: either may be named."""
        return {*parts, *map(self.owner, parts)}

    def tensors(self) -> Tensors:
        """All that is stored, as it is stored."""
        every = (load_file(path) for path in sorted(self.folder.glob("*.safetensors")))
        return {name: tensor for one in every for name, tensor in one.items()}

    def write(self, tensors: Tensors) -> None:
        """Store these instead, in one file, with indexes and a description that agree."""
        for path in self.folder.glob("*.safetensors"):
            path.unlink()
        file = f"{self.form.stem}-00001-of-00001.safetensors"
        save_file({name: one.contiguous() for name, one in tensors.items()}, self.folder / file)
        total = sum(one.nbytes for one in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": dict.fromkeys(tensors, file)}
        for name in self.form.index_names:
            (self.folder / name).write_text(json.dumps(index))
        if (self.folder / DESCRIPTION).is_file():
            rows = self.read(DESCRIPTION)
            stored = {one for name in self.source for one in self.form.parts(name)}
            gone = stored - tensors.keys()
            self.put(DESCRIPTION, {k: v for k, v in rows.items() if k not in gone})

    def read(self, file: str) -> dict[str, Any]:
        """A JSON table."""
        found: dict[str, Any] = json.loads((self.folder / file).read_text())
        return found

    def put(self, file: str, record: dict[str, Any]) -> None:
        """Write a JSON table."""
        (self.folder / file).write_text(json.dumps(record))

    def change(self, file: str, **fields: Any) -> None:
        """Set fields of a JSON table; None takes one away."""
        record = self.read(file) | fields
        self.put(file, {name: value for name, value in record.items() if value is not None})


Fault = Callable[[Written], set[str]]


def without(*fragments: str) -> Fault:
    """An exporter that forgets all tensors whose names hold one of the fragments."""

    def plant(written: Written) -> set[str]:
        tensors = written.tensors()
        gone = [name for name in tensors if any(one in name for one in fragments)]
        assert gone, fragments
        written.write({name: one for name, one in tensors.items() if name not in gone})
        return set(gone)

    return plant


def exchanged(one: str, other: str) -> Fault:
    """An exporter that stores what belongs to `one` under the name of `other`, and the reverse."""

    def plant(written: Written) -> set[str]:
        tensors = written.tensors()
        pairs = [(name, name.replace(one, other)) for name in tensors if one in name]
        assert pairs
        moved = {b: tensors[a] for a, b in pairs} | {a: tensors[b] for a, b in pairs}
        written.write(tensors | moved)
        return written.named(*moved)

    return plant


def altered(name: str, alter: Callable[[Tensor], Tensor]) -> Fault:
    """An exporter that stores the source tensor `name`, or its first part, otherwise."""

    def plant(written: Written) -> set[str]:
        tensors = written.tensors()
        tensors[name] = alter(tensors[name])
        written.write(tensors)
        return written.named(name)

    return plant


def transposed(x: Tensor) -> Tensor:
    """The largest block of at most 128 x 128 in the corner, mirrored."""
    size = min(128, *x.shape)
    x = x.clone()
    x[:size, :size] = x[:size, :size].T.clone()
    return x


def drawn(seed: int) -> Fault:
    """A fault of a kind and at a tensor that the seed draws; `DRAWN` lists the kinds."""

    def plant(written: Written) -> set[str]:
        generator = random.Random(seed)
        tensors = written.tensors()
        for kind in generator.sample(sorted(DRAWN), len(DRAWN)):
            for name in generator.sample(sorted(tensors), min(20, len(tensors))):
                found = DRAWN[kind](written, dict(tensors), name, generator)
                if found is not None:
                    return found
        raise AssertionError("no fault fits any tensor")

    return plant


def _stored(alter: Callable[[Tensor, random.Random], Tensor | None]) -> Any:
    """A drawn fault of one tensor's values; none where they would stay the same."""

    def plant(
        written: Written, tensors: Tensors, name: str, generator: random.Random
    ) -> set[str] | None:
        x = alter(tensors[name].clone(), generator)
        if x is None or torch.equal(_bytes(x), _bytes(tensors[name])):
            return None
        written.write(tensors | {name: x})
        return written.named(name)

    return plant


def _bytes(x: Tensor) -> Tensor:
    return x.contiguous().view(-1).view(torch.uint8)


def _dropped(written: Written, tensors: Tensors, name: str, generator: random.Random) -> set[str]:
    del tensors[name]
    written.write(tensors)
    return {name}


def _swapped(
    written: Written, tensors: Tensors, name: str, generator: random.Random
) -> set[str] | None:
    """With a tensor of another owner that has the same type and shape and other values."""
    x = tensors[name]
    others = [
        other
        for other, y in sorted(tensors.items())
        if (y.dtype, y.shape) == (x.dtype, x.shape) and not torch.equal(_bytes(x), _bytes(y))
    ]
    if not others:
        return None
    other = generator.choice(others)
    written.write(tensors | {name: tensors[other], other: x})
    return written.named(name, other)


def _square(x: Tensor, generator: random.Random) -> Tensor | None:
    return transposed(_as_integers(x)).view(x.dtype) if x.dim() == 2 and min(x.shape) > 1 else None


def _rolled(x: Tensor, generator: random.Random) -> Tensor | None:
    return _as_integers(x).roll(1, 0).view(x.dtype) if x.dim() and len(x) > 1 else None


def _flipped(x: Tensor, generator: random.Random) -> Tensor:
    """The highest bit but one of an element: of a float, that of its exponent."""
    raw = _bytes(x).clone()
    size = x.element_size()
    at = generator.randrange(x.numel()) * size + size - 1
    raw[at] = raw[at] ^ 64
    return raw.view(x.dtype).view(x.shape)


def _zeroed(x: Tensor, generator: random.Random) -> Tensor | None:
    if not x.dim():
        return None
    x = _as_integers(x).clone()
    x[generator.randrange(len(x))] = 0
    return x.view(x.dtype)


def _doubled(x: Tensor, generator: random.Random) -> Tensor | None:
    if x.dtype == torch.float8_e8m0fnu:
        return (x.view(torch.uint8) + 1).view(x.dtype)
    return x * 2 if x.dtype in (torch.float32, torch.bfloat16) else None


def _as_integers(x: Tensor) -> Tensor:
    """The same bytes, of a type that every operation knows."""
    types = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.view(types[x.element_size()])


def _mislabelled(
    written: Written, tensors: Tensors, name: str, generator: random.Random
) -> set[str] | None:
    """A row of the description with another type."""
    if not (written.folder / DESCRIPTION).is_file():
        return None
    kind = written.read(DESCRIPTION)[name]
    kinds = {"FLOAT", "W8A8", "W8A8_DYNAMIC", "W4A8_DYNAMIC"} - {kind}
    written.change(DESCRIPTION, **{name: generator.choice(sorted(kinds))})
    return {DESCRIPTION}


def _unlabelled(
    written: Written, tensors: Tensors, name: str, generator: random.Random
) -> set[str] | None:
    """A row of the description that is missing."""
    if not (written.folder / DESCRIPTION).is_file():
        return None
    written.change(DESCRIPTION, **{name: None})
    return {name}


def _pointed_elsewhere(
    written: Written, tensors: Tensors, name: str, generator: random.Random
) -> set[str]:
    """A tensor that one of the indexes looks for in another file."""
    index = generator.choice(written.form.index_names)
    record = written.read(index)
    record["weight_map"][name] = f"{written.form.stem}-00002-of-00002.safetensors"
    written.put(index, record)
    return {name}


DRAWN: dict[str, Callable[[Written, Tensors, str, random.Random], set[str] | None]] = {
    "dropped": _dropped,
    "swapped": _swapped,
    "transposed": _stored(_square),
    "rows rolled": _stored(_rolled),
    "bit flipped": _stored(_flipped),
    "row zeroed": _stored(_zeroed),
    "doubled": _stored(_doubled),
    "row of another type": _mislabelled,
    "row missing": _unlabelled,
    "index pointing elsewhere": _pointed_elsewhere,
}


def tokenizer(edit: Callable[[dict[str, Any]], object], *names: str) -> Fault:
    """Another tokenizer, by an edit of its record."""

    def plant(written: Written) -> set[str]:
        record = written.read("tokenizer.json")
        edit(record)
        written.put("tokenizer.json", record)
        return {f"tokenizer.json: {name}" for name in names}

    return plant


def field(file: str, name: str, value: Any) -> Fault:
    """Another value of one field of a JSON file; None takes the field away."""

    def plant(written: Written) -> set[str]:
        written.change(file, **{name: value})
        return {f"{file}: {name}"}

    return plant


def description(edit: Callable[[dict[str, Any]], str]) -> Fault:
    """An edit of the description, which returns the row that must be named."""

    def plant(written: Written) -> set[str]:
        rows = written.read(DESCRIPTION)
        name = edit(rows)
        written.put(DESCRIPTION, rows)
        return {name}

    return plant


def row_twice(written: Written) -> set[str]:
    """The first row of the description once more, of another type."""
    path = written.folder / DESCRIPTION
    name = next(iter(written.read(DESCRIPTION)))
    path.write_text(path.read_text().replace("{", f'{{"{name}": "W8A8_DYNAMIC", ', 1))
    return {name}


def second_index(written: Written) -> set[str]:
    """An index under another name that knows one tensor less."""
    others = [name for name in written.form.index_names if name != INDEX]
    record = written.read(others[0])
    name, _ = record["weight_map"].popitem()
    written.put(others[0], record)
    return {name}


def names_of(written: Written, fragment: str) -> Iterator[str]:
    """Stored tensors whose names hold the fragment."""
    return (name for name in written.tensors() if fragment in name)

"""The table of each family: Ingot's tensors and configuration <-> Hugging Face's.

A checkpoint is any mapping from stored names to tensors; `StoredTensors` reads them from files when
they are asked for, so that a model is never in memory twice.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from configs.errors import ArtifactError
from configs.model import ModelConfig
from model.transformer import Transformer
from model.weights.config import table_of
from model.weights.table import Narrowest, Part, Table

_DERIVED = "rotary_emb.inv_freq"
"""Ends the names of frequencies that early conversions stored and that follow from the config."""


def to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a whole model's state; tensors are views of the originals."""
    return dict(pair for name, tensor in state.items() for pair in released(config, name, tensor))


def released(config: ModelConfig, name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors, by name, that one of Ingot's is: its parts, and their copies if any."""
    table = table_of(config)
    copies = table.copies(config)
    for part in table.parts(config, name):
        view = tensor[part.index] if part.index else tensor
        yield part.name, view
        yield from ((copy, view) for copy, one in copies.items() if one == part.name)


def from_hf(config: ModelConfig, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_hf`, of tensors under any of their names.

    ArtifactError names the tensor that is missing, unexpected or misshapen.
    """
    with torch.device("meta"):
        layout = Transformer(config).state_dict()
    return dict(assemble(config, layout, stored))


def assemble(
    config: ModelConfig,
    layout: Mapping[str, Tensor],
    stored: Mapping[str, Tensor],
    experts: Mapping[str, Sequence[int]] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Each tensor of `layout`, newly made of what is stored, one at a time.

    Types and devices are those of `layout`, whose values do not matter; a device that holds no
    values means the CPU. Nothing is read before all names are known to be right. Of a stacked
    module that `experts` names, only that range is made, and its other parts are never read.
    """
    table = table_of(config)
    found = {name: [*_locate(table.parts(config, name), stored)] for name in layout}
    copies = {copy: one for copy, one in table.copies(config).items() if copy in stored}
    expected = {name for pieces in found.values() for name, _ in pieces} | copies.keys()
    if strange := [n for n in stored if n not in expected and not n.endswith(_DERIVED)]:
        raise ArtifactError(
            f"{strange[0]} is in the checkpoint but not in the model that config.json describes; "
            "take the config that belongs to it"
        )
    for name, target in layout.items():
        local = (experts or {}).get(name.rpartition(".")[0])
        pieces = found[name] if local is None else [*_of_experts(found[name], local)]
        made = _assembled(target, pieces, stored)
        if name.endswith("tid2eid"):
            _check_experts(found[name][0][0], made, config.n_routed_experts)
        yield name, made
    names = {part.name: known for pieces in found.values() for known, part in pieces}
    for copy, one in copies.items():
        if not torch.equal(stored[copy], stored[names[one]]):
            raise ArtifactError(
                f"{copy} differs from {names[one]}, but this family shares them; "
                "take a checkpoint in which they are equal, or delete the copy"
            )


def as_stored(config: ModelConfig, names: Collection[str]) -> ModelConfig:
    """`config` without its MTP layer if none of that layer's tensors is among `names`.

    transformers drops the layer when it saves a model and leaves the field as it was.
    """
    prefix = table_of(config).mtp_prefix(config)
    if config.num_nextn_predict_layers and not any(name.startswith(prefix) for name in names):
        return type(config).model_validate({**dict(config), "num_nextn_predict_layers": 0})
    return config


def narrowest(config: ModelConfig, name: str) -> Narrowest:
    """The narrowest type in which the stored tensor `name` may be written."""
    return table_of(config).narrowest(name)


def fused(config: ModelConfig, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Of the stored `names`, those that servers load into one block-scaled matrix, in its order.

    Only groups of which all are there and may be FP8: what a compressor holds is not.
    """
    table, known = table_of(config), dict.fromkeys(names)
    return [
        group
        for name in known
        for group in _begun_by(table, name)
        if all(one in known and table.narrowest(one) == "float8" for one in group)
    ]


def _locate(parts: tuple[Part, ...], stored: Mapping[str, Tensor]) -> Iterator[tuple[str, Part]]:
    """Each part with the name under which it is stored."""
    for part in parts:
        name = next((name for name in part.names if name in stored), None)
        if name is None:
            raise ArtifactError(
                f"{part.name} is missing from the checkpoint, but config.json describes a model "
                "that has it; complete the files, or take the config that belongs to them"
            )
        yield name, part


def _assembled(
    target: Tensor, pieces: list[tuple[str, Part]], stored: Mapping[str, Tensor]
) -> Tensor:
    made = torch.empty_like(target, device="cpu" if target.is_meta else target.device)
    for name, part in pieces:
        source, place = stored[name], made[part.index] if part.index else made
        if source.shape != place.shape:
            raise ArtifactError(
                f"{name} has shape {list(source.shape)} in the checkpoint, "
                f"{list(place.shape)} in the model that config.json describes; take the config "
                "that belongs to it"
            )
        if source.is_floating_point() != place.is_floating_point():
            raise ArtifactError(
                f"{name} is stored as {source.dtype}, but the model needs {place.dtype}; take the "
                "file that belongs to config.json"
            )
        place.copy_(source)
    return made


def _of_experts(
    pieces: Iterable[tuple[str, Part]], local: Sequence[int]
) -> Iterator[tuple[str, Part]]:
    """The parts of some of a stack's experts, where they lie in a stack of these alone."""
    for name, part in pieces:
        expert, *rest = part.index
        assert isinstance(expert, int)
        if expert in local:
            yield name, replace(part, index=(local.index(expert), *rest))


def _begun_by(table: Table, name: str) -> Iterator[tuple[str, ...]]:
    """The tensors that are fused with `name` in front, if any are."""
    prefix, _, module = name.removesuffix(".weight").rpartition(".")
    for modules in table.FUSED:
        if module == modules[0]:
            yield tuple(f"{prefix}.{one}.weight" for one in modules)


def _check_experts(name: str, table_VK: Tensor, experts: int) -> None:
    low, high = int(table_VK.min()), int(table_VK.max())
    if low < 0 or high >= experts:
        wrong = low if low < 0 else high
        raise ArtifactError(
            f"{name} names expert {wrong}, but n_routed_experts = {experts}; take the config.json "
            "that belongs to it"
        )

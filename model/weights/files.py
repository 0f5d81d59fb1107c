"""Models as folders: `config.json` and safetensors under the names of the released models."""

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.overrides import TorchFunctionMode

from configs.engram import TableDevice
from configs.errors import ArtifactError, ConfigError
from configs.model import ModelConfig
from configs.train import Precision
from model.fp8.scheme import Numerics
from model.transformer import Transformer
from model.weights import families
from model.weights.config import (
    from_hf_config,
    quantized_fields,
    read_json,
    speaking_of,
    table_of,
    to_hf_config,
)
from model.weights.quantization import read_tile
from model.weights.reading import INDEX, WEIGHTS
from model.weights.scaled import narrow
from model.weights.stored import StoredTensors
from model.weights.table import Table

SaveType = Literal["float32", "bfloat16", "float8"]
MAX_SHARD_BYTES = 5_000_000_000


def load_pretrained(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    precision: Precision | Numerics = "high",
    table_device: TableDevice = "model",
) -> Transformer:
    """The model in the folder `path`, in evaluation mode, its parameters of type `dtype`.

    Reads float32, bfloat16, float16, FP8, FP4 and ModelSlim's W8A8. What released models keep in
    float32 is never narrower than that. With `table_device="host"`, tables of an Engram stay in
    main memory whatever the `device`. ArtifactError names the file, field or tensor that is
    missing, unexpected or misshapen; no weight is ever left at a random value. ConfigError if
    `precision` cannot be computed in `dtype`.
    """
    fp8 = (precision.precision if isinstance(precision, Numerics) else precision) == "fp8"
    if fp8 and torch.device(device).type == "cpu" and dtype != torch.float32:
        raise ConfigError(
            f"dtype = {dtype} with precision = 'fp8', which CPUs compute in float32; load with "
            "dtype=torch.float32, or with precision='high'"
        )
    with speaking_of(Path(path)):
        config, stored = open_pretrained(Path(path))
        if config.engram is not None:
            engram = config.engram.model_copy(update={"table_device": table_device})
            config = config.model_copy(update={"engram": engram})
        with _Unallocated():
            model = Transformer(config, precision=precision)
        layout = _layout(model, dtype)
        model.load_state_dict(dict(families.assemble(config, layout, stored)), assign=True)
    return model.to(device).eval()


def open_pretrained(folder: Path) -> tuple[ModelConfig, StoredTensors]:
    """A folder's config and tensors; the config has an MTP layer only if tensors of one are there.

    ArtifactError if either cannot be read.
    """
    raw = read_json(folder)
    stored = StoredTensors(folder, read_tile(raw))
    return families.as_stored(from_hf_config(raw), list(stored)), stored


def save_pretrained(
    model: Transformer,
    path: str | Path,
    *,
    dtype: SaveType = "float32",
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write a whole model (all experts on this device) into the folder `path`.

    `float8` stores the matrices that the released models of the family quantise as E4M3 in blocks
    of 128 x 128, and the rest as `bfloat16` does; there, what released models keep in float32 stays
    so. A file is closed before the tensor that would take it over `max_shard_bytes`. ConfigError
    for another `dtype`.
    """
    _check_type(dtype)
    config, table = model.config, table_of(model.config)
    renamed = families.to_hf(config, {n: t.detach() for n, t in model.state_dict().items()})
    fields = to_hf_config(config)
    if dtype != "float32":
        fields["dtype"] = "bfloat16"
    if dtype == "float8":
        fields |= quantized_fields(table.quantization())
    encoded = (
        pair for name in _sorted(renamed) for pair in _encoded(table, name, renamed[name], dtype)
    )
    _write(fields, encoded, Path(path), max_shard_bytes)


def write_checkpoint(
    config: ModelConfig,
    tensors: Mapping[str, Tensor],
    folder: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write tensors that already bear Hugging Face names in float32, and their config.json."""
    table = table_of(config)
    encoded = (
        pair
        for name in _sorted(tensors)
        for pair in _encoded(table, name, tensors[name], "float32")
    )
    _write(to_hf_config(config), encoded, folder, max_shard_bytes)


def consolidate(source: Path, folder: Path) -> ModelConfig:
    """Write the model folder `source` into `folder` in float32; its config.

    One of Ingot's tensors is in memory at a time, however large the model; in layers with experts
    that is a layer's. ArtifactError as of `load_pretrained`, and for a value that is no number.
    """
    with speaking_of(source):
        config, stored = open_pretrained(source)
        with torch.device("meta"):
            layout = Transformer(config).state_dict()
        table = table_of(config)
        encoded = (
            pair
            for name, tensor in families.assemble(config, layout, stored)
            for released, part in families.released(config, name, tensor)
            for pair in _encoded(table, released, _finite(released, part), "float32")
        )
        _write(to_hf_config(config), encoded, folder, MAX_SHARD_BYTES)
    return config


def load_state(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy Hugging Face named tensors into `model`; ArtifactError unless they fit exactly."""
    own = model.state_dict()
    with torch.no_grad():
        for name, tensor in families.assemble(model.config, own, tensors):
            own[name].copy_(tensor)


def read_tensors(folder: Path) -> StoredTensors:
    """The tensors of a model folder, read when they are asked for."""
    return StoredTensors(folder, read_tile(read_json(folder)))


def _finite(name: str, x: Tensor) -> Tensor:
    if not bool(x.isfinite().all()):
        raise ArtifactError(
            f"{name} holds values that are not finite; training had diverged, or the file is "
            "damaged: take another save"
        )
    return x


class _Unallocated(TorchFunctionMode):
    """Gives memory asked for without values no place, so that weights cost nothing until loaded.

    Unlike on the meta device, tables that a module computes for itself have their values.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Send `torch.empty` to the meta device, and leave everything else alone."""
        kwargs = dict(kwargs or {})
        if func is torch.empty:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


def _check_type(dtype: str) -> None:
    known = get_args(SaveType)
    if dtype not in known:
        raise ConfigError(
            f"dtype = {dtype!r} is not one that is written; take {' or '.join(known)}"
        )


def _layout(model: Transformer, dtype: torch.dtype) -> dict[str, Tensor]:
    """Shapes and strides of the model's tensors and the types to load them in, without values."""
    layout = {}
    for name, tensor in model.state_dict().items():
        wanted = tensor.dtype
        if tensor.is_floating_point():
            stored_name = table_of(model.config).parts(model.config, name)[0].name
            kept = families.narrowest(model.config, stored_name) == "float32"
            wanted = torch.promote_types(dtype, torch.float32) if kept else dtype
        layout[name] = torch.empty_like(tensor, dtype=wanted, device="meta")
    return layout


def _encoded(table: Table, name: str, x: Tensor, dtype: SaveType) -> Iterator[tuple[str, Tensor]]:
    """The stored tensors, by name, for the tensor `name`."""
    narrowest = table.narrowest(name)
    if not x.is_floating_point():
        # A memory's ids and multipliers need all their bits.
        yield name, x.to(torch.int32) if narrowest == "int32" else x
    elif dtype == "float32" or narrowest == "float32":
        yield name, x.float()
    elif dtype == "float8" and narrowest == "float8":
        values, scales = narrow(x.float(), table.SCALES)
        yield name, values
        yield table.scale_name(name), scales
    else:
        yield name, x.to(torch.bfloat16)


def _write(
    fields: Mapping[str, Any],
    tensors: Iterable[tuple[str, Tensor]],
    folder: Path,
    max_shard_bytes: int,
) -> None:
    """Write config and tensors, one file in memory at a time; names settle when all are written."""
    folder.mkdir(parents=True, exist_ok=True)
    drafts: list[list[str]] = []
    shard: dict[str, Tensor] = {}
    total_bytes = shard_bytes = 0
    for name, tensor in tensors:
        if shard and shard_bytes + tensor.nbytes > max_shard_bytes:
            drafts.append(_write_draft(shard, folder, len(drafts)))
            shard, shard_bytes = {}, 0
        # safetensors refuses aliases, and slices of stacked experts are views of one storage.
        shard[name] = tensor.detach().clone().contiguous()
        shard_bytes += tensor.nbytes
        total_bytes += tensor.nbytes
    drafts.append(_write_draft(shard, folder, len(drafts)))
    _remove_earlier(folder)
    (folder / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
    if len(drafts) == 1:
        os.replace(folder / _draft(0), folder / WEIGHTS)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(drafts):
        file = f"model-{number + 1:05d}-of-{len(drafts):05d}.safetensors"
        os.replace(folder / _draft(number), folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _write_draft(shard: dict[str, Tensor], folder: Path, number: int) -> list[str]:
    path = folder / _draft(number)
    save_file(shard, path, metadata={"format": "pt"})
    path.chmod(0o644)  # safetensors lets only the owner read
    return list(shard)


def _draft(number: int) -> str:
    return f"model-{number}.draft"


def _remove_earlier(folder: Path) -> None:
    """Take away the weights of an earlier save, which readers would find beside the new ones."""
    for path in (folder / INDEX, folder / WEIGHTS, *folder.glob("model-*-of-*.safetensors")):
        path.unlink(missing_ok=True)


def _sorted(names: Iterable[str]) -> list[str]:
    """Layers in numerical order."""
    return sorted(
        names, key=lambda name: [(int(p), "") if p.isdigit() else (-1, p) for p in name.split(".")]
    )

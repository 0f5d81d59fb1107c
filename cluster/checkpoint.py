"""Sharded saves that any number of ranks can read back.

A save is a folder of safetensors, one file a rank. Stacked experts are split into one tensor per
expert under `<name>#<global expert>`, so a reader with another slice takes just the experts it
holds. `complete.json`, written last by rank 0, makes the folder a save.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cluster.files import COMPLETE, sync_to_disk
from configs.errors import ArtifactError, MachineError
from configs.model import ModelConfig
from model.weights import families
from model.weights.files import write_checkpoint

FLOAT32 = "float32"
"""What a save was computed in whose mark does not say."""


def save_shard(
    folder: Path,
    tensors: Mapping[str, Tensor],
    experts: Mapping[str, Sequence[int]],
    *,
    rank: int,
    world: int,
) -> Path:
    """Write one rank's tensors; the file. Names under a key of `experts` are split by expert.

    Files that an interrupted save by another number of ranks left in `folder` are removed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / COMPLETE).unlink(missing_ok=True)
    for stale in set(folder.glob("rank-*")) - set(folder.glob(f"rank-*-of-{world}.*")):
        stale.unlink(missing_ok=True)
    split = by_expert(tensors, experts)
    path = folder / f"rank-{rank}-of-{world}.safetensors"
    draft = path.with_suffix(".draft")
    save_file(split, draft)
    _settle(draft, path)
    return path


def by_expert(
    tensors: Mapping[str, Tensor], experts: Mapping[str, Sequence[int]]
) -> dict[str, Tensor]:
    """On the host, with stacks of experts as one tensor each, under `<name>#<expert>`."""
    split: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        local, host = _experts_of(name, experts), tensor.detach().cpu()
        if local is None:
            split[name] = host.contiguous()
        else:
            rows = zip(local, host, strict=True)
            split |= {f"{name}#{expert}": row.clone() for expert, row in rows}
    return split


def merged(shards: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Whole tensors from what ranks hold of a model, as `by_expert` gives it."""
    found: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for shard in shards:
        for key, tensor in shard.items():
            name, _, expert = key.partition("#")
            if expert:
                pieces.setdefault(name, {})[int(expert)] = tensor
            else:
                found[name] = tensor
    for name, rows in pieces.items():
        if missing := set(range(max(rows) + 1)) - rows.keys():
            raise MachineError(f"no rank told expert {min(missing)} of {name}; run again")
        found[name] = torch.stack([rows[expert] for expert in sorted(rows)])
    return found


def load_shards(
    folder: Path,
    experts: Mapping[str, Sequence[int]] | None = None,
    *,
    wanted: Callable[[str], bool] = lambda name: True,
) -> dict[str, Tensor]:
    """The tensors of a save that are `wanted`; of stacked experts the given ones, in their order,
    or all of them when none are given.

    ArtifactError names a rank's file that is missing, or an expert that no file holds.
    """
    found: dict[str, Tensor] = {}
    pieces: dict[str, dict[int, Tensor]] = {}
    for path in _files(folder):
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118
                name, _, expert = key.partition("#")
                if not wanted(name):
                    continue
                if not expert:
                    found[name] = file.get_tensor(key)
                elif experts is None or int(expert) in (_experts_of(name, experts) or ()):
                    pieces.setdefault(name, {})[int(expert)] = file.get_tensor(key)
    for name, rows in pieces.items():
        order = range(len(rows)) if experts is None else _experts_of(name, experts) or ()
        missing = [expert for expert in order if expert not in rows]
        if missing:
            raise ArtifactError(
                f"{folder}: no file holds expert {missing[0]} of {name}; remove the folder and run "
                "again"
            )
        found[name] = torch.stack([rows[expert] for expert in order])
    return found


def mark_complete(folder: Path, facts: Mapping[str, object]) -> None:
    """Make `folder` a save; `facts` must hold its `step`."""
    draft = folder / f"{COMPLETE}.draft"
    draft.write_text(json.dumps(dict(facts)))
    _settle(draft, folder / COMPLETE)
    # The folder may be new, and older saves are deleted once this one counts.
    sync_to_disk(folder.parent)


def latest(*roots: Path) -> tuple[Path, int] | None:
    """The readable complete save under `roots` with the highest step, and that step.

    A save that a failing disk cut short is passed over for the one before it; of equal steps the
    one under the first of the roots counts.
    """
    folders = [folder for root in roots for folder in _step_folders(root)]
    for folder in sorted(folders, key=lambda path: path.name, reverse=True):
        if (step := complete_step(folder)) is not None:
            return folder, step
    return None


def consolidate(save: Path, config: ModelConfig, folder: Path) -> None:
    """Write the whole model of a sharded save into `folder`, under Hugging Face names."""
    tensors = load_shards(save)
    # What the optimiser knows stands under `<kind>/<parameter>`.
    state = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    write_checkpoint(config, families.to_hf(config, state), folder)


def prune(root: Path, *, keep: int, earlier: Sequence[Path] = ()) -> None:
    """Delete all but the `keep` newest complete saves, and incomplete ones older than those.

    Once there is a complete one, the saves of `earlier` builds are needed no more and go too.
    """
    marked = sorted(root.glob("step-*"), key=lambda path: path.name)
    complete = [path for path in marked if (path / COMPLETE).is_file()]
    for path in marked:
        if complete[-keep:] and path.name < complete[-keep:][0].name:
            shutil.rmtree(path, ignore_errors=True)
    for other in earlier if complete else ():
        shutil.rmtree(other, ignore_errors=True)


def prune_shards(root: Path, *, keep: int) -> None:
    """Delete the shards of all but the `keep` newest saves on a machine that has no marks."""
    for path in sorted(root.glob("step-*"), key=lambda path: path.name)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def step_folder(root: Path, step: int) -> Path:
    """Where the save of `step` stands."""
    return root / f"step-{step:08d}"


def _settle(draft: Path, path: Path) -> None:
    """Give a written file its name once its bytes are on the disk; return once the name is too."""
    sync_to_disk(draft)
    os.replace(draft, path)
    sync_to_disk(path.parent)


def _step_folders(root: Path) -> list[Path]:
    try:
        return list(root.glob("step-*"))
    except OSError:
        # Its builder is alive, and deletes it.
        return []


def complete_step(folder: Path) -> int | None:
    """The step of a save that is complete, each file as long as its own header says; else none.

    Its builder may be alive, and delete it at this moment.
    """
    try:
        step = int(json.loads((folder / COMPLETE).read_text())["step"])
        for path in _files(folder):
            with safe_open(path, framework="pt"):
                pass
    except (ArtifactError, SafetensorError, OSError, json.JSONDecodeError):
        return None
    return step


def require_compute(folder: Path, compute: str, device: str) -> None:
    """MachineError unless the training that saved `folder` computes in `compute`, as workers on
    `device` do: its losses would not be those of the training that was interrupted."""
    saved = json.loads((folder / COMPLETE).read_text()).get("compute", FLOAT32)
    where = "" if saved == FLOAT32 else " on a device, or a CPU with units for it,"
    if saved != compute:
        raise MachineError(
            f"cluster.compute: the save {folder} was computed in {saved}, and {device} computes in "
            f"{compute}; set it to {saved!r}{where} to go on, or delete the folder {folder.parent} "
            "to begin anew"
        )


def _files(folder: Path) -> list[Path]:
    """One file for each rank of the group that wrote the save."""
    present = sorted(folder.glob("rank-*.safetensors"))
    if not present:
        raise ArtifactError(f"{folder}: no rank's file is there; remove the folder and run again")
    world = int(present[0].stem.rpartition("-")[2])
    wanted = [folder / f"rank-{rank}-of-{world}.safetensors" for rank in range(world)]
    absent = [path for path in wanted if path not in present]
    if absent:
        raise ArtifactError(
            f"{absent[0]}: no such file, but {world} ranks wrote the save; remove the folder and "
            "run again"
        )
    return wanted


def _experts_of(name: str, experts: Mapping[str, Sequence[int]]) -> Sequence[int] | None:
    """The experts of a parameter or moment name, if it belongs to a stacked module."""
    parameter = name.rpartition("/")[2]
    return experts.get(parameter.rpartition(".")[0])

"""Models as folders: `config.json` and float32 safetensors under Hugging Face names."""

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from configs.errors import ArtifactError
from configs.model import ModelConfig
from configs.train import Precision
from model.transformer import Transformer
from model.weights import families

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def load_pretrained(folder: Path, *, precision: Precision = "high") -> Transformer:
    """The model in `folder`, in evaluation mode, float32.

    ArtifactError names the file or tensor that is missing, unexpected or misshapen; no weight is
    ever left at a random value.
    """
    config = read_config(folder)
    model = Transformer(config, precision=precision)
    load_state(model, read_tensors(folder))
    return model.eval()


def save_pretrained(model: Transformer, folder: Path) -> None:
    """Write a whole model (all experts on this device) as float32."""
    state = {name: tensor.detach().float() for name, tensor in model.state_dict().items()}
    write_checkpoint(model.config, families.to_hf(model.config, state), folder)


def write_checkpoint(config: ModelConfig, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Write tensors that already bear Hugging Face names, and their config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(families.to_hf_config(config), indent=2) + "\n")
    # safetensors refuses aliases, and slices of stacked experts are views of one storage.
    contiguous = {name: tensor.clone().contiguous() for name, tensor in sorted(tensors.items())}
    draft = folder / f"{WEIGHTS}.draft"
    save_file(contiguous, draft, metadata={"format": "pt"})
    draft.chmod(0o644)  # safetensors lets only the owner read
    os.replace(draft, folder / WEIGHTS)


def load_state(model: Transformer, tensors: Mapping[str, Tensor]) -> None:
    """Copy Hugging Face named tensors into `model`; ArtifactError unless they fit exactly."""
    state = families.from_hf(model.config, tensors)
    own = model.state_dict()
    for name in own:
        if name not in state:
            raise ArtifactError(f"{name} is missing from the checkpoint")
    for name, tensor in state.items():
        if name not in own:
            raise ArtifactError(f"{name} is in the checkpoint but not in the model")
        if tensor.shape != own[name].shape:
            raise ArtifactError(
                f"{name} has shape {list(tensor.shape)} in the checkpoint, "
                f"{list(own[name].shape)} in the model"
            )
    with torch.no_grad():
        for name, target in own.items():
            target.copy_(state[name])


def read_config(folder: Path) -> ModelConfig:
    """The model config in `folder/config.json`."""
    path = folder / "config.json"
    try:
        return families.from_hf_config(json.loads(path.read_text()))
    except FileNotFoundError:
        raise ArtifactError(f"{path}: no such file, so {folder} is not a model folder") from None
    except json.JSONDecodeError as error:
        raise ArtifactError(f"{path}: not valid JSON: {error}") from None


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a model folder, single file or sharded by an index."""
    index = folder / INDEX
    if index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    else:
        names = [WEIGHTS]
    tensors: dict[str, Tensor] = {}
    for name in names:
        path = folder / name
        if not path.is_file():
            raise ArtifactError(f"{path}: no such file; the checkpoint is incomplete")
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ArtifactError(f"{path}: not a whole safetensors file: {error}") from None
    return tensors

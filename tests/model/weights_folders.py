"""Folders of stored tensors that several tests write, and the models that they stand for."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from configs.model import ModelConfig
from model.transformer import Transformer
from model.weights.config import to_hf_config
from model.weights.families import from_hf
from model.weights.files import load_pretrained
from model.weights.reading import WEIGHTS
from tests.references import random_tokens

E2M1 = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def random_codes(shape: Sequence[int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(packed, exponents, what they mean): E2M1 by groups of 32 columns, read half by half."""
    rows, columns = shape
    generator = torch.Generator().manual_seed(seed)
    groups = math.ceil(columns / 32)
    packed = torch.randint(256, (rows, columns // 2), generator=generator, dtype=torch.uint8)
    exponents = torch.randint(119, 123, (rows, groups), generator=generator, dtype=torch.uint8)
    meant = []
    for halves, powers in zip(packed.tolist(), exponents.tolist(), strict=True):
        row = []
        for column in range(columns):
            byte = halves[column // 2]
            code = byte // 16 if column % 2 else byte % 16
            sign = -1.0 if code > 7 else 1.0
            row.append(sign * E2M1[code % 8] * 2.0 ** (powers[column // 32] - 127))
        meant.append(row)
    return packed.view(torch.int8), exponents, torch.tensor(meant)


def model_of(config: ModelConfig, meant: dict[str, Tensor]) -> Transformer:
    """The model with these stored tensors."""
    model = Transformer(config)
    model.load_state_dict(from_hf(config, meant))
    return model.eval()


def write(folder: Path, stored: dict[str, Tensor]) -> Path:
    """Write the tensors into one file of `folder`, which is returned."""
    tensors = {name: tensor.contiguous() for name, tensor in stored.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    return folder


def write_config(folder: Path, config: ModelConfig) -> None:
    """Write a `config.json` that names no quantisation."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))


def edit_config(folder: Path, **changes: object) -> None:
    """Set some fields of `config.json`."""
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def assert_loads_as(folder: Path, expected: Transformer) -> None:
    """Every tensor is loaded as `expected` has it, and the logits of a text are equal."""
    model = load_pretrained(folder)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name
    tokens = random_tokens(2, 12)
    with torch.no_grad():
        assert torch.equal(model(tokens), expected(tokens))

"""The table of each family: Ingot's tensors and configuration <-> Hugging Face's."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from configs.errors import ArtifactError
from configs.model import ModelConfig, V3Config
from model.weights import v3


def to_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a whole model's state; tensors are views of the originals where possible."""
    assert isinstance(config, V3Config)
    return v3.to_hf(config, state)


def from_hf(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `to_hf`; ArtifactError names a tensor that is missing or unexpected."""
    assert isinstance(config, V3Config)
    return v3.from_hf(config, state)


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """`config.json` as transformers writes it for a float32 model."""
    assert isinstance(config, V3Config)
    return v3.to_hf_config(config)


def from_hf_config(raw: Mapping[str, Any]) -> ModelConfig:
    """The reverse; ArtifactError names the field that no family here has."""
    if raw.get("model_type") != "deepseek_v3":
        raise ArtifactError(
            f"config.json: model_type = {raw.get('model_type')!r}, expected 'deepseek_v3'"
        )
    return v3.from_hf_config(raw)

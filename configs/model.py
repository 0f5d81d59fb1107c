"""The model families as one type: a config's `family` says which class reads it."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Discriminator, Tag, TypeAdapter

from configs.shape import Family, ModelConfig, YarnConfig
from configs.v3 import V3Config, V32Config
from configs.v4 import V4Config

__all__ = [
    "AnyModelConfig",
    "Family",
    "ModelConfig",
    "V3Config",
    "V4Config",
    "V32Config",
    "YarnConfig",
    "model_config",
]


def _family(raw: Any) -> str:
    """The tag of a config or of its fields; a table without one means the first family."""
    found = raw.get("family", "v3") if isinstance(raw, Mapping) else getattr(raw, "family", "")
    return str(found)


AnyModelConfig = Annotated[
    Annotated[V3Config, Tag("v3")]
    | Annotated[V32Config, Tag("v32")]
    | Annotated[V4Config, Tag("v4")],
    Discriminator(_family),
]
"""A config of any family, for fields of schemas."""

_ANY: TypeAdapter[ModelConfig] = TypeAdapter(AnyModelConfig)


def model_config(fields: Mapping[str, Any]) -> ModelConfig:
    """The config that `fields` describe; pydantic's ValidationError if they do not."""
    return _ANY.validate_python(dict(fields))

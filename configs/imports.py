"""A model made elsewhere, to start from in place of pretraining."""

from typing import ClassVar

from pydantic import Field

from configs.base import Frozen


class ImportSpec(Frozen):
    """The import stage's whole config."""

    provenance_fields: ClassVar[frozenset[str]] = frozenset({"folder"})

    folder: str = Field(min_length=1)
    """Holds `config.json`, safetensors and `tokenizer.json`, which enter identity by content."""

"""The base of every schema: immutable, and closed to unknown keys."""

from typing import ClassVar

from pydantic import BaseModel, ConfigDict


class Frozen(BaseModel):
    """A value that is checked when made and never changes afterwards."""

    model_config = ConfigDict(frozen=True, defer_build=True, extra="forbid", allow_inf_nan=False)

    provenance_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where or how, not what: they never enter an artifact's identity."""

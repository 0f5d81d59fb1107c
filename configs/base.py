"""The base of every schema: immutable, and closed to unknown keys."""

from typing import ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict

FrozenT = TypeVar("FrozenT", bound="Frozen")


class Frozen(BaseModel):
    """A value that is checked when made and never changes afterwards."""

    model_config = ConfigDict(frozen=True, defer_build=True, extra="forbid", allow_inf_nan=False)

    provenance_fields: ClassVar[frozenset[str]] = frozenset()
    """Fields that say where or how, not what: they never enter an artifact's identity."""


def settings_of(config: Frozen, kind: type[FrozenT]) -> FrozenT:
    """The settings that `config` has of its base class `kind`, as a value of that class."""
    return kind.model_validate({name: getattr(config, name) for name in kind.model_fields})

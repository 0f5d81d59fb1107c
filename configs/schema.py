"""What stands where in a schema: its tables, fields and kinds, by the path of keys to them."""

from collections.abc import Iterable
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel

_TAG_FIELDS = ("type", "family")
"""Fields of one fixed value, by which the members of a union are told apart."""


@dataclass(frozen=True, slots=True)
class Place:
    """A place in a schema."""

    words: tuple[str, ...]
    """The keys to it, as a recipe has them."""
    kinds: tuple[Any, ...]
    """The types of which one stands there."""

    @classmethod
    def top(cls, schema: type[BaseModel]) -> Self:
        """The whole of a schema."""
        return cls((), members(schema))

    def step(self, part: int | str) -> "Place":
        """The place that one part of a location of pydantic's leads to.

        A part may also be the tag of a union's member that was read, which no recipe spells: it
        leads to the same place, of that one kind.
        """
        tagged = tuple(kind for kind in self.kinds if part in tag_of(kind))
        if tagged:
            return Place(self.words, tagged)
        inner = tuple(one for kind in self.kinds for one in _below(kind, part))
        return Place((*self.words, str(part)), inner)

    def walk(self, location: Iterable[int | str]) -> "Place":
        """The place that a location leads to; a fault of a key itself is at what bears it."""
        place = self
        for part in location:
            if part != "[key]":
                place = place.step(part)
        return place

    @property
    def spelling(self) -> str:
        """The dotted path."""
        return ".".join(self.words)

    @property
    def fields(self) -> list[str]:
        """Names of the fields that may stand in the table here."""
        return sorted({name for kind in self.kinds if is_model(kind) for name in kind.model_fields})

    @property
    def tags(self) -> dict[str, str]:
        """Of a union's members: by tag the field that holds it."""
        return {tag: field for kind in self.kinds for tag, field in tag_of(kind).items()}


def members(annotation: Any) -> tuple[Any, ...]:
    """The types that an annotation is a choice of."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return members(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return tuple(inner for one in get_args(annotation) for inner in members(one))
    return (annotation,)


def tag_of(kind: Any) -> dict[str, str]:
    """By what tag a union knows this member, and the field that holds it; empty without one."""
    fields = kind.model_fields if is_model(kind) else {}
    return {
        str(get_args(fields[name].annotation)[0]): name
        for name in _TAG_FIELDS
        if name in fields and get_origin(fields[name].annotation) is Literal
    }


def is_model(kind: Any) -> bool:
    """Whether a type is a table of a schema."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _below(kind: Any, part: int | str) -> tuple[Any, ...]:
    """The types that stand under a key of a type."""
    if is_model(kind) and part in kind.model_fields:
        return members(kind.model_fields[part].annotation)
    if get_origin(kind) is dict:
        return members(get_args(kind)[1])
    return ()

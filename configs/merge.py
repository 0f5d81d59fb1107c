"""Tables laid over tables: how overlays, `--set` and named tables of a section add up."""

from collections.abc import Collection, Mapping
from typing import Any


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid over `base`: tables merge key by key, all else replaces.

    A table that changes `type` replaces the old one: it is another thing, to which the old one's
    fields mean nothing.
    """
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping) and _same_type(old, value):
            merged[key] = merge(old, value)
        else:
            merged[key] = value
    return merged


def inherit(section: Any, tables: str, *, own: Collection[str]) -> Any:
    """A section whose named `tables` hold all its other settings too, but for those each has of
    its `own`."""
    if not isinstance(section, Mapping) or not isinstance(section.get(tables), Mapping):
        return section
    shared = {key: value for key, value in section.items() if key not in {tables, *own}}
    found = {
        name: merge(shared, one) if isinstance(one, Mapping) else one
        for name, one in section[tables].items()
    }
    return {**section, tables: found}


def _same_type(base: Mapping[str, Any], over: Mapping[str, Any]) -> bool:
    """Whether `over` leaves the tag of a union, if there is one, as it was."""
    return not ("type" in base and "type" in over) or base["type"] == over["type"]

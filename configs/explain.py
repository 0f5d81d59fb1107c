"""What is wrong with a recipe, one line a fault: field, value, what is allowed, nearest name."""

import difflib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ValidationError

from configs.notify import hide_addresses, is_secret
from configs.schema import Place

_WISHES = {
    "model_type": "should be a table",
    "model_attributes_type": "should be a table",
    "dict_type": "should be a table",
    "tuple_type": "should be a list, as [0, 1]",
    "list_type": "should be a list, as [0, 1]",
    "too_short": "should have at least 1 item",
    "bool_type": "should be true or false",
    "bool_parsing": "should be true or false",
    "int_type": "should be a whole number",
    "int_parsing": "should be a whole number",
    "int_from_float": "should be a whole number",
    "float_type": "should be a number",
    "float_parsing": "should be a number",
    "string_type": "should be text",
}
"""What is said in place of pydantic's words, which are a programmer's, by kind of fault."""
_UNQUOTED = frozenset({"bool_type", "int_type", "float_type"})
"""Faults of what TOML writes without quotes."""
_SHOWN_CHARS = 60
_SECRET = "..."
"""Shown in place of what nobody should see."""


def first_fault(error: ValidationError) -> str:
    """Where the first fault of a file of ours lies, and what it is: `run.id: should be text`."""
    fault = error.errors()[0]
    return f"{'.'.join(map(str, fault['loc'])) or 'the whole'}: {fault['msg']}"


def explain(error: ValidationError, schema: type[BaseModel], *, origin: str) -> str:
    """All that `schema` finds wrong with what was read from `origin`."""
    top, faults = Place.top(schema), error.errors()
    return f"recipe {origin}: " + "\n".join(
        _line(top.walk(fault["loc"]), fault, top.walk(fault["loc"][:-1]), origin)
        for fault in _once(faults)
    )


def _once(faults: Sequence[Any]) -> Iterator[Any]:
    """Without lists that count as too short because one of their items is told of."""
    told = {fault["loc"][:end] for fault in faults for end in range(len(fault["loc"]))}
    for fault in faults:
        if fault["type"] != "too_short" or fault["loc"] not in told:
            yield fault


def _line(place: Place, fault: Any, above: Place, origin: str) -> str:
    """What is wrong at a place, which lies in the table `above`."""
    where, found = place.spelling or origin, _SECRET if is_secret(place.words) else fault["input"]
    match fault["type"]:
        case "extra_forbidden":
            hint = _nearest(place.words[-1], above.fields, otherwise="allowed")
            return f"{where} = {_short(found)}: no such field; {hint}"
        case "missing":
            return f"{where}: missing; add it to the recipe"
        case "union_tag_invalid" | "union_tag_not_found":
            return f"{where}{_untagged(place.tags, found)}"
        case "value_error":
            message = str(fault["msg"]).removeprefix("Value error, ")
            return f"{where}: {message}" if place.words else message
        case kind:
            return f"{where} = {_short(found)}: {_wish(kind, str(fault['msg']), found)}"


def _untagged(tags: Mapping[str, str], found: object) -> str:
    """What is wrong with a table that says of itself to be none of the kinds there are."""
    field, known = next(iter(tags.values())), ", ".join(tags)
    if not isinstance(found, Mapping):
        return f" = {_short(found)}: should be a table"
    if field not in found:
        return f".{field}: missing; known: {known}"
    near = difflib.get_close_matches(str(found[field]), tags, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return f".{field} = {_short(found[field])}: unknown; known: {known}{hint}"


def _wish(kind: str, message: str, found: object) -> str:
    """What should stand in place of what was seen."""
    # pydantic calls whatever it looks at an input.
    plain = message.removeprefix("Input ")
    wish = _WISHES.get(kind, plain[:1].lower() + plain[1:])
    if kind in _UNQUOTED and isinstance(found, str):
        return f"{wish}, without quotes"
    if kind == "string_type" and not isinstance(found, Mapping | list):
        return f"{wish}, in quotes"
    return wish


def _nearest(name: str, known: Sequence[str], *, otherwise: str) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"{otherwise}: {', '.join(known)}"


def _short(value: object) -> str:
    """A value as TOML writes it, as far as that is short."""
    text = str(value).lower() if isinstance(value, bool) else hide_addresses(repr(value))
    return text if len(text) <= _SHOWN_CHARS else text[: _SHOWN_CHARS - 3] + "..."

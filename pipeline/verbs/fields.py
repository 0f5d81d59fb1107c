"""`ingot fields`: every setting of a recipe, with its type, default and meaning."""

import argparse
import ast
import difflib
import inspect
import json
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, SecretStr

from configs.errors import ConfigError
from configs.recipe import Recipe
from configs.schema import is_model, members, tag_of

_WORDS = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    SecretStr: "text",
    Any: "any",
}
_WIDTH = 96


@dataclass(frozen=True, slots=True)
class Setting:
    """One field that a recipe may set."""

    path: str
    """Dotted; a name of the user's choice is NAME."""
    kind: str
    """What it holds, in words."""
    default: str
    """As TOML has it; `required`, or `none` where nothing is said."""
    meaning: str
    """The schema's docstring; empty where the name says it all."""


def fields(args: argparse.Namespace) -> int:
    """Print every setting whose path begins with the prefix. ConfigError if none does."""
    prefix = args.prefix or ""
    every = list(settings(Recipe, ""))
    chosen = [one for one in every if one.path == prefix or one.path.startswith(_below(prefix))]
    if not chosen:
        paths = {".".join(one.path.split(".")[:end]) for one in every for end in range(1, 6)}
        near = difflib.get_close_matches(prefix, sorted(paths), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "`ingot fields` lists all"
        raise ConfigError(f"fields {prefix!r}: no setting begins so; {hint}")
    for one in chosen:
        print(f"{one.path}  ({one.kind}; {one.default})")
        for line in textwrap.wrap(one.meaning, _WIDTH):
            print(f"    {line}")
    return 0


def settings(schema: type[BaseModel], prefix: str) -> Iterator[Setting]:
    """The settings below a table of a schema, in its order."""
    meanings = _meanings(schema)
    for name, field in schema.model_fields.items():
        path, kinds = f"{prefix}{name}", members(field.annotation)
        tables = [kind for kind in kinds if is_model(kind)]
        named = [one for kind in kinds if get_origin(kind) is dict for one in _values(kind)]
        if tables or named:
            meaning = meanings.get(name)
            if meaning:
                yield Setting(path, "table", _default(field), meaning)
            yield from _tables(tables, f"{path}.")
            yield from _tables(named, f"{path}.NAME.")
        else:
            kind = _kind(field.annotation)
            yield Setting(path, kind, _default(field), meanings.get(name, ""))


def _tables(kinds: list[type[BaseModel]], prefix: str) -> Iterator[Setting]:
    """The settings of each kind of table; of a union's members, each under its tag."""
    for kind in kinds:
        tags = ", ".join(f"{field} = {json.dumps(tag)}" for tag, field in tag_of(kind).items())
        mark = f" [{tags}]" if tags and len(kinds) > 1 else ""
        for one in settings(kind, prefix):
            yield Setting(one.path, one.kind + mark, one.default, one.meaning)


def _values(kind: Any) -> list[type[BaseModel]]:
    """The kinds of tables that a table of the user's own names holds."""
    return [one for one in members(get_args(kind)[1]) if is_model(one)]


def _below(prefix: str) -> str:
    return f"{prefix}." if prefix else ""


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None:
        return "none"
    if isinstance(value, BaseModel):
        return "as below"
    return json.dumps(value, default=str)


def _kind(annotation: Any) -> str:
    """A type in words."""
    if get_origin(annotation) is Annotated:
        return _kind(get_args(annotation)[0])
    kinds = [one for one in members(annotation) if one is not type(None)]
    return " or ".join(dict.fromkeys(map(_plain, kinds)))


def _plain(kind: Any) -> str:
    match get_origin(kind):
        case None:
            return _WORDS.get(kind, getattr(kind, "__name__", str(kind)))
        case origin if origin is Literal:
            return " | ".join(map(json.dumps, get_args(kind)))
        case origin if origin is tuple:
            return f"list of {_kind(get_args(kind)[0])}"
        case origin if origin is dict:
            return f"table of {_kind(get_args(kind)[1])}"
    return str(kind)


@cache
def _meanings(schema: type[BaseModel]) -> dict[str, str]:
    """The docstring below each field of a schema, and of those that it is made of."""
    found: dict[str, str] = {}
    for kind in reversed(schema.__mro__):
        if kind is BaseModel or not is_model(kind):
            continue
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
        assert isinstance(tree, ast.ClassDef)
        for field, doc in zip(tree.body, tree.body[1:], strict=False):
            match field, doc:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found

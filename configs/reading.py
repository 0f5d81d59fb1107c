"""Recipes as files: TOML read left to right, merged deeply, validated whole."""

import codecs
import difflib
import json
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from configs.base import FrozenT
from configs.errors import ConfigError
from configs.explain import explain
from configs.merge import inherit, merge
from configs.notify import STAND_IN, hide_addresses
from configs.recipe import Recipe

_STAGES = frozenset({"pretrain", "posttrain", "evaluate", "export"})
"""Tables in whose place a recipe may say `false`."""
_NAMED_TABLES = {
    "data": ("corpora", ("sources", "train_tokens", "tokenizer")),
    "pretrain": ("phases", ("after",)),
    "posttrain": ("phases", ("after",)),
}
"""By section: its tables that have the section's settings where they say nothing else, and those
settings that each has of its own."""


def shipped_recipes() -> list[str]:
    """Names of the recipes inside the package."""
    folder = resources.files("configs") / "recipes"
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".toml"))


def load_recipe(name: str, overlays: Sequence[str] = (), sets: Sequence[str] = ()) -> Recipe:
    """The recipe `name` (shipped name or path) under overlays and `a.b=c` settings, validated.

    Tables merge key by key, later files win; lists and scalars replace, and so does a table that
    changes `type`: it is another thing, to which the old one's fields mean nothing. A model whose
    `family` changes keeps its fields, and those that the new family lacks are refused: forgetting
    them would leave that family's full size. All settings together are one last overlay, so their
    order does not matter. Raises ConfigError with the field's path, its value and the nearest valid
    spelling.
    """
    tree = _read(name)
    for overlay in overlays:
        tree = merge(tree, _read(overlay))
    asked: dict[str, Any] = {}
    for assignment in sets:
        asked = merge(asked, _parse_set(assignment))
    tree = merge(tree, asked)
    try:
        return validate(Recipe, _laid_out(tree))
    except ValidationError as error:
        raise ConfigError(explain(error, Recipe, origin=name)) from None


def validate(schema: type[FrozenT], tree: Mapping[str, Any]) -> FrozenT:
    """A value of `schema` from what TOML says; pydantic's ValidationError if it is none.

    Nothing is converted: `"25"` is no number and `true` no 1. Only lists become tuples, which TOML
    cannot say.
    """
    return schema.model_validate_json(json.dumps(tree, default=str), strict=True)


def _laid_out(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What a recipe means: `false` for no table, and named tables with their section's settings."""
    meant = {k: None if k in _STAGES and value is False else value for k, value in tree.items()}
    for section, (tables, own) in _NAMED_TABLES.items():
        if section in meant:
            meant[section] = inherit(meant[section], tables, own=own)
    return meant


def _read(name: str) -> dict[str, Any]:
    path = Path(name)
    shipped = resources.files("configs") / "recipes" / f"{name}.toml"
    if path.suffix == ".toml" and path.exists():
        text = _decoded(name, path)
    elif shipped.is_file():
        text = shipped.read_text(encoding="utf-8")
    elif path.suffix == ".toml":
        raise ConfigError(f"recipe {name!r}: there is no such file in {Path.cwd()}; name one")
    elif Path(f"{name}.toml").is_file():
        raise ConfigError(f"recipe {name!r}: none is shipped; did you mean {name + '.toml'!r}?")
    else:
        near = difflib.get_close_matches(name, shipped_recipes(), n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"shipped: {', '.join(shipped_recipes())}"
        raise ConfigError(f"recipe {name!r}: neither a .toml file nor a shipped recipe; {hint}")
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"recipe {name!r}: not valid TOML: {error}") from None


def _decoded(name: str, path: Path) -> str:
    """The text of a recipe's file, which may begin with the mark that some editors put there."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"recipe {name!r}: cannot be read ({error.strerror}); name a file that can"
        ) from None
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f"recipe {name!r}: is in UTF-16; save it as UTF-8, as TOML is")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"recipe {name!r}: byte 0x{raw[error.start]:02x} in line {line} is not UTF-8; save it "
            "as UTF-8, as TOML is"
        ) from None


def without_webhooks(words: Iterable[str]) -> tuple[str, ...]:
    """Words of a command line as they may be recorded.

    A webhook's address, which is a secret, gives way to the environment variable that is to hold it
    when the command is given again.
    """
    return tuple(map(_without_webhook, words))


def _without_webhook(word: str) -> str:
    option, equals, assignment = word.partition("=") if word.startswith("--") else ("", "", word)
    try:
        tree = _parse_set(assignment)
    except ConfigError:
        return word
    table = tree.get("notify")
    webhook = table.get("webhook") if isinstance(table, Mapping) else None
    if webhook is None or str(webhook).startswith("$"):
        return word
    if list(_path(tomllib.loads(f"{assignment.partition('=')[0]} = 0"))) == ["notify"]:
        told = {**tree["notify"], "webhook": STAND_IN}
        value = ", ".join(f"{key} = {json.dumps(told[key], ensure_ascii=False)}" for key in told)
        return f"{option}{equals}notify={{{value}}}"
    return f"{option}{equals}notify.webhook={STAND_IN}"


def _parse_set(assignment: str) -> dict[str, Any]:
    """The tables that one `a.b=c` means: a value of TOML or, if it is none, text as it stands."""
    shown = repr(hide_addresses(assignment))
    key, separator, text = (part.strip() for part in assignment.partition("="))
    if not separator or not key:
        raise ConfigError(f"--set {shown}: expected key=value, as pretrain.steps=200")
    try:
        path = list(_path(tomllib.loads(f"{key} = 0")))
    except tomllib.TOMLDecodeError:
        raise ConfigError(
            f"--set {shown}: {hide_addresses(key)!r} is no field's path; write words joined by "
            "single dots, as pretrain.steps=200"
        ) from None
    try:
        tree = tomllib.loads(f"{key} = {text}")
    except tomllib.TOMLDecodeError:
        tree = _nested(path, text)
    if "\n" in text and (tree != _nested(path, _at(tree, path)) or _at(tree, path) == text):
        raise ConfigError(
            f"--set {shown}: a line break ends a value; give each setting a --set of its "
            "own, and put text that has line breaks into quotes as TOML has them"
        )
    return tree


def _path(tree: Mapping[str, Any]) -> Iterator[str]:
    """The keys down to the one leaf of nested tables."""
    for key, value in tree.items():
        yield key
        if isinstance(value, Mapping):
            yield from _path(value)


def _nested(path: Sequence[str], value: Any) -> dict[str, Any]:
    tree: Any = value
    for key in reversed(path):
        tree = {key: tree}
    return dict(tree)


def _at(tree: Any, path: Sequence[str]) -> Any:
    for key in path:
        tree = tree[key]
    return tree

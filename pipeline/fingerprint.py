"""What an artifact is, apart from where and when it was made: identity, and how two differ.

Identity is the stage's function and revision, the config fields that differ from their defaults,
what the stage reads from outside the line, and the fingerprints of its inputs. A field that is
added later with a default changes no identity; whoever changes a default or a stage's meaning bumps
the stage's revision. Paths, machines and logging are provenance and never enter.
"""

import hashlib
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from pydantic import BaseModel

from configs.base import Frozen
from configs.errors import PlanError
from stages.contract import Planned
from stages.hashing import Hashes

TAG_FIELD = "type"
"""The field that tells the members of a union apart; it always enters identity."""
DIGITS = 16


@dataclass(frozen=True, slots=True)
class Identity:
    """JSON values and the first 16 hexadecimal digits of their SHA-256."""

    fields: Mapping[str, Any]
    fingerprint: str


def identify(node: Planned[Any], inputs: Mapping[str, str], hashes: Hashes) -> Identity:
    """Identity of a planned node whose inputs have the given fingerprints.

    Files that the stage reads enter as `hashes` knows them. PlanError if the config, or what the
    stage reads, has no stable serial form.
    """
    stage = node.stage
    fields: dict[str, Any] = {
        "stage": stage.function,
        "revision": stage.revision,
        "config": _encode(node.config, f"{stage.name}.config"),
        "inputs": dict(sorted(inputs.items())),
    }
    if stage.reads is not None:
        fields["reads"] = _encode(stage.reads(node.config, hashes), f"{stage.name}.reads")
    return Identity(fields, digest(fields))


def digest(fields: Mapping[str, Any]) -> str:
    """Fingerprint of JSON values: canonical text, hashed."""
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:DIGITS]


def _encode(value: object, where: str) -> Any:
    """`value` as JSON values that are the same in every process; PlanError if it has none."""
    match value:
        case None | bool() | int() | str():
            return value
        case float() if math.isfinite(value):
            return value
        case Frozen():
            return _encode_config(value, where)
        case Mapping() if all(isinstance(key, str) for key in value):
            return {key: _encode(value[key], f"{where}.{key}") for key in sorted(value)}
        case list() | tuple():
            return [_encode(item, f"{where}[{index}]") for index, item in enumerate(value)]
    raise PlanError(
        f"{where} = {value!r}: a {type(value).__name__} is not written the same way in every "
        "process, so it cannot be part of an identity; use numbers, text, lists, tables or schemas"
    )


def _encode_config(config: Frozen, where: str) -> dict[str, Any]:
    encoded = {}
    for name, field in sorted(type(config).model_fields.items()):
        if name in config.provenance_fields:
            continue
        value, inner = getattr(config, name), f"{where}.{name}"
        default = field.get_default(call_default_factory=True, validated_data={})
        is_default = not field.is_required() and (
            value == default or _differ_in_provenance_alone(value, default, inner)
        )
        if name == TAG_FIELD or not is_default:
            encoded[name] = _encode(value, inner)
    return encoded


def _differ_in_provenance_alone(value: object, default: object, where: str) -> bool:
    return (
        isinstance(value, Frozen)
        and type(value) is type(default)
        and _encode(value, where) == _encode(default, where)
    )


def differences(old: Mapping[str, Any], new: Mapping[str, Any], config: Frozen) -> tuple[str, ...]:
    """Why two identities of one node differ, one reason a fault; `config` belongs to `new`.

    Reads like `stage revision 1 -> 2`, `pretrain.steps: 400 -> 500`, `file a.txt changed`,
    `input corpus changed`. Empty if they are equal.
    """
    reasons = []
    if old["stage"] != new["stage"]:
        reasons.append(f"stage {old['stage']} -> {new['stage']}")
    if old["revision"] != new["revision"]:
        reasons.append(f"stage revision {old['revision']} -> {new['revision']}")
    reasons += _config_differences(old["config"], new["config"], config)
    reasons += _read_differences(old.get("reads", {}), new.get("reads", {}), "")
    for name in sorted({*old["inputs"], *new["inputs"]}):
        before, after = old["inputs"].get(name), new["inputs"].get(name)
        if before != after:
            how = "added" if before is None else "gone" if after is None else "changed"
            reasons.append(f"input {name} {how}")
    return tuple(reasons)


def _config_differences(
    old: Mapping[str, Any], new: Mapping[str, Any], config: Frozen
) -> list[str]:
    before, after = _flatten(old), _flatten(new)
    reasons = []
    paths = {*before, *after}
    for path in sorted(paths):
        if {} in (before.get(path), after.get(path)) and _lies_above(path, paths):
            continue  # A section of plain defaults on one side: fields of the other side differ.
        if before.get(path) != after.get(path):
            seen = _show(before[path]) if path in before else _default_at(config, path)
            now = _show(after[path]) if path in after else _value_at(config, path)
            reasons.append(f"{'.'.join(path)}: {seen} -> {now}")
    return reasons


def _lies_above(path: tuple[str, ...], paths: Collection[tuple[str, ...]]) -> bool:
    return any(len(one) > len(path) and one[: len(path)] == path for one in paths)


def _flatten(tree: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    """Leaves of nested tables by path. An empty table is a leaf: a section of plain defaults."""
    leaves: dict[tuple[str, ...], Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            leaves |= _flatten(value, (*path, key))
        else:
            leaves[*path, key] = value
    return leaves


def _step(value: object, key: str) -> object:
    """Field or entry `key` of `value`; KeyError if it has none."""
    if isinstance(value, BaseModel) and key in type(value).model_fields:
        return getattr(value, key)
    if isinstance(value, Mapping):
        return cast(Mapping[str, object], value)[key]
    raise KeyError(key)


def _value_at(config: Frozen, path: Sequence[str]) -> str:
    """The value now at `path`, which identity left out because it is the default."""
    value: object = config
    try:
        for key in path:
            value = _step(value, key)
    except KeyError:
        return "absent"
    return _show(value)


def _default_at(config: Frozen, path: Sequence[str]) -> str:
    """What stood at `path` when identity left it out: the schema's default, or nothing."""
    parent: object = config
    try:
        for key in path[:-1]:
            parent = _step(parent, key)
    except KeyError:
        return "absent"
    if isinstance(parent, BaseModel) and path[-1] in type(parent).model_fields:
        field = type(parent).model_fields[path[-1]]
        if not field.is_required():
            return _show(field.get_default(call_default_factory=True, validated_data={}))
    return "absent"


def _read_differences(old: Any, new: Any, where: str) -> list[str]:
    """Differences of what a stage reads; a `{bytes, sha256}` leaf is a file and named as one."""
    if old == new:
        return []
    if _is_file(old) or _is_file(new):
        here = "changed" if _is_file(old) else "added"
        return [f"file {where} {here if _is_file(new) else 'gone'}"]
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        found = []
        for key in sorted({*old, *new}):
            # A file's name says enough; other facts need the names of the tables around them.
            leaf = _is_file(old.get(key)) or _is_file(new.get(key))
            path = key if leaf or not where else f"{where}.{key}"
            found += _read_differences(old.get(key, {}), new.get(key, {}), path)
        return found
    return [f"{where}: {_show(old)} -> {_show(new)}"]


def _is_file(value: object) -> bool:
    return isinstance(value, Mapping) and value.keys() == {"bytes", "sha256"}


def _show(value: object) -> str:
    if isinstance(value, BaseModel):
        value = value.model_dump(mode="json", exclude_defaults=True)
    if value == {}:
        return "absent"
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

"""Reading `config.json`: each fault is one error that names the field and what stands in it."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from configs.errors import ArtifactError
from configs.model import ModelConfig, YarnConfig

ConfigT = TypeVar("ConfigT", bound=ModelConfig)

_YARN_FIELDS = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow")
_MAGNITUDES = ("mscale", "mscale_all_dim")


def require(raw: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The fields `names`; ArtifactError names the first that is missing."""
    names = tuple(names)
    missing = [name for name in names if name not in raw]
    if missing:
        raise ArtifactError(f"config.json: {missing[0]} is missing")
    return {name: raw[name] for name in names}


def check_fixed(raw: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """ArtifactError if a field in which a family has no choice has another value."""
    for name, value in fixed.items():
        if raw.get(name, value) != value:
            raise ArtifactError(f"config.json: {name} = {raw[name]!r}, but only {value!r} is read")


def agreed(values: Mapping[str, Any]) -> Any:
    """The value that all fields give that are there (not None); None if none is.

    ArtifactError names two fields that disagree, and both values.
    """
    given = {name: value for name, value in values.items() if value is not None}
    for (first, one), (second, other) in zip(
        list(given.items())[:-1], list(given.items())[1:], strict=True
    ):
        if one != other:
            raise ArtifactError(
                f"config.json: {first} = {one!r} disagrees with {second} = {other!r}; correct "
                "the one that is wrong"
            )
    return next(iter(given.values()), None)


def build(schema: type[ConfigT], fields: Mapping[str, Any]) -> ConfigT:
    """The config that `fields` make; ArtifactError says which numbers disagree."""
    try:
        return schema(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        message = fault["msg"].removeprefix("Value error, ")
        if fault["type"] != "value_error":
            where = ".".join(str(part) for part in fault["loc"])
            message = f"{where} = {fault['input']!r}: {message}"
        raise ArtifactError(f"config.json: {message}") from error


def read_table(raw: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """The table at `name`, empty if it is absent or null; ArtifactError if it is no table."""
    found = raw.get(name) or {}
    if not isinstance(found, Mapping):
        raise ArtifactError(f"config.json: {name} = {found!r}, expected a table")
    return found


def read_yarn(
    rope: Mapping[str, Any], positions: Any, *, where: str, scales_magnitudes: bool
) -> YarnConfig | None:
    """The stretching of a `rope_scaling` or `rope_parameters` table; none if it says default.

    Absent magnitudes count as 0, as transformers reads them; with `scales_magnitudes` false the
    family ignores them. `positions` is what an absent original length means.
    """
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "yarn":
        raise ArtifactError(
            f"config.json: {where}.rope_type = {kind!r}, but only 'default' and 'yarn' are read"
        )
    if rope.get("truncate") is False:
        raise ArtifactError(f"config.json: {where}.truncate = False, but only True is read")
    attention = rope.get("attention_factor")
    if attention is not None and (scales_magnitudes or attention != 1):
        raise ArtifactError(
            f"config.json: {where}.attention_factor = {attention!r} is not read; leave it out, and "
            "give mscale and mscale_all_dim where the family has them"
        )
    if "factor" not in rope:
        raise ArtifactError(f"config.json: {where}.factor is missing")
    fields = {"original_max_position_embeddings": positions}
    fields |= {name: rope[name] for name in _YARN_FIELDS if rope.get(name) is not None}
    if scales_magnitudes:
        fields |= {name: rope.get(name) or 0.0 for name in _MAGNITUDES}
    try:
        return YarnConfig(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in (where, *fault["loc"]))
        raise ArtifactError(f"config.json: {name} = {fault['input']!r}: {fault['msg']}") from error


def agreed_yarn(
    tables: Mapping[str, Mapping[str, Any]], positions: Any, *, scales_magnitudes: bool
) -> YarnConfig | None:
    """The stretching that all of the named `tables` give that name a kind of rotation.

    ArtifactError as of `read_yarn`, or if two of them disagree.
    """
    found = {
        where: read_yarn(table, positions, where=where, scales_magnitudes=scales_magnitudes)
        for where, table in tables.items()
        if "rope_type" in table or "type" in table
    }
    agreed({f"{where}.rope_type": "yarn" if yarn else "default" for where, yarn in found.items()})
    for name in YarnConfig.model_fields:
        agreed({f"{where}.{name}": getattr(yarn, name, None) for where, yarn in found.items()})
    return next(iter(found.values()), None)


def write_yarn(yarn: YarnConfig, *, scales_magnitudes: bool) -> dict[str, Any]:
    """As the released files have it, under both spellings of its kind; 0 magnitudes left out."""
    fields: dict[str, Any] = {"type": "yarn", "rope_type": "yarn"}
    fields |= {name: getattr(yarn, name) for name in _YARN_FIELDS}
    if scales_magnitudes:
        fields |= {name: getattr(yarn, name) for name in _MAGNITUDES if getattr(yarn, name)}
    return fields


def write_engram(config: ModelConfig) -> dict[str, Any]:
    """The memory's table, which no released model has; where its rows lie is not part of it."""
    if config.engram is None:
        return {}
    fields = config.engram.model_dump(mode="json", exclude=set(config.engram.provenance_fields))
    return {"engram": fields}

"""Reading `config.json`: each fault is one error that names the field and what stands in it."""

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from configs.errors import ArtifactError
from configs.model import ModelConfig, YarnConfig

ConfigT = TypeVar("ConfigT", bound=ModelConfig)

_ORIGINAL = "original_max_position_embeddings"
_YARN_FIELDS = ("factor", _ORIGINAL, "beta_fast", "beta_slow")
_MAGNITUDES = ("mscale", "mscale_all_dim")
_BASES = frozenset({"rope_theta", "partial_rotary_factor"})
"""Fields of a table of rotations that say nothing of stretching."""
_COMPLETE = "complete it, or take the config.json that belongs to the weights"


def require(raw: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """The fields `names`; ArtifactError names the first that is missing."""
    names = tuple(names)
    missing = [name for name in names if name not in raw]
    if missing:
        raise missing_field(missing[0])
    return {name: raw[name] for name in names}


def missing_field(name: str) -> ArtifactError:
    """The error that nothing in the config says what the field `name` says."""
    return ArtifactError(f"config.json: {name} is missing; {_COMPLETE}")


def check_fixed(raw: Mapping[str, Any], fixed: Mapping[str, Any]) -> None:
    """ArtifactError if a field in which a family has no choice has another value."""
    for name, value in fixed.items():
        if raw.get(name, value) != value:
            raise ArtifactError(
                f"config.json: {name} = {raw[name]!r}, but only {value!r} is read; no model here "
                "computes otherwise, so take one that has it"
            )


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
            message = f"{where} = {fault['input']!r}: {message}; correct the field"
        raise ArtifactError(f"config.json: {message}") from error


def read_table(raw: Mapping[str, Any], *path: str) -> Mapping[str, Any]:
    """The table at `path`, empty if it is absent or null; ArtifactError if it is no table."""
    table = raw
    for depth, name in enumerate(path, start=1):
        found = table.get(name)
        if found is not None and not isinstance(found, Mapping):
            raise ArtifactError(
                f"config.json: {'.'.join(path[:depth])} = {found!r}, expected a table; correct it, "
                "or leave it out"
            )
        table = found or {}
    return table


def read_base(raw: Mapping[str, Any], name: str, *label: str) -> Any:
    """The base of rotations by the field `name` and both tables, below `label`; None if none is.

    ArtifactError if they disagree, or if transformers would not see it: where there is a
    `rope_scaling`, it does not look into `rope_parameters`.
    """
    tables = (("rope_scaling", *label), ("rope_parameters", *label))
    seen, hidden = (
        {".".join((*path, "rope_theta")): read_table(raw, *path).get("rope_theta")}
        for path in tables
    )
    ours = {name: raw.get(name)} | seen
    theta = agreed(ours | hidden)
    if theta is not None and agreed(ours) is None and raw.get("rope_scaling"):
        raise ArtifactError(
            f"config.json: {next(iter(hidden))} = {theta!r} stands beside a rope_scaling, which "
            f"transformers reads in place of rope_parameters; give {name} = {theta!r} as well"
        )
    return theta


def check_flat(table: Mapping[str, Any], where: str, known: Iterable[str]) -> None:
    """ArtifactError if a table of rotations holds tables of its own that are none of `known`."""
    known = tuple(known)
    strange = [n for n, value in table.items() if isinstance(value, Mapping) and n not in known]
    if strange:
        kinds = f"only {' and '.join(known)} are" if known else "none is, as all layers turn alike"
        raise ArtifactError(
            f"config.json: {where}.{strange[0]} is a table, but in this family {kinds}; move its "
            f"fields, rope_type included, to where they belong in {where}"
        )


def read_yarn(
    raw: Mapping[str, Any],
    rope: Mapping[str, Any],
    *,
    where: str,
    original: Any,
    scales_magnitudes: bool,
) -> YarnConfig | None:
    """The stretching of `rope`, a table of the config `raw`; none if it says default.

    Absent magnitudes count as 0, as transformers reads them; with `scales_magnitudes` false the
    family ignores them. `original` is what an absent original length means; a factor of null means
    the ratio of the two lengths.
    """
    kind = read_kind(rope, where)
    if kind in (None, "default"):
        return None
    if kind != "yarn":
        raise ArtifactError(
            f"config.json: {where}.rope_type = {kind!r}, but only 'default' and 'yarn' are read; "
            "take a model that has one of these"
        )
    if rope.get("truncate") is False:
        raise ArtifactError(
            f"config.json: {where}.truncate = False, but only True is read; no model here computes "
            "otherwise"
        )
    attention = rope.get("attention_factor")
    if attention is not None and (scales_magnitudes or attention != 1):
        raise ArtifactError(
            f"config.json: {where}.attention_factor = {attention!r} is not read; leave it out, and "
            "give mscale and mscale_all_dim where the family has them"
        )
    if "factor" not in rope:
        raise missing_field(f"{where}.factor")
    fields = {_ORIGINAL: original}
    fields |= {name: rope[name] for name in _YARN_FIELDS if rope.get(name) is not None}
    fields.setdefault("factor", _ratio(raw["max_position_embeddings"], fields[_ORIGINAL]))
    if scales_magnitudes:
        fields |= {name: rope.get(name) or 0.0 for name in _MAGNITUDES}
    try:
        return YarnConfig(**fields)
    except ValidationError as error:
        fault = error.errors()[0]
        name = ".".join(str(part) for part in (where, *fault["loc"]))
        raise ArtifactError(
            f"config.json: {name} = {fault['input']!r}: {fault['msg']}; correct the field"
        ) from error


def read_kind(rope: Mapping[str, Any], where: str) -> Any:
    """The kind of rotation that a table names; None if it says nothing of stretching.

    ArtifactError if it stretches and names none: transformers would take it for 'default', and
    whoever wrote it hardly meant that.
    """
    kind = agreed({f"{where}.{name}": rope.get(name) for name in ("rope_type", "type")})
    stated = [name for name, value in rope.items() if name not in _BASES and value is not None]
    if kind is None and stated:
        raise ArtifactError(
            f"config.json: {where} has {stated[0]} = {rope[stated[0]]!r} and no rope_type; add "
            "rope_type = 'yarn' if it means that, or 'default'"
        )
    return kind


def agreed_yarn(
    raw: Mapping[str, Any],
    tables: Mapping[str, Mapping[str, Any]],
    *,
    original: Any,
    scales_magnitudes: bool,
) -> YarnConfig | None:
    """The stretching that all of the named `tables` give that name a kind of rotation.

    ArtifactError as of `read_yarn`, or if two of them disagree, or with an original length that
    stands in `raw` itself.
    """
    found = {
        where: read_yarn(
            raw, table, where=where, original=original, scales_magnitudes=scales_magnitudes
        )
        for where, table in tables.items()
        if read_kind(table, where) is not None
    }
    agreed({f"{where}.rope_type": "yarn" if yarn else "default" for where, yarn in found.items()})
    for name in YarnConfig.model_fields:
        agreed({f"{where}.{name}": getattr(yarn, name, None) for where, yarn in found.items()})
    where, yarn = next(iter(found.items()), ("", None))
    if yarn is not None:
        stretched_from = yarn.original_max_position_embeddings
        agreed({f"{where}.{_ORIGINAL}": stretched_from, _ORIGINAL: raw.get(_ORIGINAL)})
    return yarn


def _ratio(positions: Any, original: Any) -> float | None:
    """By how much a context is longer than it was; None of what are no lengths."""
    lengths = all(type(length) is int and length > 0 for length in (positions, original))
    return positions / original if lengths else None


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

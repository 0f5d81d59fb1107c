"""`ingot diff A B`: how two runs, two recipes or two artifacts differ."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import ArtifactError, ConfigError, PlanError, StoreError
from configs.reading import load_recipe, shipped_recipes
from configs.recipe import Recipe
from pipeline.figures import show_figure, spoken
from pipeline.plain import flatten
from pipeline.records import Built, Records, Reused, Run
from pipeline.store import Store
from pipeline.verbs.asked import command, find_store, locate
from stages.artifacts import load_artifact
from stages.manifest import MANIFEST, Manifest, read_manifest


@dataclass(frozen=True, slots=True)
class Committed:
    """An artifact's generation, and its manifest."""

    path: Path
    manifest: Manifest


Thing = Run | Recipe | Committed


def diff(args: argparse.Namespace) -> int:
    """Print settings, inputs and figures that differ. Exit 0 if nothing does, 3 if something does.

    ConfigError for two things of different kinds.
    """
    if _is_recipe(args.first) and _is_recipe(args.second):
        return _conclude(_recipes(load_recipe(args.first), load_recipe(args.second)))
    store, recipe = find_store(args, print)
    first, second = (_find(store, recipe, name) for name in (args.first, args.second))
    match first, second:
        case Run(), Run():
            return _conclude(_runs(store, first, second))
        case Committed(), Committed():
            return _conclude(_artifacts(first, second))
        case _:
            raise ConfigError(
                f"{args.first} is {_kind(first)} and {args.second} is {_kind(second)}; name two "
                "runs, two recipes or two artifacts"
            )


def _conclude(differences: Iterator[str]) -> int:
    """Print what differs; the exit code."""
    lines = list(differences)
    print("\n".join(lines) or "no difference")
    return 3 if lines else 0


def _is_recipe(name: str) -> bool:
    return name in shipped_recipes() or name.endswith(".toml")


def _kind(thing: Thing) -> str:
    match thing:
        case Run():
            return "a run"
        case Recipe():
            return "a recipe"
        case Committed():
            return "an artifact"


def _find(store: Store, recipe: str, name: str) -> Thing:
    """What a name means: an artifact's folder, a recipe, a run, or a node's latest artifact."""
    if (Path(name) / MANIFEST).is_file():
        folder = Path(name).resolve()
        return Committed(folder, read_manifest(str(folder)))
    if _is_recipe(name):
        return load_recipe(name)
    if (run := _run(store.records, name)) is not None:
        return run
    try:
        folder = locate(store, recipe, name)
    except PlanError as error:
        raise PlanError(f"{error}; nor is it a run (`ingot runs`) or a recipe") from None
    return Committed(folder, read_manifest(str(folder)))


def _run(records: Records, name: str) -> Run | None:
    """The run whose id begins with `name`; PlanError if several do."""
    ids = [path.stem for path in records.folder.glob("*.json") if path.stem.startswith(name)]
    if len(ids) > 1:
        raise PlanError(f"{name!r} begins {len(ids)} ids of runs, as {sorted(ids)[-1]}; say more")
    return records.load(ids[0]) if ids else None


def _recipes(first: Recipe, second: Recipe) -> Iterator[str]:
    one, other = first.model_dump(mode="json"), second.model_dump(mode="json")
    yield from _changes(one, other, absent="none")


def _runs(store: Store, first: Run, second: Run) -> Iterator[str]:
    """How they were asked for; then node by node what was made in one run alone, and how what was
    made in both differs."""
    asked = [command("run", run.invocation) for run in (first, second)]
    if asked[0] != asked[1]:
        yield f"command: {asked[0]} -> {asked[1]}"
    for name in dict.fromkeys((*first.outcomes, *second.outcomes)):
        one, other = first.outcomes.get(name), second.outcomes.get(name)
        words = ["not there" if each is None else each.outcome for each in (one, other)]
        if not isinstance(one, Built | Reused) or not isinstance(other, Built | Reused):
            if words[0] != words[1]:
                yield f"{name}: {words[0]} -> {words[1]}"
            continue
        if one.content == other.content:
            continue
        try:
            lines = list(_artifacts(*(_committed(store, each.address) for each in (one, other))))
        except ArtifactError as error:
            lines = [str(error)]
        yield f"{name}:"
        yield from (f"  {line}" for line in lines)


def _committed(store: Store, address: str) -> Committed:
    path = store.root / address
    store.fetch(path, most_bytes=0)
    return Committed(path, read_manifest(str(path)))


def _artifacts(first: Committed, second: Committed) -> Iterator[str]:
    """Settings, inputs and figures; then whether the files are equal."""
    one, other = first.manifest, second.manifest
    if one.kind != other.kind:
        raise ConfigError(
            f"{first.path} is a {one.kind} and {second.path} a {other.kind}; name two artifacts of "
            "one kind"
        )
    for name in ("stage", "revision"):
        if getattr(one, name) != getattr(other, name):
            yield f"{name}: {getattr(one, name)} -> {getattr(other, name)}"
    if one.stage == other.stage:
        # Settings and figures of two stages are of two kinds, even where they share a name.
        yield from _changes(one.identity["config"], other.identity["config"])
        yield from _changes(one.identity.get("reads", {}), other.identity.get("reads", {}))
    for name in sorted(one.inputs.keys() | other.inputs.keys()):
        seen, now = one.inputs.get(name), other.inputs.get(name)
        if seen is None or now is None or seen.content != now.content:
            yield f"input {name}: {_input(seen)} -> {_input(now)}"
    if one.stage == other.stage:
        yield from _figures(_measured(first), _measured(second))
    if one.content == other.content:
        return
    names = one.files.keys() | other.files.keys()
    changed = sorted(name for name in names if one.files.get(name) != other.files.get(name))
    yield f"files that differ: {', '.join(changed) or 'none, only facts'}"


def _input(entry: Any) -> str:
    return "none" if entry is None else f"{entry.address} ({entry.content[:8]})"


def _measured(one: Committed) -> Mapping[str, float]:
    """Figures with the bounds of their intervals."""
    try:
        artifact = load_artifact(str(one.path))
    except StoreError:
        return {}
    return artifact.measured() or artifact.figures()


def _figures(one: Mapping[str, float], other: Mapping[str, float]) -> Iterator[str]:
    for name in dict.fromkeys((*one, *other)):
        if name.endswith(("_low", "_high")) or one.get(name) == other.get(name):
            continue
        shown = [_figure(one, name), _figure(other, name)]
        if shown[0] == shown[1]:
            shown = [str(one.get(name)), str(other.get(name))]
        yield f"{spoken(name)}: {shown[0]} -> {shown[1]}"


def _figure(figures: Mapping[str, float], name: str) -> str:
    if name not in figures:
        return "none"
    shown = show_figure(name, figures[name])
    if f"{name}_low" not in figures:
        return shown
    low, high = (show_figure(name, figures[f"{name}_{side}"]) for side in ("low", "high"))
    return f"{shown} [{low}, {high}]"


def _changes(
    one: Mapping[str, Any], other: Mapping[str, Any], *, absent: str = "default"
) -> Iterator[str]:
    """Leaves of nested tables that differ; what an identity leaves out has its default."""
    before, after = flatten(one), flatten(other)
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            yield f"{path}: {before.get(path, absent)} -> {after.get(path, absent)}"

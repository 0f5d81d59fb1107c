"""What a command refers to: the recipe, its store, an artifact in it. Loads no stage's body."""

import argparse
import difflib
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.mirror import mirror_of
from configs.errors import ConfigError, PlanError
from configs.masking import masked
from configs.parallel import StoreConfig
from configs.reading import load_recipe, without_webhooks
from configs.recipe import Recipe
from pipeline.graph import Graph, Selection, make_graph, side_by_side
from pipeline.loading import load_stage
from pipeline.places import absolute
from pipeline.plain import flatten
from pipeline.production import production
from pipeline.records import Invocation, Records
from pipeline.seeds import parse_seeds, sets_seed
from pipeline.store import Store
from stages.hashing import Hashes
from stages.manifest import MANIFEST

DEFAULT_RECIPE = "tiny"


@dataclass(frozen=True, slots=True)
class Asked:
    """The recipe that a command means, with absolute paths, and how the user named it."""

    recipe: Recipe
    invocation: Invocation

    @property
    def title(self) -> str:
        """The recipe's name, and the seeds it is asked for if there are several."""
        seeds = self.invocation.seeds
        return self.recipe.name + (f" with seeds {', '.join(map(str, seeds))}" if seeds else "")

    def graph(self, hashes: Hashes) -> Graph:
        """The recipe's line, for each seed that is asked for."""
        seeds = self.invocation.seeds or (self.recipe.seed,)
        recipes = {seed: self.recipe.model_copy(update={"seed": seed}) for seed in seeds}
        return side_by_side(
            {seed: make_graph(production(one), hashes) for seed, one in recipes.items()}
        )

    def know_kinds(self) -> None:
        """Load the stages that the recipe adds, so that their kinds of artifacts are known.

        What cannot be loaded stays unknown: whoever looks at something else has no need of it.
        """
        for name, node in self.recipe.nodes.items():
            with suppress(PlanError):
                load_stage(name, node.use)

    def store(self, say: Callable[[str], None]) -> Store:
        """The recipe's store."""
        return Store(self.recipe.store, say=say)


def load_asked(args: argparse.Namespace) -> Asked:
    """The recipe named on the command line; without one, that of the latest run here, or tiny."""
    base = Path.cwd()
    store_url = _said_store(args.sets) or str(base / StoreConfig().url)
    if args.recipe is None:
        latest = _latest_invocation(store_url)
        invocation = latest or Invocation(DEFAULT_RECIPE)
        if args.overlays or args.sets:
            invocation = Invocation(
                invocation.recipe,
                (*invocation.overlays, *_absolute(args.overlays, base)),
                _last_of_each((*invocation.sets, *args.sets)),
                () if sets_seed(args.sets) else invocation.seeds,
            )
    else:
        latest = None
        (name,) = _absolute([args.recipe], base)
        seeds = _seeds(args)
        invocation = Invocation(name, _absolute(args.overlays, base), tuple(args.sets), seeds)
    recipe = load_recipe(invocation.recipe, invocation.overlays, invocation.sets)
    # What is remembered of a command, and printed, holds no secret.
    sets = without_webhooks(map(masked, invocation.sets))
    invocation = replace(invocation, sets=sets)
    asked = Asked(absolute(recipe, base), invocation)
    if args.recipe is None and latest is None:
        print(
            f"no run is recorded in {store_url}: assuming the recipe "
            f"{invocation.recipe} and its store {asked.recipe.store.url}; --recipe names another",
            file=sys.stderr,
        )
    return asked


def find_store(args: argparse.Namespace, say: Callable[[str], None]) -> tuple[Store, str]:
    """The store that a command means, and the name of its recipe.

    Both are known of the latest run here even where its recipe's file is gone.
    """
    try:
        asked = load_asked(args)
    except ConfigError:
        store = Store(StoreConfig(url=str(Path.cwd() / StoreConfig().url)), say=say)
        latest = next(store.records.newest_first(), None)
        if latest is None or args.recipe is not None or args.overlays or args.sets:
            raise
        return store, latest.recipe
    asked.know_kinds()
    return asked.store(say), asked.recipe.name


def selection(args: argparse.Namespace) -> Selection:
    """The selectors on the command line."""
    return Selection(only=tuple(args.only), start=tuple(args.start), force=tuple(args.force))


def command(verb: str, invocation: Invocation, chosen: Selection | None = None) -> str:
    """The command line that repeats an invocation."""
    chosen = chosen or Selection()
    overlays = [f"@{path}" for path in invocation.overlays]
    sets = [word for one in invocation.sets for word in ("--set", one)]
    seeds = ["--seeds", ",".join(map(str, invocation.seeds))] if invocation.seeds else []
    options = {"--only": chosen.only, "--from": chosen.start, "--force": chosen.force}
    nodes = [word for option, names in options.items() for one in names for word in (option, one)]
    return shlex.join(["ingot", verb, invocation.recipe, *overlays, *sets, *seeds, *nodes])


def changed_settings(asked: Asked) -> dict[str, tuple[str, str]]:
    """What overlays and `--set` change in the recipe, by dotted path: its value and the new one."""
    invocation = asked.invocation
    if not (invocation.overlays or invocation.sets):
        return {}
    try:
        own = absolute(load_recipe(invocation.recipe), Path.cwd())
    except ConfigError:
        # It is no recipe by itself.
        return {}
    before, now = (flatten(one.model_dump(mode="json")) for one in (own, asked.recipe))
    said = flatten(asked.recipe.model_dump(mode="json", exclude_unset=True))
    changed = {key for key in {**before, **now} if before.get(key) != now.get(key)}
    # A section that is left out is one change; one that is added is what is said of it.
    gone = {key for key in changed if any(one.startswith(f"{key}.") for one in before)}
    new = {key for key in changed if any(one.startswith(f"{key}.") for one in now)}
    shown = {
        key: (masked(before.get(key, "none")), masked(now.get(key, "none")))
        for key in sorted(changed - gone - new)
        if not any(key.startswith(f"{one}.") for one in gone)
        and (key in said or not any(key.startswith(f"{one}.") for one in new))
    }
    return dict.fromkeys(sorted(gone), ("as in its file", "left out")) | shown


def locate(store: Store, recipe: str, target: str, *, most_bytes: int | None = None) -> Path:
    """The generation's folder of an artifact, named by its node in the recipe's line or its path.

    From a place of objects it is fetched, with `most_bytes` only its files up to that size.

    PlanError with the nearest spelling if it is neither.
    """
    if (Path(target) / MANIFEST).is_file():
        return Path(target).resolve()
    found = _latest(store, recipe, target)
    store.fetch(found, most_bytes=most_bytes)
    return found


def _latest(store: Store, recipe: str, target: str) -> Path:
    """The generation that a node of the recipe made or took last."""
    artifacts = store.records.latest_artifacts()
    latest = {node: path for (name, node), path in artifacts.items() if name == recipe}
    if target in latest:
        return latest[target]
    near = difflib.get_close_matches(target, latest, n=1)
    some = f"built: {', '.join(latest)}" if latest else f"build it first: ingot run {recipe}"
    hint = f"did you mean {near[0]!r}?" if near else some
    if others := sorted({name for name, node in artifacts if node == target}):
        hint = f"--recipe {others[0]} has one"
    raise PlanError(
        f"{target!r} is neither a finished artifact's folder nor a node of {recipe} that was "
        f"built in {store.mirror.url}; {hint}"
    )


def _said_store(sets: Sequence[str]) -> str | None:
    """The store that a `--set` names, by whose latest run the recipe is known."""
    said = [one.partition("=")[2] for one in sets if one.partition("=")[0] == "store.url"]
    return said[-1].strip("'\"") if said else None


def _latest_invocation(url: str) -> Invocation | None:
    records = Records(mirror_of(url), say=_ignore)
    latest = next(records.newest_first(), None)
    return None if latest is None else records.invocation(latest)


def _seeds(args: argparse.Namespace) -> tuple[int, ...]:
    """The seeds on the command line; ConfigError if a `--set` beside them says the seed as well."""
    seeds = parse_seeds(args.seeds)
    if seeds and (one := sets_seed(args.sets)):
        raise ConfigError(
            f"--set {one} beside --seeds {args.seeds}: both say the recipe's seed; drop one"
        )
    return seeds


def _last_of_each(sets: tuple[str, ...]) -> tuple[str, ...]:
    """Of several values for one field, the last, at its own place among the others."""
    kept: dict[str, str] = {}
    for one in sets:
        field = one.partition("=")[0]
        kept.pop(field, None)
        kept[field] = one
    return tuple(kept.values())


def _ignore(message: str) -> None:
    """Records that cannot be read are told of by the store, which reads them again."""


def _absolute(names: list[str], base: Path) -> tuple[str, ...]:
    """Paths made absolute, so that a run's record means the same from any folder."""
    return tuple(str(base / one) if one.endswith(".toml") else one for one in names)

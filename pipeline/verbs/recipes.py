"""`ingot recipes`: what can be run here, how large it is and how long it took last."""

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from itertools import takewhile
from pathlib import Path

from cluster.mirror import mirror_of
from configs.errors import ConfigError
from configs.parallel import StoreConfig
from configs.reading import load_recipe, shipped_recipes
from pipeline.figures import show_seconds
from pipeline.records import Records


@dataclass(frozen=True, slots=True)
class Offer:
    """A recipe that can be named."""

    name: str
    """As a command takes it."""
    size: str
    last: str
    about: str


def recipes(args: argparse.Namespace) -> int:
    """Print the shipped recipes and those in this folder, one a line."""
    here = sorted(Path.cwd().glob("*.toml"))
    times = _times(Path.cwd())
    offers = [_offer(name, _text(name), times) for name in shipped_recipes()]
    offers += [one for path in here for one in _own(path, times)]
    rows = [Offer("recipe", "parameters (a token)", "last run here", "what it is"), *offers]
    widths = [max(len(getattr(row, part)) for row in rows) for part in ("name", "size", "last")]
    for row in rows:
        print(
            f"{row.name:{widths[0]}}  {row.size:>{widths[1]}}  {row.last:>{widths[2]}}  {row.about}"
        )
    return 0


def _own(path: Path, times: dict[str, float]) -> Iterator[Offer]:
    """A recipe of the user's; nothing for an overlay, which is none by itself."""
    try:
        yield _offer(path.name, path.read_text(encoding="utf-8-sig"), times)
    except (ConfigError, UnicodeDecodeError, OSError):
        return


def _offer(name: str, text: str, times: dict[str, float]) -> Offer:
    recipe = load_recipe(name)
    model = recipe.model
    seconds = times.get(recipe.name)
    return Offer(
        name=name,
        size=f"{_short(model.parameters())} ({_short(model.parameters(active=True))})",
        last="never" if seconds is None else show_seconds(seconds),
        about=_about(text),
    )


def _about(text: str) -> str:
    """The first sentence of the comment that a recipe begins with."""
    lines = takewhile(lambda line: line.startswith("#"), text.splitlines())
    comment = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=[.?!]) |: ", comment, maxsplit=1)[0].rstrip(".")


def _text(name: str) -> str:
    return (resources.files("configs") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def _times(base: Path) -> dict[str, float]:
    """How long the newest run took that built each recipe to its end."""
    found: dict[str, float] = {}
    for run in Records(
        mirror_of(str(base / StoreConfig().url)), say=lambda message: None
    ).newest_first():
        if run.succeeded and any(one.outcome == "built" for one in run.outcomes.values()):
            found.setdefault(run.recipe, run.seconds)
    return found


def _short(count: int) -> str:
    """A number of parameters as people say it: `3.3M`, `671B`."""
    size, units = float(count), ["", "k", "M", "B", "T"]
    # As 1000 would be shown, a unit is too small.
    while size >= 999.5 and len(units) > 1:
        size /= 1000
        units.pop(0)
    return f"{size:.3g}{units[0]}"

"""`ingot new NAME --from tiny`: a recipe of the user's own, with its comments, to be edited."""

import argparse
import re
from importlib import resources
from pathlib import Path

from configs.errors import ConfigError
from configs.names import check_node_name
from configs.reading import load_recipe, shipped_recipes

_HEADER = """\
# {name}: begun as the shipped recipe `{source}`.
#
#   ingot plan {name}.toml         what a run would build, and why
#   ingot run {name}.toml          build it
#   ingot fields pretrain          every setting of a table, with its default and meaning
#
"""


def new(args: argparse.Namespace) -> int:
    """Write NAME.toml. ConfigError for a name that is none, or a file that is there already."""
    name = args.name.removesuffix(".toml")
    try:
        check_node_name(name)
    except ValueError as error:
        raise ConfigError(f"new {args.name!r}: {error}") from None
    path = Path(f"{name}.toml")
    text = _HEADER.format(name=name, source=args.source) + _renamed(_source(args.source), name)
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ConfigError(f"{path}: is there already; choose another name, or move it") from None
    except OSError as error:
        raise ConfigError(
            f"{path}: cannot be written ({error.strerror}); choose a folder"
        ) from None
    load_recipe(str(path))
    print(f"wrote {path}; `ingot plan {path}` says what it would build")
    return 0


def _source(name: str) -> str:
    """The text of a shipped recipe."""
    if name not in shipped_recipes():
        raise ConfigError(
            f"--from {name!r}: no shipped recipe; shipped: {', '.join(shipped_recipes())}"
        )
    return (resources.files("configs") / "recipes" / f"{name}.toml").read_text(encoding="utf-8")


def _renamed(text: str, name: str) -> str:
    """The recipe under another name, by which its artifacts are known from then on."""
    return re.sub(r'^name = ".*"$', f'name = "{name}"', text, count=1, flags=re.MULTILINE)

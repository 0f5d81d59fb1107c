"""Where a recipe's paths and addresses lead, settled once, before anything changes folder."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar
from urllib.parse import unquote

from configs.base import FrozenT
from configs.data import DataConfig
from configs.errors import ConfigError
from configs.masking import MASK
from configs.parallel import NO_SCHEME, TrackingConfig, is_tracking_address
from configs.recipe import Recipe

SQLITE = "sqlite:///"
_SPECIAL = str.maketrans({"%": "%25", "?": "%3F"})
"""What would mean something else in the address of a database than in a path."""
URI_VARIABLE = "MLFLOW_TRACKING_URI"
_GLOBS = ("glob", "held_out_glob")
"""Settings of sources and evaluations that say where their files lie."""

DataT = TypeVar("DataT", bound=DataConfig)


def absolute(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with every path of the user's made absolute from the folder `base`."""
    store = recipe.store.model_copy(update={"url": _absolute(recipe.store.url, base)})
    corpora = {name: _absolute_corpus(one, base) for name, one in recipe.data.corpora.items()}
    data = _absolute_corpus(recipe.data, base).model_copy(update={"corpora": corpora})
    if (file := recipe.data.tokenizer.file) is not None:
        settled = {"file": _absolute(file, base)}
        tokenizer = recipe.data.tokenizer.model_copy(update=settled)
        data = data.model_copy(update={"tokenizer": tokenizer})
    tracking = recipe.tracking
    if tracking.uri is not None and tracking.uri.startswith(SQLITE):
        tracking = tracking.model_copy(update={"uri": _absolute_sqlite(tracking.uri, base)})
    return recipe.model_copy(
        update={
            "store": store,
            "tracking": tracking,
            "base": None if recipe.base is None else _absolute(recipe.base, base),
            "data": data,
        }
    )


def tracking_uri(tracking: TrackingConfig, store_root: Path) -> str:
    """The MLflow address: the recipe's, else the environment's, else a SQLite file in the store."""
    if tracking.uri is not None:
        if MASK in tracking.uri:
            raise ConfigError(
                f"tracking.uri = {tracking.uri}: its password was left out of the record of the "
                f"latest run; give the recipe and its --set again, or set {URI_VARIABLE}"
            )
        return tracking.uri
    named = os.environ.get(URI_VARIABLE, "")
    if named and not is_tracking_address(named):
        # Not shown, as it may hold a password where nobody would look for one.
        raise ConfigError(f"{URI_VARIABLE}: {NO_SCHEME}")
    if named.startswith(SQLITE):
        return _absolute_sqlite(named, Path.cwd())
    return named or sqlite_uri(store_root / "mlflow.db")


def sqlite_uri(path: Path) -> str:
    """The address of the SQLite database in the file `path`."""
    return SQLITE + str(path).translate(_SPECIAL)


def sqlite_path(uri: str) -> Path | None:
    """The file of the SQLite database at this address; none if it is of another kind."""
    if not uri.startswith(SQLITE):
        return None
    return Path(unquote(uri.removeprefix(SQLITE).partition("?")[0]))


def _absolute(path: str, base: Path) -> str:
    if "://" in path:
        return path
    # Of a name that begins with a tilde and is no user's, this makes nothing, and Path an error.
    return str(base / os.path.expanduser(path))


def _absolute_sqlite(uri: str, base: Path) -> str:
    address, mark, settings = uri.partition("?")
    path = sqlite_path(address)
    assert path is not None
    return sqlite_uri(Path(_absolute(str(path), base))) + mark + settings


def _absolute_corpus(corpus: DataT, base: Path) -> DataT:
    """The corpus with the files of its sources and evaluations absolute."""
    return corpus.model_copy(
        update={
            "sources": _absolute_globs(corpus.sources, base),
            "evaluations": _absolute_globs(corpus.evaluations, base),
        }
    )


def _absolute_globs(read: Mapping[str, FrozenT], base: Path) -> dict[str, FrozenT]:
    settled = {}
    for name, one in read.items():
        globs = {field: getattr(one, field, None) for field in _GLOBS}
        update = {field: _absolute(glob, base) for field, glob in globs.items() if glob is not None}
        settled[name] = one.model_copy(update=update)
    return settled

"""Where a recipe's paths and addresses lead, settled once, before anything changes folder."""

import os
import re
from pathlib import Path
from urllib.parse import unquote

from configs.data import FilesSource, Source
from configs.errors import ConfigError
from configs.parallel import NO_SCHEME, TrackingConfig
from configs.recipe import Recipe

SQLITE = "sqlite:///"
_SPECIAL = str.maketrans({"%": "%25", "?": "%3F"})
"""What would mean something else in the address of a database than in a path."""
URI_VARIABLE = "MLFLOW_TRACKING_URI"
_PASSWORD = re.compile(r"(://[^/?#\s:@]*:)\S*(@)|([?&](?:password|token)=)[^&#\s]+", re.I)
_MASK = "***"


def absolute(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with every path of the user's made absolute from the folder `base`."""
    store = recipe.store.model_copy(update={"url": _absolute(recipe.store.url, base)})
    sources = {name: _absolute_source(one, base) for name, one in recipe.data.sources.items()}
    tokenizer = recipe.data.tokenizer
    if tokenizer.file is not None:
        tokenizer = tokenizer.model_copy(update={"file": _absolute(tokenizer.file, base)})
    tracking = recipe.tracking
    if tracking.uri is not None and tracking.uri.startswith(SQLITE):
        tracking = tracking.model_copy(update={"uri": _absolute_sqlite(tracking.uri, base)})
    return recipe.model_copy(
        update={
            "store": store,
            "tracking": tracking,
            "base": None if recipe.base is None else _absolute(recipe.base, base),
            "data": recipe.data.model_copy(update={"sources": sources, "tokenizer": tokenizer}),
        }
    )


def tracking_uri(tracking: TrackingConfig, store_root: Path) -> str:
    """The MLflow address: the recipe's, else the environment's, else a SQLite file in the store."""
    if tracking.uri is not None:
        return tracking.uri
    named = os.environ.get(URI_VARIABLE, "")
    if named and "://" not in named:
        raise ConfigError(f"{URI_VARIABLE} = {masked(named)}: {NO_SCHEME}")
    return named or sqlite_uri(store_root / "mlflow.db")


def masked(text: str) -> str:
    """Text that may hold an address, without the password in it."""
    return _PASSWORD.sub(lambda found: f"{found[1] or found[3]}{_MASK}{found[2] or ''}", text)


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
    return str(base / Path(path).expanduser())


def _absolute_sqlite(uri: str, base: Path) -> str:
    address, mark, settings = uri.partition("?")
    path = sqlite_path(address)
    assert path is not None
    return sqlite_uri(Path(_absolute(str(path), base))) + mark + settings


def _absolute_source(source: Source, base: Path) -> Source:
    if isinstance(source, FilesSource):
        return source.model_copy(update={"glob": _absolute(source.glob, base)})
    return source

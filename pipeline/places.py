"""Where a recipe's relative paths lead, settled once, before anything changes folder."""

from pathlib import Path

from configs.data import FilesSource, Source
from configs.parallel import TrackingConfig
from configs.recipe import Recipe

SQLITE = "sqlite:///"


def absolute(recipe: Recipe, base: Path) -> Recipe:
    """The recipe with every path of the user's made absolute from the folder `base`."""
    store = recipe.store.model_copy(update={"url": _absolute(recipe.store.url, base)})
    sources = {name: _absolute_source(one, base) for name, one in recipe.data.sources.items()}
    tokenizer = recipe.data.tokenizer
    if tokenizer.file is not None:
        tokenizer = tokenizer.model_copy(update={"file": _absolute(tokenizer.file, base)})
    tracking = recipe.tracking
    if tracking.uri is not None and tracking.uri.startswith(SQLITE):
        path = _absolute(tracking.uri.removeprefix(SQLITE), base)
        tracking = tracking.model_copy(update={"uri": SQLITE + path})
    return recipe.model_copy(
        update={
            "store": store,
            "tracking": tracking,
            "base": None if recipe.base is None else _absolute(recipe.base, base),
            "data": recipe.data.model_copy(update={"sources": sources, "tokenizer": tokenizer}),
        }
    )


def tracking_uri(tracking: TrackingConfig, store_root: Path) -> str:
    """The MLflow address: the one asked for, or a SQLite file inside the store."""
    return tracking.uri or f"{SQLITE}{store_root / 'mlflow.db'}"


def _absolute(path: str, base: Path) -> str:
    if "://" in path:
        return path
    return str(base / Path(path).expanduser())


def _absolute_source(source: Source, base: Path) -> Source:
    if isinstance(source, FilesSource):
        return source.model_copy(update={"glob": _absolute(source.glob, base)})
    return source

"""Supplies of workers that all see one folder, as on a single machine."""

from pathlib import Path

from cluster.mirror import Mirror
from cluster.saves import Saves
from cluster.supply import Supply


def local(builder: Path) -> Supply:
    """That of workers who work in the folder `builder`, which is made."""
    builder.mkdir(parents=True, exist_ok=True)
    sign = builder / "manifest.draft"
    sign.touch()
    return Supply(mirror=Mirror(str(builder), builder), sign=sign, is_spread=False)


def saves_of(builder: Path, *earlier: Path, start: tuple[Path, int] | None = None) -> Saves:
    """The saves of such a builder, below `resume/saves`."""
    return Saves(builder / "resume" / "saves", earlier, start, local(builder))

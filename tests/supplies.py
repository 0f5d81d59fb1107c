"""Supplies of workers that all see one folder, as on a single machine."""

from pathlib import Path

from cluster.mirror import Mirror
from cluster.supply import Supply


def local(folder: Path) -> Supply:
    """That of workers who work in `folder`, which is there."""
    return Supply(mirror=Mirror(str(folder), folder), sign=folder, is_spread=False)

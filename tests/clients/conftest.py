"""What all clients are tried on: each family's bundles, made once for a file of tests."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.clients.bundles import make_folders

Folders = Callable[[str], dict[str, Path]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """Variants of a family by target and name, as `cuda/fp8`; built when first asked for."""
    made: dict[str, dict[str, Path]] = {}

    def of(family: str) -> dict[str, Path]:
        if family not in made:
            made[family] = make_folders(tmp_path_factory.mktemp(family), family)
        return made[family]

    return of

"""V3.2's and V4's bundles in transformers: the same tokens as Ingot."""

import pytest

from tests.clients.conftest import Folders
from tests.clients.trying import require_equal, tried

pytestmark = pytest.mark.clients


TRIED = [("v32", "bf16"), ("narrow-v32", "fp8"), ("v4", "bf16"), ("v4", "fp8")]


@pytest.mark.parametrize(("family", "variant"), TRIED)
def test_transformers_encodes_renders_and_continues_as_ingot(
    folders: Folders, family: str, variant: str
) -> None:
    made = tried("transformers", folders(family)[f"cuda/{variant}"])
    require_equal(made)
    assert made["texts encoded alike"].of == made["conversations encoded alike"].of == 64

"""V3's bundle in vLLM on a CPU, through its own MLA path: the same tokens as Ingot."""

import pytest

from tests.clients.conftest import Folders
from tests.clients.trying import require_equal, tried

pytestmark = [pytest.mark.clients, pytest.mark.slow]


def test_offline(folders: Folders) -> None:
    made = tried("vllm", folders("v3")["cuda/bf16"], "offline")
    require_equal(made)
    assert made["texts encoded alike"].of == made["conversations encoded alike"].of == 64


def test_with_drafts_of_the_mtp_layer(folders: Folders) -> None:
    made = tried("vllm", folders("v3")["cuda/bf16"], "drafts")
    require_equal(made)
    assert made["drafts taken"].of > 64
    assert made["drafts taken"].equal > 0


def test_over_http_by_ids_by_text_and_by_conversation(folders: Folders) -> None:
    made = tried("vllm", folders("v3")["cuda/bf16"], "http")
    require_equal(made)
    assert made["greedy answers to texts alike"].of == 64
    assert made["texts encoded alike"].of == made["conversations encoded alike"].of == 64

"""What MLflow registered, loaded by its alias: the same answer as Ingot's."""

from pathlib import Path

import pytest

from tests.line.runs import ingot
from tests.line.ui import our_answer, served, strangers_answer

pytestmark = [pytest.mark.clients, pytest.mark.slow]


def test_a_stranger_loads_the_cuda_model_by_alias_and_gets_ingots_answer(tmp_path: Path) -> None:
    done = ingot(tmp_path, "run", "smoke", timeout_seconds=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    with served(tmp_path) as link:
        answer = strangers_answer(link, "ingot-smoke@cuda", "37+45=", apart=tmp_path)
    assert answer == our_answer(tmp_path, "37+45=")

"""The recipes made for servers, run whole, and their bundles in all clients by `ingot verify`."""

import re
from pathlib import Path

import pytest

from tests.clients.environments import ready
from tests.line.runs import ingot

pytestmark = [pytest.mark.clients, pytest.mark.slow]
RUN_SECONDS = 5400
TRIALS: dict[str, dict[str, tuple[str, ...]]] = {
    "servable": {
        "export.cuda": ("transformers", "lm-eval", "llama.cpp", "vllm"),
        "export.ascend": ("transformers", "vllm-ascend"),
    },
    "servable-v3.2": {"export.cuda": ("transformers",), "export.ascend": ("vllm-ascend",)},
    "servable-v4": {"export.cuda": ("transformers",), "export.ascend": ("vllm-ascend",)},
}


@pytest.fixture(scope="module", params=TRIALS)
def run(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """A folder in which a recipe's line has ended well; its name is the recipe's."""
    folder = tmp_path_factory.mktemp("run") / str(request.param)
    folder.mkdir()
    done = ingot(folder, "run", str(request.param), timeout_seconds=RUN_SECONDS)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_its_bundles_are_whole_and_clients_answer_as_ingot_does(run: Path) -> None:
    for node, programs in TRIALS[run.name].items():
        for program in programs:
            ready(program)
            done = ingot(run, "verify", node, "--with", program, timeout_seconds=RUN_SECONDS)
            assert done.returncode == 0, done.stdout + done.stderr
            assert "DIFFERENT" not in done.stdout
            if program == "lm-eval":
                # Verdicts that are all alike would prove nothing.
                right = re.findall(r"verdicts alike \((\d+) of 64 right\): 64 of 64", done.stdout)
                assert right
                assert all(int(one) > 0 for one in right)

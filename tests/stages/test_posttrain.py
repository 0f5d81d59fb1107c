"""The loop of post-training, on pools in this process that remember what they were asked."""

from pathlib import Path

import pytest

from stages.contract import Workspace
from tests.stages.rl_lab import Lab, make_lab


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    """A corpus, a base, and pools."""
    return make_lab(tmp_path / "lab", monkeypatch)


def test_try(lab: Lab, workspace: Workspace) -> None:
    import time
    t = time.time()
    made = lab.run(workspace)
    print(time.time() - t)
    print(made)
    for line in lab.log(workspace):
        print({k: v for k, v in line.items() if k != "expert_load"})
    print(lab.book.verbs())
    print(workspace.path("history.json").read_text())
    print(workspace.tracker.notes)

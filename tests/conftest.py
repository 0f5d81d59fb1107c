"""What tests of several floors share: a tracker that remembers, a store, a workspace."""

import json
import os
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.parallel import ClusterConfig, StoreConfig
from stages.contract import Tracker, Workspace
from stages.hashing import Hashes
from stages.manifest import FILES, Lease
from tests import (
    checks,
    interpreted,  # noqa: F401 - what it does, it does when it is imported
)
from tests.supplies import local

# Two files run at a time, and threads that wait for each other's cores are slower than none. torch
# read the variable when it was imported; processes that tests start do so later.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
# Tests do not depend on the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A shell's background jobs ignore Ctrl-C and hand that on; the tests of it would wait in vain.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

OWNER = "test"


FLOORS = ("line", "pipeline", "stages", "cluster", "model")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the whole line and end with small parts: long files do not come last, alone."""
    order = {floor: number for number, floor in enumerate(FLOORS)}
    items.sort(key=lambda item: order.get(item.path.parent.name, len(order)))


def pytest_runtest_setup() -> None:
    """Check the signatures of the model in the first calls of every test, its fixtures included."""
    checks.begin()


@dataclass
class Recorder:
    """A Tracker that keeps what it is told, in order, and reports to nobody."""

    started: list[tuple[int, str]] = field(default_factory=list)
    logged: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)

    def start(self, *, steps: int, unit: str) -> None:
        """Keep the announcement."""
        self.started.append((steps, unit))

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Keep one step."""
        self.logged.append((step, dict(metrics)))

    def note(self, message: str) -> None:
        """Keep one line."""
        self.notes.append(message)

    def tag(self, name: str, value: str) -> None:
        """Keep one mark."""
        self.tags[name] = value


def workspace_at(
    generation: Path,
    tracker: Tracker,
    *,
    machines: ClusterConfig | None = None,
    earlier: tuple[str, ...] = (),
) -> Workspace:
    """A builder's folder below `generation` as the store makes it, with a lease of number 1.

    The lease is lost to whoever writes one of a higher number (`steal`).
    """
    lease = Lease(str(generation), 1, OWNER)
    files = generation / f"000001-{OWNER}" / FILES
    files.mkdir(parents=True, exist_ok=True)
    Path(lease.uri).write_text(json.dumps({"owner": OWNER}))
    return Workspace(
        out=str(files),
        machines=machines or ClusterConfig(),
        tracker=tracker,
        lease=lease,
        hashes=Hashes(),
        supply=local(files.parent),
        earlier=earlier,
    )


def steal(work: Workspace) -> None:
    """Let another builder take the lease of `work`."""
    Path(replace(work.lease, number=work.lease.number + 1).uri).write_text("{}")


@pytest.fixture
def recorder() -> Recorder:
    """A tracker to look into."""
    return Recorder()


@pytest.fixture
def make_workspace(tmp_path: Path, recorder: Recorder) -> Callable[..., Workspace]:
    """Make a workspace named as the caller says, whose lease holds until its file changes."""

    def make(name: str = "slot", *, machines: ClusterConfig | None = None) -> Workspace:
        return workspace_at(tmp_path / name, recorder, machines=machines)

    return make


@pytest.fixture
def workspace(make_workspace: Callable[..., Workspace]) -> Workspace:
    """A workspace with a valid lease and the `recorder` as its tracker."""
    return make_workspace()


@pytest.fixture
def store_config(tmp_path: Path) -> StoreConfig:
    """A store in a folder of its own, which asks for no free disk."""
    return StoreConfig(url=str(tmp_path / "store"), min_free_bytes=0)

"""Whether all machines of a named cluster run what the driver runs, asked before the first stage.

A worker whose torch or whose copy of this code differs computes something else, or fails on a name
that it does not know, hours later and in words that do not tell why.
"""

import hashlib
import platform
import time
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import NodeDiedError, TaskUnschedulableError, WorkerCrashedError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.head import require_head
from configs.errors import MachineError

_LOOK_SECONDS = 0.5
_FLOORS = ("configs", "model", "cluster", "stages")
"""What workers import."""


def versions() -> dict[str, str]:
    """What this process runs: Python, torch without its build, ray, and Ingot by its files."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__.partition("+")[0],
        "ray": version("ray"),
        "ingot": _digest(Path(__file__).parents[1]),
    }


def require_equal_nodes(
    address: str, *, timeout_seconds: float, known: Collection[str] = ()
) -> set[str]:
    """The ids of the machines that run what this process does; those that are `known` to are not
    asked again, and those that are leaving are passed over.

    MachineError naming the machine, what differs there and both versions, or which does not answer.
    """
    alive = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes() if node["Alive"]}
    asked: dict[Any, str] = {}
    for node in alive.keys() - known:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        task = ray.remote(num_cpus=0, max_retries=0)(versions).options(scheduling_strategy=there)
        asked[task.remote()] = node
    done, late = _await_all(list(asked), timeout_seconds)
    names = {ref: f"{alive[node]} ({node[:8]})" for ref, node in asked.items()}
    if late:
        raise MachineError(
            f"cluster.address = {address!r}: {names[late[0]]} did not say within "
            f"{timeout_seconds:g} s what it runs; see that it is up, or raise "
            "cluster.startup_timeout_seconds"
        )
    own, equal = versions(), alive.keys() & known
    for ref in done:
        try:
            theirs = ray.get(ref)
        except (TaskUnschedulableError, NodeDiedError, WorkerCrashedError):
            continue  # It was dead already, and Ray had not noticed.
        _compare(address, names[ref], theirs, own)
        equal.add(asked[ref])
    return equal


def _await_all(refs: list[Any], timeout_seconds: float) -> tuple[list[Any], list[Any]]:
    """(done, late), in short waits, between which an interrupt is noticed."""
    done: list[Any] = []
    late, deadline = refs, time.monotonic() + timeout_seconds
    while late and time.monotonic() < deadline:
        require_head()
        done, late = ray.wait(refs, num_returns=len(refs), timeout=_LOOK_SECONDS)
    return done, late


def _compare(address: str, node: str, theirs: Mapping[str, str], own: Mapping[str, str]) -> None:
    for name, mine in own.items():
        if theirs.get(name) != mine:
            what = "other files of ingot" if name == "ingot" else f"{name} {theirs.get(name)}"
            here = "" if name == "ingot" else f", and the driver {mine}"
            raise MachineError(
                f"cluster.address = {address!r}: {node} has {what}{here}; install the same on "
                "every machine"
            )


def _digest(root: Path) -> str:
    digest = hashlib.sha256()
    for floor in _FLOORS:
        for path in sorted((root / floor).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def this_node() -> str | None:
    """What Ray calls the machine of this process; none outside Ray."""
    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else None

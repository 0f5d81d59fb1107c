"""Whether all machines of a named cluster run what the driver runs, asked before the first stage.

A worker whose torch or whose copy of this code differs computes something else, or fails on a name
that it does not know, hours later and in words that do not tell why.
"""

import hashlib
import platform
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from configs.errors import MachineError

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


def require_equal_nodes(address: str, *, timeout_seconds: float) -> None:
    """MachineError naming the machine, what differs there and both versions.

    Also if a machine does not answer in time.
    """
    asked: dict[str, Any] = {}
    for node in ray.nodes():
        if node["Alive"]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0)(versions).options(scheduling_strategy=there)
            asked[f"{node['NodeManagerAddress']} ({node['NodeID'][:8]})"] = task.remote()
    done, late = ray.wait(
        list(asked.values()), num_returns=len(asked), timeout=timeout_seconds, fetch_local=True
    )
    names = {ref: name for name, ref in asked.items()}
    if late:
        raise MachineError(
            f"cluster.address = {address!r}: {names[late[0]]} did not say within "
            f"{timeout_seconds:g} s what it runs; see that it is up, or raise "
            "cluster.startup_timeout_seconds"
        )
    own = versions()
    for ref in done:
        _compare(address, names[ref], ray.get(ref), own)


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

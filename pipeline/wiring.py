"""Nodes that name their inputs, turned into a plan: whatever its shape, each node after its inputs.

A node may be named before the one that makes its input, and by whoever adds it: phases may follow
a plugin's node, and a plugin's node a phase.
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from configs.base import Frozen
from configs.errors import ConfigError, PlanError
from configs.explain import explain
from configs.reading import validate
from configs.recipe import NodeConfig
from pipeline.loading import load_stage
from stages.contract import Face, Planned

Line = dict[str, Planned[Any]]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A node to be: its stage, its config, and the nodes that supply its inputs."""

    stage: Face[Any]
    config: Frozen
    inputs: Mapping[str, str] = field(default_factory=dict)
    """The stage's input names to nodes."""
    said_in: str = ""
    """The recipe's own words for where an input is named, for errors."""


def wire(wanted: Mapping[str, Wanted]) -> Line:
    """Plan every node. Runs nothing.

    PlanError if an input is no node, if nodes need one another in a circle, or if a stage does not
    take what it is given.
    """
    for name, node in wanted.items():
        for role, supplier in node.inputs.items():
            if supplier not in wanted:
                raise PlanError(_unknown(name, node, role, supplier, wanted))
    line: Line = {}
    waiting = dict(wanted)
    while waiting:
        ready = [name for name, node in waiting.items() if set(node.inputs.values()) <= line.keys()]
        if not ready:
            raise PlanError(_circle(waiting))
        # One at a time: nodes stay in the order in which they are named, as far as that can be.
        name = ready[0]
        node = waiting.pop(name)
        inputs = {role: line[supplier] for role, supplier in node.inputs.items()}
        try:
            line[name] = node.stage(node.config, **inputs)
        except PlanError as error:
            raise PlanError(f"{node.said_in or name}: {error}") from None
    return line


def added(nodes: Mapping[str, NodeConfig], line: Mapping[str, Wanted]) -> dict[str, Wanted]:
    """The nodes that a recipe adds to `line`: a stage by import path, its config by its schema."""
    if taken := sorted(line.keys() & nodes.keys()):
        raise PlanError(f"nodes.{taken[0]}: the line has a node of that name; choose another")
    return {name: _added(name, node) for name, node in nodes.items()}


def _added(name: str, node: NodeConfig) -> Wanted:
    stage = load_stage(name, node.use)
    try:
        config = validate(stage.config, node.config)
    except ValidationError as error:
        origin = f"nodes.{name}.config"
        raise ConfigError(explain(error, stage.config, origin=origin)) from None
    return Wanted(stage, config, node.inputs, said_in=f"nodes.{name}")


def _unknown(
    name: str, node: Wanted, role: str, supplier: str, wanted: Mapping[str, Wanted]
) -> str:
    """That an input comes from what is no node, with the nearest spelling."""
    near = difflib.get_close_matches(supplier, [one for one in wanted if one != name], n=1)
    hint = (
        f"did you mean {near[0]!r}?"
        if near
        else f"leave it out, or name one of {', '.join(wanted)}"
    )
    where = f"{node.said_in or name}: its input {role}"
    return f"{where} is to come from {supplier!r}, which is no node of this line; {hint}"


def _circle(waiting: Mapping[str, Wanted]) -> str:
    """That nodes wait for one another, and which."""
    path = [next(iter(waiting))]
    while path[-1] not in path[:-1]:
        inputs = waiting[path[-1]].inputs.values()
        path.append(next(supplier for supplier in inputs if supplier in waiting))
    circle = path[path.index(path[-1]) :]
    if len(circle) == 2:
        node = waiting[circle[0]]
        return f"{node.said_in or circle[0]}: {circle[0]} is made of itself; name another node"
    return (
        f"{' needs '.join(circle)}: these nodes are made of one another; let one of them come "
        "after another node"
    )

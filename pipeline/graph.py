"""The line as named nodes in an order that respects their inputs, and the selection of some."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from configs.errors import PlanError
from configs.recipe import check_node_name
from pipeline.fingerprint import Identity, identify
from stages.contract import Planned
from stages.hashing import Hashes


@dataclass(frozen=True, slots=True)
class Node:
    """A planned stage under its name in the line."""

    name: str
    planned: Planned[Any]
    inputs: Mapping[str, str]
    """The stage's input names to the nodes that supply them."""
    identity: Identity

    @property
    def fingerprint(self) -> str:
        """Identity in 16 hexadecimal digits."""
        return self.identity.fingerprint


@dataclass(frozen=True)
class Graph:
    """Nodes by name; iteration goes from inputs to what is made of them."""

    nodes: Mapping[str, Node]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.nodes.values())

    def __getitem__(self, name: str) -> Node:
        return self.nodes[name]

    def before(self, name: str) -> list[Node]:
        """Every node that `name` is made of, directly or not, in order."""
        needed = set(self.nodes[name].inputs.values())
        for node in reversed(list(self)):
            if node.name in needed:
                needed |= set(node.inputs.values())
        return [node for node in self if node.name in needed]

    def after(self, name: str) -> list[Node]:
        """Every node made of `name`, directly or not, in order."""
        found = {name}
        for node in self:
            if found & set(node.inputs.values()):
                found.add(node.name)
        return [self.nodes[one] for one in self.nodes if one in found and one != name]

    def resolve(self, selector: str) -> list[str]:
        """Node names meant by a node's name or a stage's name; PlanError with the nearest one."""
        if selector in self.nodes:
            return [selector]
        names = [node.name for node in self if node.planned.stage.name == selector]
        if not names:
            known = [*self.nodes, *(node.planned.stage.name for node in self)]
            near = difflib.get_close_matches(selector, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"nodes: {', '.join(self.nodes)}"
            raise PlanError(f"{selector!r} is neither a node nor a stage of this line; {hint}")
        return names


def make_graph(line: Mapping[str, Planned[Any]], hashes: Hashes) -> Graph:
    """Name, order and identify the nodes of a line, whose files are as `hashes` knows them.

    PlanError if a node's name is none or hides a stage's, or an input is not part of the line.
    """
    names = {planned: name for name, planned in line.items()}
    for name in line:
        try:
            check_node_name(name)
        except ValueError as error:
            raise PlanError(f"node {name!r}: {error}") from None
    _check_selectors(line)
    for name, planned in line.items():
        for role, supplier in planned.inputs.items():
            if supplier not in names:
                raise PlanError(
                    f"node {name}: its input {role} comes from a {supplier.stage.name} that has "
                    "no name in the line; add it"
                )
    nodes: dict[str, Node] = {}
    waiting = dict(line)
    while waiting:
        # A plan is built from its inputs up, so some waiting node always has them all.
        name = next(n for n in waiting if all(names[i] in nodes for i in line[n].inputs.values()))
        planned = waiting.pop(name)
        inputs = {role: names[supplier] for role, supplier in planned.inputs.items()}
        fingerprints = {role: nodes[supplier].fingerprint for role, supplier in inputs.items()}
        nodes[name] = Node(name, planned, inputs, identify(planned, fingerprints, hashes))
    return Graph(nodes)


def _check_selectors(line: Mapping[str, Planned[Any]]) -> None:
    """PlanError if a stage that others are built by cannot be selected, for a node has its name."""
    for name, planned in line.items():
        stage = planned.stage.name
        if stage in line and line[stage].stage.name != stage:
            raise PlanError(
                f"node {stage}, built by stage {line[stage].stage.name}: its name is that of the "
                f"stage which builds node {name}, and would select the one or the other; rename it"
            )


@dataclass(frozen=True, slots=True)
class Selection:
    """What the user asked to build, by node names or stage names. Empty means what is stale."""

    only: tuple[str, ...] = ()
    """Build these if stale, and nothing else."""
    start: tuple[str, ...] = ()
    """Rebuild these and everything after them."""
    force: tuple[str, ...] = ()
    """Rebuild these; what comes after them waits for a plain run."""


class Role(Enum):
    """What the selection asks of one node."""

    IF_STALE = "if stale"
    ALWAYS_FROM = "asked for by --from"
    ALWAYS_FORCE = "asked for by --force"
    AFTER_FORCE = "after a node asked for by --force"
    LEAVE = "left out by --only"


LEFT = frozenset({Role.AFTER_FORCE, Role.LEAVE})
"""Roles of nodes that are taken as they are, and not built."""


def assign_roles(graph: Graph, selection: Selection) -> dict[str, Role]:
    """The role of every node; PlanError for an unknown selector or two that contradict."""
    only = {name for one in selection.only for name in graph.resolve(one)}
    start = {name for one in selection.start for name in graph.resolve(one)}
    start |= {node.name for name in start for node in graph.after(name)}
    force = {name for one in selection.force for name in graph.resolve(one)}
    after = {node.name for name in force for node in graph.after(name)}
    if only and (excluded := (start | force) - only):
        raise PlanError(
            f"--only {' '.join(selection.only)} leaves out {', '.join(sorted(excluded))}, which "
            "--from or --force asks to rebuild; drop one of the two"
        )

    def role(name: str) -> Role:
        if only and name not in only:
            return Role.LEAVE
        if name in force:
            return Role.ALWAYS_FORCE
        if name in start:
            return Role.ALWAYS_FROM
        return Role.AFTER_FORCE if name in after and not only else Role.IF_STALE

    return {name: role(name) for name in graph.nodes}

"""The line as named nodes in an order that respects their inputs, and the selection of some."""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any

from configs.errors import PlanError
from configs.names import check_node_name
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
    seed: int | None = None
    """The one of several seeds whose node it is; none if there is one seed, or all share it."""

    @property
    def line_name(self) -> str:
        """Its name where the line is planned for one seed."""
        return self.name if self.seed is None else self.name.removesuffix(_suffix(self.seed))

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
        """Node names meant by a node's name, with or without its seed, or by a stage's name.

        PlanError with the nearest spelling if it is none of these.
        """
        if selector in self.nodes:
            return [selector]
        of_line = [node.name for node in self if node.line_name == selector]
        of_stage = [node.name for node in self if node.planned.stage.name == selector]
        if names := of_line or of_stage:
            return names
        known = [*self.nodes]
        known += [one for node in self for one in (node.line_name, node.planned.stage.name)]
        near = difflib.get_close_matches(selector, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"nodes: {', '.join(self.nodes)}"
        raise PlanError(f"{selector!r} is neither a node nor a stage of this line; {hint}")


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


def side_by_side(graphs: Mapping[int, Graph]) -> Graph:
    """One graph of the same line planned for several seeds, the whole of each seed in turn.

    A node that is the same for every seed is there once under its own name, which with one seed is
    true of all; of the others, `pretrain` of seed 1 becomes `pretrain.seed-1`. PlanError if another
    node has that name, or it is too long for one.
    """
    first = next(iter(graphs.values()))
    varying = {
        name
        for name in first.nodes
        if len({graph[name].fingerprint for graph in graphs.values()}) > 1
    }
    nodes: dict[str, Node] = {}
    for seed, graph in graphs.items():
        names = {one: one + _suffix(seed) if one in varying else one for one in graph.nodes}
        for node in graph:
            name = names[node.name]
            inputs = {role: names[supplier] for role, supplier in node.inputs.items()}
            of_seed = seed if node.name in varying else None
            placed = replace(node, name=name, inputs=inputs, seed=of_seed)
            _check_place(placed, nodes)
            nodes.setdefault(name, placed)
    return Graph(nodes)


def _suffix(seed: int) -> str:
    return f".seed-{seed}"


def _check_place(node: Node, placed: Mapping[str, Node]) -> None:
    """PlanError if the name that a node gets beside those of other seeds is none, or taken."""
    try:
        check_node_name(node.name)
    except ValueError as error:
        raise PlanError(f"node {node.line_name} of seed {node.seed}: {error}") from None
    if node.name in placed and placed[node.name].line_name != node.line_name:
        raise PlanError(
            f"node {node.name}: with --seeds another node gets this name for one of the seeds; "
            "rename it in the recipe"
        )


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

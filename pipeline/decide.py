"""What must be built, and why: the state of each node, and what a selection makes of it."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import ArtifactError, PlanError
from pipeline.fingerprint import differences
from pipeline.graph import LEFT, Graph, Node, Role, Selection, assign_roles
from pipeline.store import Committed, Store, has_resume_state
from stages.manifest import read_manifest


@dataclass(frozen=True, slots=True)
class Fresh:
    """Committed, undamaged, and made of what its inputs are now."""

    committed: Committed


@dataclass(frozen=True, slots=True)
class Stale:
    """An earlier artifact of the node exists, but is not what is asked for now."""

    reasons: tuple[str, ...]
    generation: int = 0
    """The committed generation that a rebuild replaces; 0 if there is none of this identity."""


@dataclass(frozen=True, slots=True)
class Missing:
    """The node was never built."""

    reasons: tuple[str, ...] = ("never built",)
    generation: int = 0


@dataclass(frozen=True, slots=True)
class Damaged:
    """Committed, but not readable, or its files are not what its manifest says."""

    reasons: tuple[str, ...]
    generation: int


@dataclass(frozen=True, slots=True)
class Unsettled:
    """Committed, but what it is made of must be built first and may come out different."""

    committed: Committed
    inputs: tuple[str, ...]

    @property
    def reasons(self) -> tuple[str, ...]:
        """One line for each input that is to be built."""
        return tuple(f"depends on {name}, which is not up to date" for name in self.inputs)


State = Fresh | Stale | Missing | Damaged | Unsettled


@dataclass(frozen=True, slots=True)
class Reuse:
    """Take the committed artifact."""

    committed: Committed


@dataclass(frozen=True, slots=True)
class Build:
    """Build, for these reasons."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Recheck:
    """Decided once these nodes are built: reused if they come out as they were, built if not."""

    inputs: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Refuse:
    """Cannot be used as it is; building goes on without it and what depends on it."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NotSelected:
    """Left as it is."""

    reason: str


Decision = Reuse | Build | Recheck | Refuse | NotSelected


class Examiner:
    """Judges nodes against the store, remembering which artifact each node made last."""

    def __init__(self, store: Store, recipe: str) -> None:
        """Judge for the recipe of this name, whose runs tell what a stale node was before."""
        self._store = store
        self._recipe = recipe
        self._latest = store.records.latest_artifacts()

    def examine(
        self, node: Node, inputs: Mapping[str, Committed], *, hashes: bool
    ) -> Fresh | Stale | Missing | Damaged:
        """The state of one node, given what its inputs are; `hashes` also hashes its files."""
        try:
            committed = self._store.find(node)
        except ArtifactError as error:
            return Damaged((str(error),), self._store.newest(node))
        if committed is None:
            return self._what_changed(node)
        recorded = committed.manifest.inputs
        rebuilt = tuple(
            f"input {role} rebuilt"
            for role, one in inputs.items()
            if recorded[role].content != one.manifest.content
        )
        if rebuilt:
            return Stale(rebuilt, committed.generation)
        try:
            committed.check(hashes=hashes)
        except ArtifactError as error:
            return Damaged((str(error),), committed.generation)
        return Fresh(committed)

    def _what_changed(self, node: Node) -> Stale | Missing:
        unfinished = any(map(has_resume_state, self._store.folder(node).glob("g*/[0-9]*-*")))
        extra = ("continues an interrupted build",) if unfinished else ()
        path = self._latest.get((self._recipe, node.name))
        if path is None:
            return Missing(("never built", *extra))
        try:
            old = read_manifest(str(path))
        except ArtifactError:
            return Missing((f"its last artifact, {path}, is unreadable", *extra))
        changed = differences(old.identity, node.identity.fields, node.planned.config)
        return Stale((*(changed or (f"{path.parent} was emptied",)), *extra))


def survey(graph: Graph, examiner: Examiner, *, hashed: Collection[str] = ()) -> dict[str, State]:
    """The state of every node; the files of those in `hashed` are hashed as well."""
    states: dict[str, State] = {}
    for node in graph:
        fresh = {role: states[supplier] for role, supplier in node.inputs.items()}
        inputs = {role: s.committed for role, s in fresh.items() if isinstance(s, Fresh)}
        state: State = examiner.examine(node, inputs, hashes=node.name in hashed)
        if isinstance(state, Fresh) and len(inputs) < len(node.inputs):
            late = sorted({node.inputs[role] for role in fresh if role not in inputs})
            state = Unsettled(state.committed, tuple(late))
        states[node.name] = state
    return states


def in_use(states: Mapping[str, State]) -> tuple[str, ...]:
    """Addresses of the artifacts that a run over these states may reuse."""
    found = (one.committed.address for one in states.values() if isinstance(one, Fresh | Unsettled))
    return tuple(sorted(set(found)))


def relied_on(graph: Graph, selection: Selection) -> set[str]:
    """Nodes that the selection leaves as they are and that a node it asks for is made of.

    A run takes them as they are or not at all, so they are worth hashing before it starts.
    """
    return {upstream.name for _, upstream in _outside(graph, assign_roles(graph, selection))}


def decide(graph: Graph, selection: Selection, states: Mapping[str, State]) -> dict[str, Decision]:
    """What a run with this selection would do with every node.

    PlanError if a node that is asked for is made of one that the selection leaves as it is and
    that is not fresh.
    """
    roles = assign_roles(graph, selection)
    _require_fresh_upstream(graph, roles, states)
    decisions: dict[str, Decision] = {}
    for node in graph:
        moving = tuple(
            supplier
            for supplier in dict.fromkeys(node.inputs.values())
            if isinstance(decisions[supplier], Build | Recheck)
        )
        refused = [one for one in node.inputs.values() if isinstance(decisions[one], Refuse)]
        decision = _decide_one(roles[node.name], states[node.name], moving)
        if refused and not isinstance(decision, NotSelected):
            decision = Refuse((f"made of {refused[0]}, which cannot be used as it is",))
        decisions[node.name] = decision
    return decisions


def _decide_one(role: Role, state: State, moving: tuple[str, ...]) -> Decision:
    match role, state:
        case Role.LEAVE, _:
            return NotSelected(role.value)
        case Role.AFTER_FORCE, _:
            return NotSelected(f"{role.value}; a plain run rebuilds it if that came out different")
        case ((Role.ALWAYS_FORCE | Role.ALWAYS_FROM), _):
            return Build((role.value,))
        case _, Fresh(committed):
            return Recheck(moving) if moving else Reuse(committed)
        case _, Unsettled(inputs=inputs):
            return Recheck(inputs)
        case _, Damaged(reasons):
            return Refuse(reasons)
        case _, Stale(reasons) | Missing(reasons):
            return Build(reasons)
    raise AssertionError(role)


def _require_fresh_upstream(
    graph: Graph, roles: Mapping[str, Role], states: Mapping[str, State]
) -> None:
    for name, upstream in _outside(graph, roles):
        state = states[upstream.name]
        if not isinstance(state, Fresh):
            word = type(state).__name__.lower()
            raise PlanError(
                f"{name}, which is asked for, is made of {upstream.name}, which is {word} "
                f"({'; '.join(state.reasons)}) and {roles[upstream.name].value}; "
                f"{_remedy(upstream.name, roles[upstream.name], state)}"
            )


def _remedy(name: str, role: Role, state: State) -> str:
    if role is Role.AFTER_FORCE:
        return f"add --force {name}, or run without --force"
    if isinstance(state, Damaged):
        return f"run --force {name} first"
    return f"run --only {name} first, or run without --only"


def _outside(graph: Graph, roles: Mapping[str, Role]) -> Iterator[tuple[str, Node]]:
    """Each node asked for with each node upstream of it that is left as it is."""
    for node in graph:
        if roles[node.name] not in LEFT:
            for upstream in graph.before(node.name):
                if roles[upstream.name] in LEFT:
                    yield node.name, upstream


def as_json(decision: Decision) -> dict[str, Any]:
    """A decision as JSON values, for `plan --json`."""
    match decision:
        case Reuse(committed):
            return {"decision": "reuse", "uri": str(committed.path), "reasons": []}
        case Build(reasons):
            return {"decision": "build", "reasons": list(reasons)}
        case Recheck(inputs):
            return {"decision": "recheck", "reasons": [explain_recheck(inputs)]}
        case Refuse(reasons):
            return {"decision": "refuse", "reasons": list(reasons)}
        case NotSelected(reason):
            return {"decision": "leave", "reasons": [reason]}


def explain_recheck(inputs: tuple[str, ...]) -> str:
    """Why a decision must wait, in one clause."""
    return f"reused if {' and '.join(inputs)} come out as before, built if not"

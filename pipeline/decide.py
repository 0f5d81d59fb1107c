"""What becomes of each node: one judgement, for a plan and for the run that follows it.

A node is judged by its role (what the selection asks of it), its state (what there is of it) and
its suppliers (what is known of the nodes that its inputs come from). A plan judges before anything
is built, when some suppliers are still moving; a run judges a node once none of its suppliers is.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from configs.errors import PlanError
from pipeline.graph import LEFT, Graph, Node, Role, Selection, assign_roles
from pipeline.states import Damaged, Examiner, Fresh, Missing, Stale, State
from pipeline.store import Committed


@dataclass(frozen=True, slots=True)
class Settled:
    """A supplier whose artifact is there to be taken."""

    committed: Committed


@dataclass(frozen=True, slots=True)
class Moving:
    """A supplier that is still to be built or rechecked, and may come out different.

    Only a plan knows such, and `Doubtful` ones.
    """


@dataclass(frozen=True, slots=True)
class Doubtful:
    """A supplier that is left as it is, and up to date only if a moving one comes out as before."""


@dataclass(frozen=True, slots=True)
class Lost:
    """A supplier that was to be had and is not."""

    outcome: str
    """`refused`, `failed` or `blocked`."""


@dataclass(frozen=True, slots=True)
class Left:
    """A supplier that the selection leaves as it is, and that cannot be used so."""

    reason: str


Supplier = Settled | Moving | Doubtful | Lost | Left


@dataclass(frozen=True, slots=True)
class Reuse:
    """Take the committed artifact."""

    committed: Committed


@dataclass(frozen=True, slots=True)
class Build:
    """Build, for these reasons."""

    reasons: tuple[str, ...]
    provided: tuple[str, ...] = ()
    """Doubtful suppliers: if one of them is out of date when its turn has come, this is blocked."""


@dataclass(frozen=True, slots=True)
class Recheck:
    """Decided once these nodes are built: reused if they come out as they were, built if not."""

    inputs: tuple[str, ...]
    provided: tuple[str, ...] = ()
    """As that of `Build`."""


@dataclass(frozen=True, slots=True)
class Refuse:
    """Cannot be used as it is; the run goes on without it and what is made of it."""

    reasons: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Block:
    """Cannot be built, for want of a supplier."""

    by: str
    reason: str = ""
    """Why `by` is not there, if the selection left it as it is; empty if it did not succeed."""


@dataclass(frozen=True, slots=True)
class Leave:
    """Left as it is."""

    reason: str
    supplier: Settled | Doubtful | Left
    """What it is, as it is, to those that are made of it."""


Decision = Reuse | Build | Recheck | Refuse | Block | Leave


def judge(role: Role, state: State, suppliers: Mapping[str, Supplier]) -> Decision:
    """What becomes of a node, given its suppliers by their names."""
    for name, supplier in suppliers.items():
        if isinstance(supplier, Lost | Left):
            return _without(role, name, supplier)
    doubtful = tuple(name for name, one in suppliers.items() if isinstance(one, Doubtful))
    moving = tuple(name for name, one in suppliers.items() if isinstance(one, Moving | Doubtful))
    match role, state:
        case ((Role.ALWAYS_FORCE | Role.ALWAYS_FROM), _):
            return Build((role.value,), doubtful)
        case Role.IF_STALE, Fresh(committed):
            return Recheck(moving, doubtful) if moving else Reuse(committed)
        case Role.IF_STALE, Damaged(reasons):
            return Refuse(reasons)
        case Role.IF_STALE, Stale(reasons) | Missing(reasons):
            return Build(reasons, doubtful)
        case Role.AFTER_FORCE, Fresh(committed) if not moving:
            return Reuse(committed)
        case _, Fresh(committed):
            return Leave(_why_left(role), Doubtful() if moving else Settled(committed))
        case _, Stale(reasons) | Missing(reasons) | Damaged(reasons):
            left = Left(f"{role.value}, and not up to date ({'; '.join(reasons)})")
            return Leave(_why_left(role), left)
    raise AssertionError(role)


def _without(role: Role, name: str, supplier: Lost | Left) -> Decision:
    """What becomes of a node that the supplier of this name leaves without an input."""
    match role, supplier:
        case (Role.LEAVE, Lost(why) | Left(why)) | (Role.AFTER_FORCE, Left(why)):
            left = Left(f"{role.value}, and made of {name}, which is {why}")
            return Leave(_why_left(role), left)
        case _, Left(why):
            return Block(name, why)
        case _, Lost():
            return Block(name)
    raise AssertionError(role)


def _why_left(role: Role) -> str:
    later = "; a plain run rebuilds it if that came out different"
    return f"{role.value}{later if role is Role.AFTER_FORCE else ''}"


def supply(decision: Decision) -> Supplier:
    """What a node is to those that are made of it, before a run does what is decided."""
    match decision:
        case Reuse(committed):
            return Settled(committed)
        case Build() | Recheck():
            return Moving()
        case Refuse():
            return Lost("refused")
        case Block():
            return Lost("blocked")
        case Leave(supplier=supplier):
            return supplier


def settled_inputs(node: Node, suppliers: Mapping[str, Supplier]) -> dict[str, Committed]:
    """The artifacts of a node's inputs that are there to be taken, by input name."""
    found = {name: suppliers[supplier] for name, supplier in node.inputs.items()}
    return {name: one.committed for name, one in found.items() if isinstance(one, Settled)}


@dataclass(frozen=True, slots=True)
class Judged:
    """A node as a plan sees it."""

    state: State
    decision: Decision


def decide(graph: Graph, selection: Selection, examiner: Examiner) -> dict[str, Judged]:
    """What a run with this selection would do with every node, and why.

    PlanError if a node that is asked for is made of one that the selection leaves as it is and
    that is not fresh. The files of such nodes are hashed: a run takes them as they are or not at
    all.
    """
    roles = assign_roles(graph, selection)
    relied_on = {upstream.name for _, upstream in _outside(graph, roles)}
    judged: dict[str, Judged] = {}
    for node in graph:
        suppliers = {name: supply(judged[name].decision) for name in node.inputs.values()}
        inputs = settled_inputs(node, suppliers)
        state = examiner.examine(node, inputs, hashes=node.name in relied_on)
        judged[node.name] = Judged(state, judge(roles[node.name], state, suppliers))
    _require_fresh_upstream(graph, roles, judged)
    return judged


def in_use(judged: Mapping[str, Judged]) -> tuple[str, ...]:
    """Addresses of the artifacts that a run over these nodes may reuse."""
    states = (one.state for one in judged.values())
    return tuple(sorted({one.committed.address for one in states if isinstance(one, Fresh)}))


def _require_fresh_upstream(
    graph: Graph, roles: Mapping[str, Role], judged: Mapping[str, Judged]
) -> None:
    for name, upstream in _outside(graph, roles):
        state = judged[upstream.name].state
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


def in_words(decision: Decision) -> tuple[str, tuple[str, ...]]:
    """A decision as one verb, and its reasons."""
    match decision:
        case Reuse():
            return "reuse", ()
        case Build(reasons, provided):
            return "build", (*reasons, *map(_proviso, provided))
        case Recheck(inputs, provided):
            why = f"reused if {' and '.join(inputs)} come out as before, built if not"
            return "recheck", (why, *map(_proviso, provided))
        case Refuse(reasons):
            return "refuse", reasons
        case Block(by, reason):
            return "block", (f"made of {by}, which {f'is {reason}' if reason else 'is not there'}",)
        case Leave(reason):
            return "leave", (reason,)


def _proviso(supplier: str) -> str:
    return f"blocked if {supplier}, which is left as it is, is out of date then"

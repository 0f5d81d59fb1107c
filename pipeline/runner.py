"""Realise a plan: one node at a time, reuse what is fresh, build the rest, go on past a failure.

Imports neither torch nor ray nor mlflow: stages bring the first two, and whoever wants to hear of
the run (the terminal, MLflow) is handed in as a listener.
"""

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from configs.errors import IngotError
from configs.parallel import ClusterConfig
from pipeline.building import Site, build, reuse
from pipeline.decide import (
    Block,
    Build,
    Leave,
    Lost,
    Recheck,
    Refuse,
    Reuse,
    Settled,
    Supplier,
    judge,
    settled_inputs,
)
from pipeline.graph import Graph, Node, Role, Selection, assign_roles
from pipeline.listeners import Audience, Listener
from pipeline.provenance import source_digest
from pipeline.records import Blocked, Built, Failed, Reused, Run
from pipeline.states import Examiner, Fresh
from pipeline.store import Committed, Store


@dataclass(frozen=True)
class Setting:
    """Everything a run needs besides what it is to build."""

    store: Store
    examiner: Examiner
    machines: ClusterConfig
    listeners: Sequence[Listener]


@dataclass(frozen=True, slots=True)
class Visited:
    """What became of one node."""

    outcome: Built | Reused | Failed | Blocked | None
    """None only if the selection leaves it as it is."""
    supplier: Supplier
    """What it is now to those that are made of it."""
    interrupted: bool = False

    @property
    def made(self) -> Committed | None:
        """Its artifact, if there is one."""
        return self.supplier.committed if isinstance(self.supplier, Settled) else None


def realise(graph: Graph, selection: Selection, setting: Setting, run: Run) -> Run:
    """Bring every selected node up to date and return `run` with what became of each.

    The record is saved after every node. A node that fails blocks those made of it; the others
    still run. On Ctrl-C the run ends there, marked as interrupted.
    """
    roles = assign_roles(graph, selection)
    # Hours later the files may say what this process, which has loaded them, does not do.
    sources = {node.name: source_digest(node.planned.stage) for node in graph}
    audience = Audience(setting.listeners)
    site = Site(setting.store, setting.machines, audience, run.id, run.recipe, sources)
    suppliers: dict[str, Supplier] = {}
    setting.store.records.save(run)
    for node in graph:
        given = {name: suppliers[name] for name in node.inputs.values()}
        visited = _visit(node, roles[node.name], given, setting.examiner, site)
        suppliers[node.name] = visited.supplier
        if visited.outcome is not None:
            run = run.with_outcome(node.name, visited.outcome)
            run = replace(run, interrupted=visited.interrupted)
            audience.end(node, visited.outcome, visited.made)
            setting.store.records.update(run)
        if visited.interrupted:
            break
    return run


def _visit(
    node: Node, role: Role, suppliers: Mapping[str, Supplier], examiner: Examiner, site: Site
) -> Visited:
    """Judge a node whose suppliers have been visited, and do what is decided."""
    started = time.monotonic()
    try:
        return _treat(node, role, suppliers, examiner, site)
    except KeyboardInterrupt:
        failed = Failed("interrupted", time.monotonic() - started)
        return Visited(failed, Lost("failed"), interrupted=True)
    except Exception as error:
        # Nodes that do not depend on this one must still run, whatever was raised.
        failed = Failed(_explain(error, node, site), time.monotonic() - started)
        return Visited(failed, Lost("failed"))


def _treat(
    node: Node, role: Role, suppliers: Mapping[str, Supplier], examiner: Examiner, site: Site
) -> Visited:
    started = time.monotonic()
    inputs = settled_inputs(node, suppliers)
    state = examiner.examine(node, inputs, hashes=len(inputs) == len(node.inputs))
    match judge(role, state, suppliers):
        case Reuse(committed):
            return Visited(reuse(committed, time.monotonic() - started), Settled(committed))
        case Build():
            replacing = state.committed.generation if isinstance(state, Fresh) else state.generation
            outcome, made = build(node, inputs, site, replacing=replacing)
            return Visited(outcome, Settled(made))
        case Refuse(reasons):
            failed = Failed("; ".join(reasons), time.monotonic() - started)
            return Visited(failed, Lost("failed"))
        case Block(by, reason):
            return Visited(Blocked(by, reason), Lost("blocked"))
        case Leave(supplier=supplier):
            if role is Role.AFTER_FORCE and not isinstance(state, Fresh):
                why = "; ".join(state.reasons)
                site.audience.note(f"{node.name}: left as it is ({why}); a plain run rebuilds it")
            return Visited(None, supplier)
        case Recheck():
            raise AssertionError(f"{node.name} was judged before what it is made of")


def _explain(error: Exception, node: Node, site: Site) -> str:
    """What went wrong, in one line; its traceback goes beside the run's record if it can."""
    path = site.store.records.folder / f"{site.run}.{node.name}.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)))
        kept = f"traceback in {path}"
    except OSError as refused:
        kept = f"no traceback in {path}: {refused.strerror}"
    if isinstance(error, IngotError):
        return str(error)
    return f"{type(error).__name__}: {error} ({kept})"

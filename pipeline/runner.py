"""Realise a plan: reuse what is fresh, build the rest, and go on past a failure.

Nodes that do not need each other are built side by side, as many as the machine bears.

Imports neither torch nor ray nor mlflow: stages bring the first two, and whoever wants to hear of
the run (the terminal, MLflow) is handed in as a listener.
"""

import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from cluster.files import says_disk_is_full
from configs.errors import IngotError
from configs.masking import masked
from configs.parallel import ClusterConfig, nodes_at_once
from configs.profile import Profile
from pipeline.building import Site, build, reuse
from pipeline.crew import Crew, hire
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
from pipeline.records import INTERRUPTED, Blocked, Built, Failed, Reused, Run
from pipeline.states import Examiner, Fresh
from pipeline.store import Committed, Store

STOP_SECONDS = 20.0
"""How long nodes that run side by side may take to stop."""
_FEW_BYTES = 100_000_000
"""A disk with fewer is said to be full."""


@dataclass(frozen=True)
class Setting:
    """Everything a run needs besides what it is to build."""

    store: Store
    examiner: Examiner
    machines: ClusterConfig
    listeners: Sequence[Listener]
    profile: Profile | None = None
    """Which steps of training are to be traced."""


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

    A node's turn comes once all that it is made of has been visited; nodes that do not need each
    other are visited side by side, as many as `setting.machines` says. The record is saved after
    every node, its outcomes in the order of the line. A node that fails blocks those made of it;
    the others still run. On Ctrl-C the run ends there, marked as interrupted.
    """
    # Hours later the files may say what this process, which has loaded them, does not do.
    sources = {node.name: source_digest(node.planned.stage) for node in graph}
    audience = Audience(setting.listeners)
    site = Site(
        setting.store,
        setting.machines,
        audience,
        run.id,
        run.recipe,
        sources,
        setting.profile,
    )
    tour = _Tour(graph, assign_roles(graph, selection), setting.examiner, site, run)
    hands = nodes_at_once(setting.machines.parallel_nodes, os.cpu_count() or 1)
    crew: Crew[Visited] = hire(hands)
    setting.store.records.save(run)
    try:
        while not tour.run.interrupted:
            while crew.free and (node := tour.next_ready()) is not None:
                crew.start(node.name, tour.visit(node))
            if not crew.busy:
                break
            tour.keep(*crew.next())
    except KeyboardInterrupt:
        tour.run = replace(tour.run, interrupted=True)
    tour.stop(crew)
    return tour.run


class _Tour:
    """How far a run has come. Its own thread alone changes it; what a visit needs is handed out."""

    def __init__(
        self,
        graph: Graph,
        roles: Mapping[str, Role],
        examiner: Examiner,
        site: Site,
        run: Run,
    ) -> None:
        self._graph, self._roles, self._examiner, self._site = graph, roles, examiner, site
        self._waiting = list(graph)
        self._suppliers: dict[str, Supplier] = {}
        self.run = run

    def next_ready(self) -> Node | None:
        """The first node of the line that waits for nothing more; it is taken off the list."""
        for node in self._waiting:
            if all(one in self._suppliers for one in node.inputs.values()):
                self._waiting.remove(node)
                return node
        return None

    def visit(self, node: Node) -> Callable[[], Visited]:
        """What is to be done at a node that is ready."""
        suppliers = {name: self._suppliers[name] for name in node.inputs.values()}
        role = self._roles[node.name]
        return partial(_visit, node, role, suppliers, self._examiner, self._site)

    def keep(self, name: str, visited: Visited) -> None:
        """Note what became of a node, tell it, and save the record."""
        self._suppliers[name] = visited.supplier
        if visited.outcome is None:
            return
        run = self.run.with_outcome(name, visited.outcome)
        known = run.outcomes
        in_order = {node.name: known[node.name] for node in self._graph if node.name in known}
        interrupted = run.interrupted or visited.interrupted
        self.run = replace(run, outcomes=in_order, interrupted=interrupted)
        self._site.audience.end(self._graph[name], visited.outcome, visited.made)
        self._site.store.records.update(self.run)

    def stop(self, crew: Crew[Visited]) -> None:
        """End what still runs, which is nothing unless the run was interrupted."""
        if crew.busy:
            names = " and ".join(crew.busy)
            self._site.audience.note(f"stopping {names}; Ctrl-C again does not wait for that")
        for name, visited in crew.stop(STOP_SECONDS).items():
            if visited is None:
                self._site.audience.note(f"{name}: does not stop by itself; ends with this process")
                visited = Visited(Failed(INTERRUPTED, STOP_SECONDS), Lost("failed"), True)
            self.keep(name, visited)


def _visit(
    node: Node, role: Role, suppliers: Mapping[str, Supplier], examiner: Examiner, site: Site
) -> Visited:
    """Judge a node whose suppliers have been visited, and do what is decided."""
    started = time.monotonic()
    try:
        return _treat(node, role, suppliers, examiner, site)
    except KeyboardInterrupt:
        failed = Failed(INTERRUPTED, time.monotonic() - started)
        return Visited(failed, Lost("failed"), interrupted=True)
    except Exception as error:
        # Nodes that do not depend on this one must still run, whatever was raised.
        told, seconds = _explain(error, node, site), time.monotonic() - started
        failed = Failed(told, seconds, output=_output(error))
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
    known = isinstance(error, IngotError)
    why = masked(str(error) if known else f"{type(error).__name__}: {error} ({kept})")
    return f"{why}; {_disk_full(site.store.root)}" if says_disk_is_full(error) else why


def _disk_full(store_root: Path) -> str:
    """Which disk is full, what is left of the build, and what to do."""
    where = "a disk, or of a quota"
    for folder in (store_root, Path(tempfile.gettempdir())):
        with suppress(OSError):
            if (free := shutil.disk_usage(folder).free) < _FEW_BYTES:
                where = f"the disk of {folder} ({free:,} bytes free)"
                break
    return (
        f"no room left on {where}; what is committed stays, and so do the saves of this build: "
        "free some (`ingot clean` deletes what newer artifacts replaced), and the same command "
        "goes on from them"
    )


def _output(error: BaseException) -> str:
    """What workers printed before they failed, which errors bear as notes."""
    notes: list[str] = []
    cause: BaseException | None = error
    while cause is not None:
        notes += getattr(cause, "__notes__", ())
        cause = cause.__cause__
    return "\n".join(notes)

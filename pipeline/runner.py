"""Realise a plan: one node at a time, reuse what is fresh, build the rest, go on past a failure.

Imports neither torch nor ray nor mlflow: stages bring the first two, and whoever wants to hear of
the run (the terminal, MLflow) is handed in as a listener.
"""

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from configs.errors import IngotError, StoreError
from configs.parallel import ClusterConfig
from pipeline.decide import Damaged, Examiner, Fresh
from pipeline.figures import key_figures
from pipeline.graph import Graph, Node, Role, Selection, assign_roles
from pipeline.provenance import machine_facts, source_digest
from pipeline.records import Blocked, Built, Failed, Reused, Run
from pipeline.store import Committed, Slot, Store
from stages.contract import Tracker, Workspace


@runtime_checkable
class Listener(Protocol):
    """Someone who is told what happens to each node."""

    def begin(self, node: Node, inputs: Mapping[str, Committed]) -> Tracker:
        """A node starts to build; its steps go to the tracker."""

    def end(
        self, node: Node, outcome: Built | Reused | Failed | Blocked, made: Committed | None
    ) -> None:
        """What became of a node, and its artifact if there is one."""

    def note(self, message: str) -> None:
        """Something the user should know, in one line."""


@dataclass(frozen=True)
class Setting:
    """Everything a run needs besides what it is to build."""

    store: Store
    examiner: Examiner
    machines: ClusterConfig
    listeners: Sequence[Listener]


@dataclass(frozen=True, slots=True)
class Chorus:
    """A tracker that passes everything on to several."""

    members: Sequence[Tracker]

    def start(self, *, steps: int, unit: str) -> None:
        """Announce how many steps follow."""
        for member in self.members:
            member.start(steps=steps, unit=unit)

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Record one step."""
        for member in self.members:
            member.log(metrics, step=step)

    def note(self, message: str) -> None:
        """Tell the user one thing."""
        for member in self.members:
            member.note(message)


def realise(graph: Graph, selection: Selection, setting: Setting, run: Run) -> Run:
    """Bring every selected node up to date and return `run` with what became of each.

    The record is saved after every node. A node that fails blocks those made of it; the others
    still run. On Ctrl-C the run ends there, marked as interrupted.
    """
    roles = assign_roles(graph, selection)
    made: dict[str, Committed] = {}
    setting.store.records.save(run)
    for node in graph:
        try:
            outcome = _visit(node, roles[node.name], made, setting, run)
        except KeyboardInterrupt:
            run = replace(run, interrupted=True)
            outcome = Failed("interrupted", 0.0)
        if outcome is not None:
            run = run.with_outcome(node.name, outcome)
            for listener in setting.listeners:
                listener.end(node, outcome, made.get(node.name))
            setting.store.records.save(run)
        if run.interrupted:
            break
    return run


def _visit(
    node: Node, role: Role, made: dict[str, Committed], setting: Setting, run: Run
) -> Built | Reused | Failed | Blocked | None:
    """What becomes of one node; none if it is left as it is. Adds its artifact to `made`."""
    started = time.monotonic()
    lacking = [one for one in node.inputs.values() if one not in made]
    if lacking:
        # An input that was left as it is, on request, leaves this node as it is too.
        tried = lacking[0] in run.outcomes and role is not Role.LEAVE
        return Blocked(lacking[0]) if tried else None
    inputs = {name: made[supplier] for name, supplier in node.inputs.items()}
    state = setting.examiner.examine(node, inputs, hashes=True)
    if isinstance(state, Fresh) and role not in (Role.ALWAYS_FROM, Role.ALWAYS_FORCE):
        made[node.name] = state.committed
        if role is Role.LEAVE:
            return None
        return _reused(state.committed, time.monotonic() - started)
    match role:
        case Role.LEAVE:
            return None
        case Role.AFTER_FORCE:
            reasons = "; ".join(state.reasons) if not isinstance(state, Fresh) else ""
            for listener in setting.listeners:
                listener.note(f"{node.name}: left as it is ({reasons}); a plain run rebuilds it")
            return None
    if isinstance(state, Damaged) and role is Role.IF_STALE:
        return Failed("; ".join(state.reasons), time.monotonic() - started)
    # As seen when it was judged: a generation that another run adds meanwhile is reused.
    replacing = state.committed.generation if isinstance(state, Fresh) else state.generation
    return _build(node, replacing, inputs, made, setting, run)


def _build(
    node: Node,
    replacing: int,
    inputs: Mapping[str, Committed],
    made: dict[str, Committed],
    setting: Setting,
    run: Run,
) -> Built | Reused | Failed:
    started = time.monotonic()
    try:
        with setting.store.slot(node, replacing=replacing) as slot:
            if isinstance(slot, Committed):
                made[node.name] = slot
                return _reused(slot, time.monotonic() - started)
            # Waiting for another builder is not part of what building took.
            started = time.monotonic()
            committed = _fill(slot, node, inputs, setting, run)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        # Nodes that do not depend on this one must still run, whatever the stage raised.
        path = setting.store.records.folder / f"{run.id}.{node.name}.txt"
        path.write_text(traceback.format_exc())
        known = isinstance(error, IngotError)
        text = str(error) if known else f"{type(error).__name__}: {error} (traceback in {path})"
        return Failed(text, time.monotonic() - started)
    made[node.name] = committed
    return Built(
        uri=committed.artifact.uri,
        fingerprint=node.fingerprint,
        content=committed.manifest.content,
        seconds=time.monotonic() - started,
        figures=key_figures(committed.artifact),
    )


def _fill(
    slot: Slot, node: Node, inputs: Mapping[str, Committed], setting: Setting, run: Run
) -> Committed:
    """Run the stage in its slot and commit what it made."""
    started = time.monotonic()
    tracker = Chorus([listener.begin(node, inputs) for listener in setting.listeners])
    if slot.resumes:
        tracker.note(f"{node.name}: continues the interrupted build in {slot.path}")
    work = Workspace(
        out=str(slot.path), machines=setting.machines, tracker=tracker, lease=slot.lease
    )
    stage = node.planned.stage
    artifact = stage.run(
        node.planned.config, work, **{name: one.artifact for name, one in inputs.items()}
    )
    if not isinstance(artifact, stage.makes) or artifact.uri != work.out:
        raise StoreError(
            f"stage {stage.name} returned {artifact!r}, not a {stage.makes.__name__} at {work.out}"
        )
    provenance = {
        **machine_facts(setting.machines),
        "run": run.id,
        "recipe": run.recipe,
        "node": node.name,
        "seconds": time.monotonic() - started,
        "source": source_digest(stage),
    }
    return setting.store.commit(slot, node, artifact, inputs, provenance)


def _reused(committed: Committed, seconds: float) -> Reused:
    return Reused(
        uri=committed.artifact.uri,
        fingerprint=committed.manifest.fingerprint,
        content=committed.manifest.content,
        seconds=seconds,
        figures=key_figures(committed.artifact),
        built_by=committed.manifest.provenance.get("run"),
    )

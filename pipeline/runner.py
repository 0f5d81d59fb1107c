"""Realise a plan: one node at a time, reuse what is fresh, build the rest, go on past a failure.

Imports neither torch nor ray nor mlflow: stages bring the first two, and whoever wants to hear of
the run (the terminal, MLflow) is handed in as a listener.
"""

import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from configs.errors import DataError, IngotError, LeaseLost, StoreError
from configs.parallel import ClusterConfig
from pipeline.decide import Damaged, Examiner, Fresh
from pipeline.fingerprint import differences, identify
from pipeline.graph import LEFT, Graph, Node, Role, Selection, assign_roles
from pipeline.loading import load_body
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

    def tag(self, name: str, value: str) -> None:
        """Mark the build."""
        for member in self.members:
            member.tag(name, value)


@dataclass(frozen=True, slots=True)
class _Ledger:
    """What later nodes may be made of, and why they may not be made of others."""

    sources: Mapping[str, str]
    """By node: the digest of its stage's source, as it was when the run began."""
    made: dict[str, Committed] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    """By node that the selection leaves as it is and that cannot be used so: the reason."""


def realise(graph: Graph, selection: Selection, setting: Setting, run: Run) -> Run:
    """Bring every selected node up to date and return `run` with what became of each.

    The record is saved after every node. A node that fails blocks those made of it; the others
    still run. On Ctrl-C the run ends there, marked as interrupted.
    """
    roles = assign_roles(graph, selection)
    # Hours later the files may say what this process, which has loaded them, does not do.
    ledger = _Ledger({node.name: source_digest(node.planned.stage) for node in graph})
    setting.store.records.save(run)
    for node in graph:
        started = time.monotonic()
        outcome: Built | Reused | Failed | Blocked | None
        try:
            outcome = _visit(node, roles[node.name], ledger, setting, run)
        except KeyboardInterrupt:
            run = replace(run, interrupted=True)
            outcome = Failed("interrupted", time.monotonic() - started)
        except Exception as error:
            # Nodes that do not depend on this one must still run, whatever was raised.
            outcome = Failed(_explain(error, node, setting, run), time.monotonic() - started)
        if outcome is not None:
            run = run.with_outcome(node.name, outcome)
            for listener in setting.listeners:
                listener.end(node, outcome, ledger.made.get(node.name))
            setting.store.records.update(run)
        if run.interrupted:
            break
    return run


def _visit(
    node: Node, role: Role, ledger: _Ledger, setting: Setting, run: Run
) -> Built | Reused | Failed | Blocked | None:
    """What becomes of one node; none only if the selection leaves it as it is."""
    started = time.monotonic()
    lacking = next((one for one in node.inputs.values() if one not in ledger.made), None)
    if lacking is not None:
        return _without(node, role, lacking, ledger, run)
    inputs = {name: ledger.made[supplier] for name, supplier in node.inputs.items()}
    state = setting.examiner.examine(node, inputs, hashes=True)
    if isinstance(state, Fresh) and role not in (Role.ALWAYS_FROM, Role.ALWAYS_FORCE):
        ledger.made[node.name] = state.committed
        if role is Role.LEAVE:
            return None
        return _reused(state.committed, time.monotonic() - started)
    if role in LEFT and not isinstance(state, Fresh):
        reasons = "; ".join(state.reasons)
        ledger.left[node.name] = f"{role.value}, and not up to date ({reasons})"
        if role is Role.AFTER_FORCE:
            for listener in setting.listeners:
                listener.note(f"{node.name}: left as it is ({reasons}); a plain run rebuilds it")
        return None
    if isinstance(state, Damaged) and role is Role.IF_STALE:
        return Failed("; ".join(state.reasons), time.monotonic() - started)
    # As seen when it was judged: a generation that another run adds meanwhile is reused.
    replacing = state.committed.generation if isinstance(state, Fresh) else state.generation
    return _build(node, replacing, inputs, ledger, setting, run)


def _without(node: Node, role: Role, lacking: str, ledger: _Ledger, run: Run) -> Blocked | None:
    """What becomes of a node that lacks an input."""
    reason = ledger.left.get(lacking, "")
    if role is Role.LEAVE or (role is Role.AFTER_FORCE and lacking not in run.outcomes):
        why = reason or run.outcomes[lacking].outcome
        ledger.left[node.name] = f"{role.value}, and made of {lacking}, which is {why}"
        return None
    return Blocked(lacking, reason)


def _build(
    node: Node,
    replacing: int,
    inputs: Mapping[str, Committed],
    ledger: _Ledger,
    setting: Setting,
    run: Run,
) -> Built | Reused:
    started = time.monotonic()
    with setting.store.slot(node, inputs, replacing=replacing) as slot:
        if isinstance(slot, Committed):
            ledger.made[node.name] = slot
            return _reused(slot, time.monotonic() - started)
        # Waiting for another builder is not part of what building took.
        started = time.monotonic()
        try:
            committed = _fill(slot, node, ledger.sources[node.name], inputs, setting, run)
        except Exception as error:
            other = _made_by_another(slot, node, setting, error)
            ledger.made[node.name] = other
            return _reused(other, time.monotonic() - started)
    ledger.made[node.name] = committed
    return Built(
        address=committed.address,
        fingerprint=node.fingerprint,
        content=committed.manifest.content,
        seconds=time.monotonic() - started,
        figures=committed.artifact.key_figures(),
        shortfall=committed.artifact.told(),
    )


def _made_by_another(slot: Slot, node: Node, setting: Setting, error: Exception) -> Committed:
    """What another builder committed in place of this one, which stopped with `error`.

    Raises `error` if this builder still holds the lease, or LeaseLost if nothing is there yet.
    """
    try:
        slot.lease.check()
    except LeaseLost as lost:
        committed = setting.store.find(node)
        if committed is None or committed.generation < slot.generation:
            raise lost from error
        for listener in setting.listeners:
            listener.note(f"{node.name}: another builder took over and was quicker; taking its own")
        return committed
    raise error


def _explain(error: Exception, node: Node, setting: Setting, run: Run) -> str:
    """What went wrong, in one line; its traceback goes beside the run's record if it can."""
    path = setting.store.records.folder / f"{run.id}.{node.name}.txt"
    try:
        path.write_text("".join(traceback.format_exception(error)))
        kept = f"traceback in {path}"
    except OSError as refused:
        kept = f"no traceback in {path}: {refused.strerror}"
    if isinstance(error, IngotError):
        return str(error)
    return f"{type(error).__name__}: {error} ({kept})"


def _fill(
    slot: Slot,
    node: Node,
    source: str,
    inputs: Mapping[str, Committed],
    setting: Setting,
    run: Run,
) -> Committed:
    """Run the stage in its slot and commit what it made."""
    started = time.monotonic()
    tracker = Chorus([listener.begin(node, inputs) for listener in setting.listeners])
    if slot.earlier:
        tracker.note(f"{node.name}: continues the interrupted build in {slot.earlier[0]}")
    work = Workspace(
        out=str(slot.files),
        machines=setting.machines,
        tracker=tracker,
        lease=slot.lease,
        hashes=setting.store.hashes,
        earlier=slot.earlier,
    )
    stage = node.planned.stage
    artifact = load_body(stage)(
        node.planned.config, work, **{name: one.artifact for name, one in inputs.items()}
    )
    if not isinstance(artifact, stage.makes) or artifact.uri != work.out:
        raise StoreError(
            f"stage {stage.name} returned {artifact!r}, not a {stage.makes.__name__} at "
            f"{work.out}; have it return one with uri=work.out"
        )
    inputs_now = {name: one.manifest.fingerprint for name, one in inputs.items()}
    now = identify(node.planned, inputs_now, setting.store.hashes)
    changed = differences(node.identity.fields, now.fields, node.planned.config)
    if changed:
        raise DataError(
            f"{node.name}: what it reads changed after it was planned ({'; '.join(changed)}); run "
            "again to build from it as it is now"
        )
    provenance = {
        **machine_facts(setting.machines),
        "run": run.id,
        "recipe": run.recipe,
        "node": node.name,
        "seconds": time.monotonic() - started,
        "source": source,
    }
    return setting.store.commit(slot, node, artifact, inputs, provenance)


def _reused(committed: Committed, seconds: float) -> Reused:
    return Reused(
        address=committed.address,
        fingerprint=committed.manifest.fingerprint,
        content=committed.manifest.content,
        seconds=seconds,
        figures=committed.artifact.key_figures(),
        built_by=committed.manifest.provenance.get("run"),
        shortfall=committed.artifact.told(),
    )

"""Builds one node: its stage in a slot of the store, and what the stage made as an artifact."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from cluster.supply import Supply
from configs.errors import DataError, LeaseLost, StoreError
from configs.parallel import ClusterConfig
from configs.profile import Profile
from pipeline.fingerprint import differences, identify
from pipeline.graph import Node
from pipeline.listeners import Audience
from pipeline.loading import load_body
from pipeline.provenance import machine_facts
from pipeline.records import Built, Reused
from pipeline.slots import Slot
from pipeline.store import Committed, Store
from stages.contract import Workspace

RESUMED = "resumed_from"
"""The tag of a build that goes on from an interrupted one: the folder of that one."""


@dataclass(frozen=True, slots=True)
class Site:
    """Where and for whom the nodes of one run are built."""

    store: Store
    machines: ClusterConfig
    audience: Audience
    run: str
    """Id of the run."""
    recipe: str
    sources: Mapping[str, str]
    """By node: the digest of its stage's source, as it was when the run began."""
    profile: Profile | None = None


def build(
    node: Node, inputs: Mapping[str, Committed], site: Site, *, replacing: int
) -> tuple[Built | Reused, Committed]:
    """Build `node`, or take what another builder has made of it by then.

    `replacing` is the generation that was committed when the node was judged, 0 for none: one that
    another run adds meanwhile is taken. Raises whatever the stage raises.
    """
    started = time.monotonic()
    with site.store.slot(node, inputs, replacing=replacing) as slot:
        if isinstance(slot, Committed):
            return reuse(slot, time.monotonic() - started), slot
        # Waiting for another builder is not part of what building took.
        started = time.monotonic()
        try:
            made = _fill(slot, node, inputs, site)
        except Exception as error:
            other = _made_by_another(slot, node, site, error)
            return reuse(other, time.monotonic() - started), other
    built = Built(
        address=made.address,
        fingerprint=node.fingerprint,
        content=made.manifest.content,
        seconds=time.monotonic() - started,
        figures=made.artifact.key_figures(),
        shortfall=made.artifact.told(),
    )
    return built, made


def reuse(committed: Committed, seconds: float) -> Reused:
    """Say that an artifact was taken as it is, which took so long."""
    return Reused(
        address=committed.address,
        fingerprint=committed.manifest.fingerprint,
        content=committed.manifest.content,
        seconds=seconds,
        figures=committed.artifact.key_figures(),
        built_by=committed.manifest.provenance.get("run"),
        shortfall=committed.artifact.told(),
    )


def _fill(slot: Slot, node: Node, inputs: Mapping[str, Committed], site: Site) -> Committed:
    """Run the stage in its slot and commit what it made."""
    started = time.monotonic()
    tracker = site.audience.begin(node, inputs)
    if slot.earlier:
        where = site.store.mirror.address(Path(slot.earlier[0]))
        tracker.note(f"{node.name}: continues the interrupted build in {where}")
        tracker.tag(RESUMED, str(slot.earlier[0]))
    work = Workspace(
        out=str(slot.files),
        machines=site.machines,
        tracker=tracker,
        lease=slot.lease,
        hashes=site.store.hashes,
        supply=Supply(
            mirror=site.store.mirror,
            sign=slot.draft,
            is_spread=site.machines.address is not None,
            inputs={one.files: one.hashes for one in inputs.values()},
            cache_bytes=site.store.config.cache_bytes,
        ),
        profile=site.profile,
        earlier=slot.earlier,
    )
    for one in inputs.values():
        one.bring()
    stage = node.planned.stage
    artifact = load_body(stage)(
        node.planned.config, work, **{name: one.artifact for name, one in inputs.items()}
    )
    if not isinstance(artifact, stage.makes) or artifact.uri != work.out:
        raise StoreError(
            f"stage {stage.name} returned {artifact!r}, not a {stage.makes.__name__} at "
            f"{work.out}; have it return one with uri=work.out"
        )
    _require_unchanged(node, inputs, site)
    provenance = {
        **machine_facts(site.machines),
        "run": site.run,
        "recipe": site.recipe,
        "node": node.name,
        "seconds": time.monotonic() - started,
        "source": site.sources[node.name],
    }
    return site.store.commit(slot, node, artifact, inputs, provenance)


def _require_unchanged(node: Node, inputs: Mapping[str, Committed], site: Site) -> None:
    """DataError if what the stage reads from outside is no longer what was planned."""
    inputs_now = {name: one.manifest.fingerprint for name, one in inputs.items()}
    now = identify(node.planned, inputs_now, site.store.hashes)
    changed = differences(node.identity.fields, now.fields, node.planned.config)
    if changed:
        raise DataError(
            f"{node.name}: what it reads changed after it was planned ({'; '.join(changed)}); run "
            "again to build from it as it is now"
        )


def _made_by_another(slot: Slot, node: Node, site: Site, error: Exception) -> Committed:
    """What another builder committed in place of this one, which stopped with `error`.

    Raises `error` if this builder still holds the lease, or LeaseLost if nothing is there yet.
    """
    try:
        slot.lease.check(anew=True)
    except LeaseLost as lost:
        committed = site.store.find(node)
        if committed is None or committed.generation < slot.generation:
            raise lost from error
        site.audience.note(
            f"{node.name}: another builder took over and was quicker; taking its own"
        )
        return committed
    raise error

"""What there is of a node in the store: a fresh artifact, a stale or a damaged one, or none."""

from collections.abc import Mapping
from dataclasses import dataclass

from configs.errors import ArtifactError
from pipeline.fingerprint import differences
from pipeline.graph import Node
from pipeline.store import Committed, Store
from stages.manifest import Manifest


@dataclass(frozen=True, slots=True)
class Fresh:
    """Committed, undamaged, and made of what its inputs are now, as far as these are known."""

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


State = Fresh | Stale | Missing | Damaged


class Examiner:
    """Compares nodes with the store, remembering which artifact each node made last."""

    def __init__(self, store: Store, recipe: str) -> None:
        """Examine for the recipe of this name, whose runs tell what a stale node was before."""
        self._store = store
        self._recipe = recipe
        self._latest = store.records.latest_artifacts()

    def last(self, node: Node) -> Manifest | None:
        """The manifest of what the node made or took last in this recipe; none if there is none."""
        path = self._latest.get((self._recipe, node.name))
        try:
            return None if path is None else self._store.manifest(path)
        except ArtifactError:
            return None

    def examine(self, node: Node, inputs: Mapping[str, Committed], *, hashes: bool) -> State:
        """The state of one node, given those of its inputs that are settled, by input name.

        `hashes` also hashes its files. Damage comes first: it is told whatever its inputs are.
        """
        try:
            committed = self._store.find(node)
        except ArtifactError as error:
            return Damaged((str(error),), self._store.newest(node))
        if committed is None:
            return self._what_changed(node)
        try:
            committed.check(hashes=hashes)
        except ArtifactError as error:
            return Damaged((str(error),), committed.generation)
        recorded = committed.manifest.inputs
        rebuilt = tuple(
            f"input {name} rebuilt"
            for name, one in inputs.items()
            if recorded[name].content != one.manifest.content
        )
        return Stale(rebuilt, committed.generation) if rebuilt else Fresh(committed)

    def _what_changed(self, node: Node) -> Stale | Missing:
        extra = ("continues an interrupted build",) if self._store.is_begun(node) else ()
        path = self._latest.get((self._recipe, node.name))
        if path is None:
            return Missing(("never built", *extra))
        try:
            old = self._store.manifest(path)
        except ArtifactError:
            return Missing((f"its last artifact, {path}, is unreadable", *extra))
        changed = differences(old.identity, node.identity.fields, node.planned.config)
        return Stale((*(changed or (f"{path.parent} was emptied",)), *extra))

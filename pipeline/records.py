"""What happened: one JSON file a run, `<store>/runs/<id>.json`, rewritten after every node."""

import os
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError

from cluster import files, place
from cluster.mirror import Mirror
from configs.errors import StoreError
from configs.explain import first_fault
from pipeline.lease import has_ended


@dataclass(frozen=True, slots=True)
class Built:
    """The node was built in this run."""

    address: str
    """Of the artifact's generation, relative to the store."""
    fingerprint: str
    content: str
    seconds: float
    figures: Mapping[str, float]
    """Key figures, the most telling first."""
    shortfall: str | None = None
    """Why a report is not of what was asked for; none if it is, or if this is no report."""
    tracking_id: str | None = None
    """The MLflow run that shows it, if the server answered."""
    outcome: Literal["built"] = "built"


@dataclass(frozen=True, slots=True)
class Reused:
    """A committed artifact was taken as it is."""

    address: str
    """As that of `Built`."""
    fingerprint: str
    content: str
    seconds: float
    figures: Mapping[str, float]
    built_by: str | None
    """Id of the run that built it."""
    shortfall: str | None = None
    """As that of `Built`: what falls short does so however often it is reused."""
    tracking_id: str | None = None
    outcome: Literal["reused"] = "reused"


INTERRUPTED = "interrupted"
"""The error of a node that the user stopped."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The node was tried and did not succeed; what it wrote is kept for the next attempt."""

    error: str
    seconds: float
    tracking_id: str | None = None
    output: str = ""
    """The end of what the worker that failed had printed; empty if no worker did."""
    outcome: Literal["failed"] = "failed"

    @property
    def was_stopped(self) -> bool:
        """Whether the user stopped it, and nothing was wrong."""
        return self.error == INTERRUPTED


@dataclass(frozen=True, slots=True)
class Blocked:
    """The node was not tried, since one that it is made of is not there."""

    by: str
    reason: str = ""
    """Why `by` is not there, if the selection left it as it is; empty if it did not succeed."""
    outcome: Literal["blocked"] = "blocked"


Outcome = Annotated[Built | Reused | Failed | Blocked, Field(discriminator="outcome")]


@dataclass(frozen=True, slots=True)
class Invocation:
    """How the user named the recipe, so that a later command can mean the same one."""

    recipe: str
    overlays: tuple[str, ...] = ()
    sets: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    """The line is planned for each of these, in place of the recipe's own seed; empty for that."""


@dataclass(frozen=True, slots=True)
class AcrossSeeds:
    """One figure of one node of the line, for several seeds."""

    node: str
    """Its name in the line of one seed."""
    figure: str
    values: Mapping[int, float]
    """By seed; a seed whose node was not built is not there."""
    mean: float
    """Of these values and no others."""
    spread: float | None
    """Sample standard deviation (n - 1) of these values; none of a single one."""


@dataclass(frozen=True, slots=True)
class Run:
    """One `ingot run`."""

    id: str
    recipe: str
    """The recipe's own name; the latest artifact of a node is the latest within one recipe."""
    invocation: Invocation
    provenance: Mapping[str, Any]
    started: float
    """Seconds since the epoch."""
    store_root: str
    """Where the store was then; addresses do not depend on it, but paths of recipes may."""
    process: Mapping[str, Any]
    """The process that makes the run, by which others see whether it goes on."""
    in_use: tuple[str, ...] = ()
    """Addresses of the artifacts that the run began with and may reuse, until it is finished."""
    finished: bool = False
    seconds: float = 0.0
    tracking_id: str | None = None
    interrupted: bool = False
    outcomes: Mapping[str, Outcome] = field(default_factory=dict)
    across_seeds: tuple[AcrossSeeds, ...] = ()
    """What nodes came to over several seeds, in the order of the line; empty for one seed."""

    def with_outcome(self, node: str, outcome: "Built | Reused | Failed | Blocked") -> "Run":
        """This run, with what became of one more node."""
        return replace(
            self, outcomes={**self.outcomes, node: outcome}, seconds=time.time() - self.started
        )

    @property
    def live(self) -> bool:
        """Whether the run may be going on; on another machine, as long as it has not finished."""
        return not self.finished and not has_ended(self.process)

    def with_tracking(self, run: str | None, nodes: Mapping[str, str]) -> "Run":
        """This run, with the MLflow runs that show it and its nodes."""
        outcomes = {
            name: one
            if isinstance(one, Blocked)
            else replace(one, tracking_id=nodes.get(name, one.tracking_id))
            for name, one in self.outcomes.items()
        }
        return replace(self, tracking_id=run, outcomes=outcomes)

    @property
    def ending(self) -> tuple[str, str]:
        """What became of a run that has ended, in a word, and at which node; empty if at none.

        `succeeded`, `stopped`, `failed`, and `fell short` if nothing worse happened.
        """
        if self.interrupted:
            return "stopped", ""
        for kind in (Failed, Blocked):
            for name, one in self.outcomes.items():
                if isinstance(one, kind):
                    return "failed", name
        for name, one in self.outcomes.items():
            if isinstance(one, Built | Reused) and one.shortfall is not None:
                return "fell short", name
        return ("succeeded" if self.outcomes else "failed"), ""

    @property
    def succeeded(self) -> bool:
        """Whether every node that was asked for is there, and shows what it was to show."""
        return self.ending[0] == "succeeded"


_RUN = TypeAdapter(Run)


def as_json(run: Run) -> dict[str, Any]:
    """A run's record as JSON values, as its file has it."""
    record: dict[str, Any] = _RUN.dump_python(run, mode="json")
    return record | {"succeeded": run.succeeded}


def new_run_id() -> str:
    """An id that sorts by time and that no other run has."""
    moment = time.time_ns()
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(moment // 10**9))
    return f"{stamp}-{moment // 1000 % 10**6:06}-{secrets.token_hex(2)}"


class Records:
    """The runs of one store."""

    def __init__(self, mirror: Mirror, *, say: Callable[[str], None]) -> None:
        """Records of a store, which need not exist; `say` is told of those left out."""
        self.mirror = mirror
        self.root = mirror.root
        self.folder = mirror.root / "runs"
        self._is_whole = not mirror.is_apart
        self._say = say
        self._told: set[str] = set()

    def save(self, run: Run) -> None:
        """Write or replace the record of `run`, whole or not at all; StoreError if it cannot."""
        path = self.folder / f"{run.id}.json"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            files.replace(path, _RUN.dump_json(run, indent=1).decode())
            self.mirror.push(path)
        except StoreError:
            raise
        except OSError as error:
            raise StoreError(
                f"{path}: the record of this run cannot be written ({error.strerror}); free some "
                "disk, or make the folder writable"
            ) from None

    def update(self, run: Run) -> None:
        """Save, or tell once that this run's record stays behind: the run itself goes on."""
        try:
            self.save(run)
        except StoreError as error:
            self._tell(run.id, f"warning: {error}")

    def load(self, run_id: str) -> Run:
        """The record of one run; StoreError if it cannot be read."""
        path = self.folder / f"{run_id}.json"
        try:
            return _RUN.validate_json(path.read_bytes())
        except OSError as error:
            why = error.strerror or type(error).__name__
        except ValidationError as error:
            why = first_fault(error)
        raise StoreError(f"{path}: not a readable run record ({why}); delete it or move it away")

    def newest_first(self) -> Iterator[Run]:
        """All runs, the latest first; a record that cannot be read is left out and told once."""
        self._complete()
        for name in sorted((path.stem for path in self.folder.glob("*.json")), reverse=True):
            try:
                run = self.load(name)
            except StoreError as error:
                self._tell(name, f"warning: {error}; left out until then")
                continue
            yield run

    def look_again(self) -> None:
        """See next what other machines have written until then."""
        self._is_whole = not self.mirror.is_apart

    def _complete(self) -> None:
        """Fetch the records that other machines wrote, or wrote more of, since ours."""
        if self._is_whole:
            return
        found = place.sizes(self.mirror.address(self.folder))
        names = [name for name in found if name.endswith(".json")]
        for name in names:
            path = self.folder / name
            # Of a run that goes on there may be news of the same size.
            if path.is_file() and b'"finished": true' not in path.read_bytes():
                path.unlink()
        self.mirror.pull_folder(self.folder, names)
        self._is_whole = True

    def _tell(self, run_id: str, warning: str) -> None:
        if run_id not in self._told:
            self._told.add(run_id)
            self._say(warning)

    def latest_artifacts(self) -> dict[tuple[str, str], Path]:
        """Generation that each (recipe, node) made or took last and that is there."""
        latest: dict[tuple[str, str], Path] = {}
        for run in self.newest_first():
            for node, outcome in run.outcomes.items():
                known = (run.recipe, node) in latest
                if known or not isinstance(outcome, Built | Reused):
                    continue
                path = self.root / outcome.address
                if self._is_there(path):
                    latest[run.recipe, node] = path
        return latest

    def _is_there(self, generation: Path) -> bool:
        if self.mirror.is_apart:
            return place.exists(self.mirror.address(generation))
        # Unlike its pathlib twin, false for a folder that nobody may enter.
        return os.path.isdir(generation)

    def invocation(self, run: Run) -> Invocation:
        """How the user named the recipe of `run`, as files lie now.

        If the store was moved or copied with the files beside it, theirs are the new places.
        """

        def place(name: str) -> str:
            moved = Path(os.path.normpath(self.root / os.path.relpath(name, run.store_root)))
            return str(moved) if name.endswith(".toml") and moved.is_file() else name

        asked = run.invocation
        if Path(run.store_root) == self.root:
            return asked
        return replace(
            asked, recipe=place(asked.recipe), overlays=tuple(map(place, asked.overlays))
        )

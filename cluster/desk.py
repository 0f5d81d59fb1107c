"""Where the ranks of a training report to: the builder's folder, on the driver's machine.

The step log, the mark that completes a save and the word of a failure are small, and the driver
reads them: so they are written on its disk. A rank that does not see that disk tells an actor
there, and goes on once it is written.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.save_state import SaveState
from cluster.saves import Saves
from cluster.workers import what_happened
from configs import errors
from configs.errors import IngotError, MachineError, TrainingError

_FAILURE = "failure.json"
_INTERRUPTED = "interrupted.txt"


@runtime_checkable
class StepLog(Protocol):
    """Where rank 0 records each step."""

    def append(self, metrics: dict[str, Any], *, step: int) -> None:
        """Record one step; number 0 is what was measured before the first."""


class Desk:
    """The folder of a builder that trains, for a process that sees it."""

    def __init__(self, saves: Saves, open_log: Callable[[int], StepLog]) -> None:
        """`open_log` as of `FitJob`."""
        self._saves, self._open_log = saves, open_log
        self._log: StepLog | None = None

    def begin(self) -> None:
        """Make the folder of saves, and forget the failure of an earlier try."""
        self._saves.root.mkdir(parents=True, exist_ok=True)
        for name in (_FAILURE, _INTERRUPTED):
            self._path(name).unlink(missing_ok=True)

    def choose(self) -> tuple[Path, int] | None:
        """The save that the ranks continue from, which all of them can read then."""
        return self._saves.choose()

    def interrupt(self, reason: str) -> None:
        """Keep why the ranks are started anew, for the first record that they write then."""
        self._path(_INTERRUPTED).write_text(reason)

    def open_log(self, step: int) -> str | None:
        """Open the step log for a training that continues after this step; why it does so, if
        ranks of this build failed before."""
        self._log = self._open_log(step)
        path = self._path(_INTERRUPTED)
        if not path.is_file():
            return None
        reason = path.read_text()
        path.unlink()
        return reason

    def append(self, metrics: dict[str, Any], step: int) -> None:
        """Write the line of a step."""
        assert self._log is not None
        self._log.append(metrics, step=step)

    def complete(self, state: SaveState) -> None:
        """Mark a save, all shards of which are written, and delete older ones."""
        self._saves.complete(state)

    def fail(self, error: str, message: str) -> None:
        """Keep what a rank raised, for the driver."""
        self._path(_FAILURE).write_text(json.dumps({"error": error, "message": message}))

    def has_failed(self) -> bool:
        """Whether an earlier attempt failed for a reason that trying again will not mend."""
        return self._path(_FAILURE).is_file()

    def raise_failure(self) -> None:
        """Raise what a rank raised, if any did, now that none is started anew any more."""
        self._path(_INTERRUPTED).unlink(missing_ok=True)
        if not self.has_failed():
            return
        record = json.loads(self._path(_FAILURE).read_text())
        self._path(_FAILURE).unlink()
        kind = getattr(errors, record["error"], TrainingError)
        raise kind(record["message"])

    def _path(self, name: str) -> Path:
        """Beside what a build can be continued from, of which this is none."""
        return self._saves.supply.builder / name


class FarDesk:
    """The same for a process on another machine: each call returns once it is done there."""

    def __init__(self, actor: Any, timeout_seconds: float) -> None:
        """`actor` is that of `open_desk`."""
        self._actor, self._timeout = actor, timeout_seconds

    def choose(self) -> tuple[Path, int] | None:
        found: tuple[Path, int] | None = self._tell("choose")
        return found

    def open_log(self, step: int) -> str | None:
        reason: str | None = self._tell("open_log", step)
        return reason

    def append(self, metrics: dict[str, Any], step: int) -> None:
        self._tell("append", metrics, step)

    def complete(self, state: SaveState) -> None:
        self._tell("complete", state)

    def fail(self, error: str, message: str) -> None:
        self._tell("fail", error, message)

    def has_failed(self) -> bool:
        return bool(self._tell("has_failed"))

    def _tell(self, verb: str, *arguments: Any) -> Any:
        try:
            return ray.get(getattr(self._actor, verb).remote(*arguments), timeout=self._timeout)
        except RayError as error:
            if isinstance(cause := getattr(error, "cause", None), IngotError):
                raise cause from None
            raise MachineError(
                f"the driver's machine did not take a report ({verb}: {what_happened(error)}); "
                "see that the driver runs, and run again to continue from the newest save"
            ) from error


def open_desk(saves: Saves, open_log: Callable[[int], StepLog]) -> Any:
    """A desk in an actor on this machine, for ranks elsewhere; it ends with the driver."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    remote: Any = ray.remote(Desk).options(num_cpus=0, scheduling_strategy=here)
    return remote.remote(saves, open_log)

"""One node's run in MLflow: its tracker, filled in the background."""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol

from mlflow.entities import Metric
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.tracking import MlflowClient
from mlflow.utils.mlflow_tags import MLFLOW_RUN_NOTE

from pipeline import described
from pipeline.background import Background
from pipeline.landing import OUTCOME
from pipeline.plain import clean, metric_name, step_metrics

METRICS_A_BATCH = 1000
_TAG_CHARS = 5000


class Child:
    """The tracker of one node: a child run."""

    def __init__(
        self, node: str, worker: Background, create: Callable[[int], tuple[MlflowClient, str]]
    ) -> None:
        """A child of a node that `create(begun)` opens when the server can be reached.

        `begun` is now, in milliseconds since the epoch: that may be long before.
        """
        self.node = node
        self._worker, self._create, self._begun = worker, create, now_ms()
        self._client: MlflowClient | None = None
        self.run_id: str | None = None
        self.tags: dict[str, str] = {}
        """What the build said of its making."""
        self._pending: list[Metric] = []
        self._seen: set[int] = set()
        self._monitors: list[_Monitor] | None = None
        self._samples = 0

    def open(self) -> None:
        """Have the run created, and its machine watched from now on."""
        self._worker.submit(self.send)
        self._worker.watch(self)

    def start(self, *, steps: int, unit: str) -> None:
        """The number of steps is the terminal's business."""

    def log(self, metrics: Mapping[str, Any], *, step: int) -> None:
        """Record the scalars of one step; a step that was logged before is not logged again."""
        if step in self._seen:
            return
        self._seen.add(step)
        moment = now_ms()
        self._pending += [
            Metric(name, value, moment, step) for name, value in step_metrics(metrics).items()
        ]

    def note(self, message: str) -> None:
        """Notes are for the user."""

    def tag(self, name: str, value: str) -> None:
        """Mark the run."""
        self.tags[name] = value
        self._set_tag(metric_name(f"ingot.{name}"), value)

    def close(self, outcome: str, status: str) -> None:
        """Send what is left and end the run."""
        self._worker.unwatch(self)
        self._worker.submit(self.sample)
        self._set_tag(OUTCOME, outcome)
        moment = now_ms()
        self._worker.submit(lambda: self._end(status, moment), owed=True)

    def fail(self, error: str, status: str) -> None:
        """Keep the reason, and show it, then end the run."""
        self._set_tag("ingot.error", error)
        self._set_tag(MLFLOW_RUN_NOTE, described.failed(error, status == "KILLED", self.node))
        self.close("stopped" if status == "KILLED" else "failed", status)

    def _set_tag(self, key: str, value: str) -> None:
        text = clean(value)[:_TAG_CHARS]
        self._worker.submit(lambda: self._open().set_tag(self.id(), key, text), owed=True)

    # What follows runs on the background thread.

    def id(self) -> str:
        """The run's id, which is created if it must be."""
        self._open()
        assert self.run_id is not None
        return self.run_id

    def _open(self) -> MlflowClient:
        if self._client is None:
            self._client, self.run_id = self._create(self._begun)
        return self._client

    def sample(self) -> None:
        """Look at the machine."""
        if self._monitors is None:
            self._monitors = list(_monitors())
        moment = now_ms()
        for monitor in self._monitors:
            monitor.collect_metrics()
            for name, value in monitor.aggregate_metrics().items():
                self._pending.append(Metric(f"system/{name}", value, moment, self._samples))
            monitor.clear_metrics()
        self._samples += 1

    def send(self) -> None:
        """Send what has come; what cannot be sent stays for the next time."""
        client, run_id = self._open(), self.id()
        while batch := self._pending[:METRICS_A_BATCH]:
            client.log_batch(run_id, metrics=batch)
            del self._pending[: len(batch)]

    def _end(self, status: str, moment: int) -> None:
        self.send()
        self._open().set_terminated(self.id(), status, end_time=moment)


class _Monitor(Protocol):
    """What MLflow's monitors do, with the types that they leave out."""

    def collect_metrics(self) -> None:
        """Read the counters."""

    def aggregate_metrics(self) -> dict[str, float]:
        """What was read, by name."""

    def clear_metrics(self) -> None:
        """Forget it."""


def _monitors() -> Iterator[_Monitor]:
    """What can be measured here: machines differ in the counters that they let one read."""
    for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
        try:
            monitor: _Monitor = kind()
            monitor.collect_metrics()
        except Exception:  # whatever a counter's library makes of a machine without it
            continue
        yield monitor


def now_ms() -> int:
    """The time as MLflow has it."""
    return time.time_ns() // 1_000_000

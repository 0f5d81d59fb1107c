"""A trace of some steps of training on one rank, for a trace viewer (chrome://tracing, Perfetto).

torch.profiler records what the rank's threads call and, on a device, the kernels that it runs. The
other ranks and the other steps run as ever, without a profiler.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.profiler import profile, record_function, supported_activities

from cluster.output import TRACE, Output
from configs.profile import Profile


def trace_path(output: Output, asked: Profile) -> Path:
    """Where a trace lies: beside what the rank prints."""
    return output.path(asked.rank).with_suffix(f".steps-{asked.steps}{TRACE}")


def traced(output: Output, asked: Profile) -> str:
    """Where to find a trace, for people."""
    return (
        f"a trace of steps {asked.steps} of {output.role} {asked.rank} is in "
        f"{trace_path(output, asked)}; https://ui.perfetto.dev shows it"
    )


def trace_told(output: Output, asked: Profile | None, step: int, steps: int) -> list[str]:
    """The same after the last step that is traced, of a training of so many; nothing otherwise."""
    there = None if asked is None else asked.within(steps)
    return [traced(output, there)] if there is not None and there.last == step else []


def untraced(output: Output, asked: Profile | None, steps: int) -> str | None:
    """Why a training of so many steps, now done, left no trace; none if it did."""
    if asked is None:
        return None
    if (there := asked.within(steps)) is None:
        return f"nothing was profiled: the training has {steps} steps, and --profile begins later"
    if trace_path(output, there).is_file():
        return None
    return (
        f"no trace is in {trace_path(output, there)}: an earlier run did these steps, or the "
        f"machine of {output.role} {there.rank} keeps it, or it could not be written; see "
        f"{output.path(there.rank)}"
    )


class Tracer:
    """The traces of one rank."""

    def __init__(self, asked: Profile | None, output: Output, *, rank: int, steps: int) -> None:
        """Of a training of so many steps; of nothing where another rank is asked for, or none."""
        self._asked = asked.within(steps) if asked is not None and asked.rank == rank else None
        self._output, self._rank = output, rank
        self._running: profile | None = None

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Trace what is done within, if it is a step to be traced; written after the last."""
        self.begin(step)
        try:
            yield
        except BaseException:
            if self._running is not None:
                self._running.stop()
                self._running = None
            raise
        self.end(step)

    def begin(self, step: int) -> None:
        """A step begins, to be ended by the same thread."""
        if self._asked is None or not self._asked.first <= step <= self._asked.last:
            return
        if self._running is None:
            self._running = profile(activities=supported_activities(), record_shapes=True)
            self._running.start()
        self._mark = record_function(f"step {step}")
        self._mark.__enter__()

    def end(self, step: int) -> None:
        """It is done; the trace is written if it was the last."""
        if self._running is None or self._asked is None:
            return
        self._mark.__exit__(None, None, None)
        if step == self._asked.last:
            self._write(self._asked)

    def _write(self, asked: Profile) -> None:
        """A disk that takes no more is told of in the rank's file: training goes on without."""
        assert self._running is not None
        if torch.accelerator.is_available():
            # What was launched in these steps is to be among what was recorded.
            torch.accelerator.synchronize()
        self._running.stop()
        path = trace_path(self._output, asked)
        try:
            path.parent.mkdir(exist_ok=True)
            self._running.export_chrome_trace(str(path))
        except (OSError, RuntimeError) as error:
            self._output.add(self._rank, f"no trace of steps {asked.steps}: {error}")
        self._running = None

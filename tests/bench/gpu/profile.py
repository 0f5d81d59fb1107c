"""What the device did in a step: its launches, how long it was at work, and at what."""

from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.profiler import ProfilerActivity, profile

from tests.bench.gpu.setting import Setting


@dataclass(frozen=True, slots=True)
class Work:
    """Of one step."""

    launches: int
    """Kernels, copies and fills."""
    busy_seconds: float
    """In which at least one of them ran."""
    by_name: dict[str, float]
    """Seconds of each kernel, the longest first."""


def work_of(setting: Setting, run: Callable[[], object]) -> Work:
    """What one call gives the device to do; nothing where it is a CPU."""
    activities = [ProfilerActivity.CPU]
    if setting.on_cuda:
        # The host's own side is left out: to record it makes the step slower.
        activities = [ProfilerActivity.CUDA]
    setting.wait()
    with profile(activities=activities) as told:
        run()
        setting.wait()
    return summary(told.events() or [])


def summary(events: Iterable[Any]) -> Work:
    """Of a profiler's events, those of the device that are no annotations of spans."""
    done = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation
    ]
    by_name: dict[str, float] = defaultdict(float)
    for event in done:
        by_name[event.name] += event.time_range.elapsed_us() / 1e6
    spans = sorted((event.time_range.start, event.time_range.end) for event in done)
    busy, reached = 0.0, float("-inf")
    for begin, end in spans:
        busy += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    longest = sorted(by_name.items(), key=lambda item: -item[1])
    return Work(len(done), busy / 1e6, dict(longest))

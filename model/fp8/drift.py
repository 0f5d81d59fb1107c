"""Alarms when FP8 fits a model's tensors worse than it did at first, from a recorder's tallies.

Some things are always wrong: values clipped, tiles so small that they count as zero. Others are
judged by what was usual in the first tallies of a run: how many values become zero, and how large
the scales are.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from model.fp8.recorder import Tally

BASELINE_SAMPLES = 5
"""Tallies that say what is usual; until there are so many, only what is always wrong is told."""
FLUSHED_RISE = 0.05
"""A share of values that become zero may double, and rise by this, before it is told."""
SCALE_DOUBLINGS = 16
"""Powers of two by which the largest scale may move. The smallest of thousands of tiles moves by
more from step to step, and does no harm until it nears NEAR_ZERO."""
NEAR_ZERO = -110.0
"""log2 of a scale from which 16 doublings lead to 2^-126, under which tiles count as zero."""


@dataclass(slots=True)
class Drift:
    """What is usual for each role. It is learnt anew by each process."""

    _usual: dict[str, list[Tally]] = field(default_factory=dict)

    def figures(self, tallies: Mapping[str, Tally]) -> dict[str, Any]:
        """The tallies as metrics of a step, shares and log2 of scales; `notes` has the alarms."""
        figures: dict[str, Any] = {}
        for role, seen in tallies.items():
            figures[f"fp8_clipped/{role}"] = seen.clipped / max(seen.nonzero, 1)
            figures[f"fp8_flushed/{role}"] = seen.flushed_share
            if seen.low <= seen.high:
                figures[f"fp8_scale_low/{role}"] = seen.low
                figures[f"fp8_scale_high/{role}"] = seen.high
        if not tallies:
            # Nothing was FP8: no alarm would say that all is well with it.
            return figures
        alarms = self.alarms(tallies)
        figures["fp8_alarms"] = len(alarms)
        if alarms:
            figures["notes"] = [f"warning: FP8: {alarm}" for alarm in alarms]
        return figures

    def alarms(self, tallies: Mapping[str, Tally]) -> list[str]:
        """One line for each role and fault. The first tallies also become what is usual."""
        found = []
        for role, now in sorted(tallies.items()):
            if now.nonzero == 0:
                continue
            found += [f"{role}: {fault}" for fault in _always_wrong(now)]
            if now.low > now.high:
                # Nothing but tiles that count as zero: there is no scale to compare.
                continue
            usual = self._usual.setdefault(role, [])
            if len(usual) < BASELINE_SAMPLES:
                usual.append(now)
            else:
                found += [f"{role}: {fault}" for fault in _moved(now, usual)]
        return found


def _always_wrong(now: Tally) -> list[str]:
    faults = []
    if now.clipped:
        faults.append(f"{now.clipped / now.nonzero:.2%} of its values are beyond the largest")
    if now.lost:
        faults.append(f"{now.lost / now.nonzero:.2%} of its values lie in tiles too small for FP8")
    if now.low <= NEAR_ZERO:
        faults.append(f"its smallest scale is 2^{now.low:.0f}; under 2^-126 tiles count as zero")
    return faults


def _moved(now: Tally, usual: list[Tally]) -> list[str]:
    faults = []
    was, share = median(one.flushed_share for one in usual), now.flushed_share
    if share > 2 * was + FLUSHED_RISE:
        faults.append(f"{share:.1%} of its values become zero, against {was:.1%} at first")
    before = median(one.high for one in usual)
    if abs(now.high - before) > SCALE_DOUBLINGS:
        faults.append(f"its largest scale is 2^{now.high:.0f}, against 2^{before:.0f} at first")
    return faults

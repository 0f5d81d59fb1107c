"""What `ingot doctor` says of devices: which is computed on, in which types, and what is amiss.

Loads no torch: what it finds is asked of another process (`pipeline.probe`).
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cluster.autoload import AUTOLOAD, why_torch_fails
from pipeline.machine import Finding

_SECONDS = 120.0
_COMPILER = "install a C compiler, as gcc: quantising is then several times as fast"


def devices() -> Iterator[Finding]:
    """Look at torch and at each kind of device."""
    report, told = _probe({})
    if broken := why_torch_fails(told):
        yield _split("torch", broken, needed=True)
        report, told = _probe({AUTOLOAD: "0"})
    if report is None:
        lines = told.strip().splitlines() or ["no word"]
        yield Finding("torch", lines[-1], "install torch again, as the README says", needed=True)
        return
    yield from tell(report)


def tell(report: Mapping[str, Any]) -> Iterator[Finding]:
    """What is said of a report of `pipeline.probe`."""
    yield Finding("torch", report["torch"])
    auto = report["auto"]
    if "fault" in auto:
        yield _split("cluster.device", auto["fault"])
    else:
        yield Finding("cluster.device", f"'auto' computes on {auto['device']} here")
    for one in report["devices"]:
        yield from _tell_device(one)


def _tell_device(one: Mapping[str, Any]) -> Iterator[Finding]:
    what, fault = f"device {one['name']}", one["fault"]
    if fault is not None and not one["count"] and not one["is_there"]:
        # Who has no such device need not do anything about it.
        yield Finding(what, f"none; {fault.partition('; ')[0]}")
        return
    if fault is not None:
        yield _split(what, fault)
    else:
        many = f"{one['count']} x " if one["count"] > 1 else ""
        yield Finding(what, f"{many}{one['card']}, computes in {one['compute']}")
    if "fp8" in one:
        slow = one["fp8"] == "cpu" and one["fp8_reason"].startswith("eager")
        seen = f"backend {one['fp8'] or 'none'}, {one['fp8_reason']}"
        yield Finding(f"FP8 on {one['name']}", seen, _COMPILER if slow else None)


def _split(what: str, sentence: str, *, needed: bool = False) -> Finding:
    """A sentence that ends in its remedy."""
    seen, _, fix = sentence.partition("; ")
    return Finding(what, seen, fix or "see what it says", needed=needed)


def _probe(environ: Mapping[str, str]) -> tuple[dict[str, Any] | None, str]:
    """(the report, or none; what the process said on stderr)."""
    root = str(Path(__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        done = subprocess.run(
            # Not from the folder that one stands in, where there may be files of other people's.
            [sys.executable, "-P", "-m", "pipeline.probe"],
            env={**os.environ, "PYTHONPATH": path, **environ},
            capture_output=True,
            text=True,
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return None, f"torch did not load within {_SECONDS:g} s"
    if done.returncode != 0:
        return None, done.stderr
    # Libraries may have something to say while they load.
    try:
        report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return None, f"no report came, but {done.stdout[-200:]!r}"
    return report, done.stderr

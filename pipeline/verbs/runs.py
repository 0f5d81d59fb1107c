"""`ingot runs`: what was run here, the newest first."""

import argparse
import json
import time
from collections import Counter

from configs.errors import ConfigError
from pipeline.figures import shortened, show_figures, show_seconds
from pipeline.records import Built, Failed, Reused, Run
from pipeline.verbs.asked import find_store


def runs(args: argparse.Namespace) -> int:
    """Print one line a run: when, how long, what became of it, and its last key figure or error."""
    if args.limit < 1:
        raise ConfigError(f"--limit {args.limit}: must be 1 or more; leave it out for 20")
    store, _ = find_store(args, print)
    records = store.records
    found = [run for _, run in zip(range(args.limit), records.newest_first(), strict=False)]
    if args.json:
        print(json.dumps([_record(run) for run in found], indent=1))
        return 0
    if not found:
        print(f"no run is recorded in {records.root}")
        return 0
    width = max(len(run.recipe) for run in found)
    for run in found:
        took = show_seconds(run.seconds)
        print(
            f"{run.id}  {run.recipe:{width}}  {_when(run.started)}  {took:>8}  "
            f"{state_of(run):11}  {_nodes(run)}  {_last_word(run)}".rstrip()
        )
    return 0


def state_of(run: Run) -> str:
    """What became of a run, in a word or two."""
    if run.live:
        return "running"
    if not run.finished and not run.interrupted:
        return "cut short"
    return run.ending[0]


def _record(run: Run) -> dict[str, object]:
    return {
        "id": run.id,
        "recipe": run.recipe,
        "started": run.started,
        "seconds": run.seconds,
        "state": state_of(run),
        "nodes": {
            name: {
                "outcome": one.outcome,
                **({"figures": dict(one.figures)} if isinstance(one, Built | Reused) else {}),
            }
            for name, one in run.outcomes.items()
        },
    }


def _nodes(run: Run) -> str:
    """How many nodes came to what."""
    counts = Counter(one.outcome for one in run.outcomes.values())
    return ", ".join(f"{count} {word}" for word, count in counts.items())


def _last_word(run: Run) -> str:
    """The figures of the node that reports most; of a run that failed, which node did and why."""
    for name, one in run.outcomes.items():
        if isinstance(one, Failed) and not one.was_stopped:
            return f"{name}: {shortened(one.error)}"
    there = [one for one in run.outcomes.values() if isinstance(one, Built | Reused)]
    # Of two that report as many the later.
    return show_figures(max(there[::-1], key=lambda one: len(one.figures)).figures) if there else ""


def _when(started: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(started))

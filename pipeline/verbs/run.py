"""`ingot run` and `ingot plan`: bring the line up to date, or say what that would do."""

import argparse
import json
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import replace

from configs.errors import IngotError
from pipeline.decide import (
    Build,
    Decision,
    Examiner,
    NotSelected,
    Recheck,
    Refuse,
    Reuse,
    as_json,
    decide,
    explain_recheck,
    in_use,
    relied_on,
    survey,
)
from pipeline.graph import Graph
from pipeline.lease import this_process
from pipeline.production import production
from pipeline.progress import Display
from pipeline.provenance import machine_facts
from pipeline.records import Blocked, Built, Failed, Reused, Run, new_run_id
from pipeline.runner import Setting, realise
from pipeline.seeds import across_seeds
from pipeline.tracking import Tracking
from pipeline.verbs.asked import Asked, command, load_asked, make_console, selection

INTERRUPTED = 130


def plan(args: argparse.Namespace) -> int:
    """Print what a run would reuse or build, and why. Exit 1 if something cannot be used."""
    asked = load_asked(args)
    store = asked.store(_to_stderr)
    graph = asked.graph(production, store.hashes)
    chosen = selection(args)
    examiner = Examiner(store, asked.recipe.name)
    states = survey(graph, examiner, hashed=relied_on(graph, chosen))
    decisions = decide(graph, chosen, states)
    if args.json:
        print(json.dumps(_plan_record(asked, graph, decisions), indent=1))
    else:
        print(f"{asked.title} in {store.root}")
        if not asked.recipe.base:
            model = asked.recipe.model
            print(
                f"  {model.family} of {model.parameters():,} parameters, "
                f"{model.parameters(active=True):,} of them a token"
            )
        width = max(map(len, graph.nodes))
        for name, decision in decisions.items():
            print(f"  {name:{width}}  {_line(decision)}")
    return 1 if any(isinstance(one, Refuse) for one in decisions.values()) else 0


def run(args: argparse.Namespace) -> int:
    """Build what is stale. Exit 1 if a node failed or fell short, 130 if stopped by the user."""
    if args.dry_run:
        return plan(args)
    asked = load_asked(args)
    recipe, chosen = asked.recipe, selection(args)
    display = Display(make_console())
    store = asked.store(display.note)
    graph = asked.graph(production, store.hashes)
    store.prepare()
    examiner = Examiner(store, recipe.name)
    states = survey(graph, examiner, hashed=relied_on(graph, chosen))
    decide(graph, chosen, states)
    record = Run(
        id=new_run_id(),
        recipe=recipe.name,
        invocation=asked.invocation,
        provenance=machine_facts(recipe.cluster),
        started=time.time(),
        store_root=str(store.root),
        process=this_process(),
        in_use=in_use(states),
    )
    # A scheduler's polite end is the same as the user's.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    tracking = Tracking(
        recipe, record, store_root=store.root, records=store.records, say=display.note
    )
    setting = Setting(store, examiner, recipe.cluster, [tracking, display])
    record = realise(graph, chosen, setting, record)
    record = replace(record, across_seeds=across_seeds(graph, record, store.root))
    record = tracking.finish(record)
    store.records.update(replace(record, finished=True))
    return _conclude(record, asked, tracking, display)


def _conclude(record: Run, asked: Asked, tracking: Tracking, display: Display) -> int:
    """The table, where to look further, and the exit code."""
    shown = {
        name: tracking.link(one.tracking_id)
        for name, one in record.outcomes.items()
        if not isinstance(one, Blocked) and one.tracking_id is not None
    }
    display.table(record, shown)
    display.across_seeds(record)
    if record.tracking_id is not None:
        hint = "" if tracking.uri.startswith("http") else " (`ingot ui` serves these pages)"
        display.note(f"MLflow: {tracking.link(record.tracking_id)}{hint}")
    if record.interrupted:
        display.note(
            f"Stopped. What is committed stays; {command('run', asked.invocation)} goes on from it."
        )
        return INTERRUPTED
    for name, outcome in record.outcomes.items():
        match outcome:
            case Failed():
                print(f"ingot: error: {name}: {outcome.error}", file=sys.stderr)
            case Blocked(by, reason) if reason:
                print(
                    f"ingot: error: {name}: made of {by}, which is {reason}; run it again without "
                    "--only and --force to build both",
                    file=sys.stderr,
                )
            case Built(shortfall=str(why)) | Reused(shortfall=str(why)):
                print(f"ingot: error: {name}: {why}", file=sys.stderr)
    return 0 if record.succeeded else IngotError.exit_code


def _line(decision: Decision) -> str:
    match decision:
        case Reuse(committed):
            return f"reuse    {committed.address}"
        case Build(reasons):
            return f"build    {'; '.join(reasons)}"
        case Recheck(inputs):
            return f"recheck  {explain_recheck(inputs)}"
        case Refuse(reasons):
            return f"refuse   {'; '.join(reasons)}"
        case NotSelected(reason):
            return f"leave    {reason}"


def _plan_record(
    asked: Asked, graph: Graph, decisions: Mapping[str, Decision]
) -> dict[str, object]:
    nodes = [
        {
            "node": node.name,
            "stage": node.planned.stage.name,
            "fingerprint": node.fingerprint,
            "inputs": dict(node.inputs),
            **({} if node.seed is None else {"seed": node.seed}),
            **as_json(decisions[node.name]),
        }
        for node in graph
    ]
    return {"recipe": asked.recipe.name, "store": asked.recipe.store.url, "nodes": nodes}


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)

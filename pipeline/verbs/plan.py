"""`ingot plan`: what a run would reuse or build, and why. Loads no stage's body."""

import argparse
import json
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.decide import Build, Decision, Judged, Recheck, Refuse, Reuse, decide, in_words
from pipeline.feasible import unpipelined, unserved
from pipeline.figures import show_bytes, show_seconds
from pipeline.graph import Graph, Node
from pipeline.states import Examiner
from pipeline.verbs.asked import Asked, load_asked, selection
from stages.manifest import Manifest

_INPUT = re.compile(r"input (\S+) (?:changed|rebuilt|added)")
"""A reason that is not the node's own."""


def plan(args: argparse.Namespace) -> int:
    """Print what a run would reuse or build, and why. Exit 1 if something cannot be used."""
    asked = load_asked(args)
    store = asked.store(_to_stderr)
    graph = asked.graph(store.hashes)
    examiner = Examiner(store, asked.recipe.name)
    judged = decide(graph, selection(args), examiner)
    if args.json:
        print(json.dumps(_plan_record(asked, graph, judged, examiner), indent=1))
    else:
        print(f"{asked.title} in {store.mirror.url}")
        if not asked.recipe.base:
            model = asked.recipe.model
            print(
                f"  {model.family} of {model.parameters():,} parameters, "
                f"{model.parameters(active=True):,} of them a token"
            )
        for line in _lines(graph, judged, examiner, store.root):
            print(line)
        for told in unserved(asked.recipe):
            print(f"  note: {told}")
        due = (
            node.planned.stage.name
            for node in graph
            if isinstance(judged[node.name].decision, Build | Recheck)
        )
        if refusal := unpipelined(asked.recipe.cluster, due):
            print(f"  note: a run would end at once: {refusal}")
    return 1 if any(isinstance(one.decision, Refuse) for one in judged.values()) else 0


def _lines(
    graph: Graph, judged: Mapping[str, Judged], examiner: Examiner, root: Path
) -> Iterator[str]:
    """A line a node; then how long what is built took last time, and the disk that it needs."""
    width = max(map(len, graph.nodes))
    building: list[Manifest] = []
    unknown = 0
    for node in graph:
        decision = judged[node.name].decision
        verb, reasons = in_words(decision)
        said = list(_with_causes(graph, judged, node, reasons))
        last = examiner.last(node) if isinstance(decision, Build | Recheck) else None
        if last is not None:
            building.append(last)
            said.append(f"took {show_seconds(last.provenance.get('seconds', 0.0))} last time")
        elif isinstance(decision, Build):
            unknown += 1
        what = decision.committed.address if isinstance(decision, Reuse) else ""
        yield f"  {node.name:{width}}  {verb:8} {what or '; '.join(said)}"
    if building:
        seconds = sum(one.provenance.get("seconds", 0.0) for one in building)
        needed = sum(one.num_bytes for one in building)
        free = shutil.disk_usage(next(one for one in (root, *root.parents) if one.exists())).free
        beside = f", and {unknown} more nodes that were never built" if unknown else ""
        yield (
            f"  last time these took {show_seconds(seconds)} and {show_bytes(needed)}{beside}; "
            f"{show_bytes(free)} are free in {root}"
        )


def _with_causes(
    graph: Graph, judged: Mapping[str, Judged], node: Node, reasons: Sequence[str]
) -> Iterator[str]:
    """Reasons; each that is an input's with what changed up the line, unless that was said.

    Of an input that is fresh, as another run has built it again, that run is told.
    """
    told: set[str] = set()
    for reason in reasons:
        found = _INPUT.fullmatch(reason)
        supplier = None if found is None else node.inputs.get(found[1])
        roots = [] if supplier is None else list(_causes(graph, judged, supplier))
        new = [root for root in dict.fromkeys(roots) if root not in told]
        told |= set(new)
        yield f"{reason} ({'; '.join(new)})" if new else reason


def _causes(graph: Graph, judged: Mapping[str, Judged], supplier: str) -> Iterator[str]:
    """Why an input is not what it was."""
    yield from _roots(graph, judged, supplier)
    decision = judged[supplier].decision
    if isinstance(decision, Reuse):
        yield f"{supplier} was built by run {decision.committed.manifest.provenance.get('run')}"


def _roots(graph: Graph, judged: Mapping[str, Judged], name: str) -> Iterator[str]:
    """What of its own is changed in a node, or in those that it is made of."""
    node = graph[name]
    for reason in in_words(judged[name].decision)[1]:
        found = _INPUT.fullmatch(reason)
        if found is not None and found[1] in node.inputs:
            yield from _roots(graph, judged, node.inputs[found[1]])
        else:
            yield f"{name}: {reason}"


def _plan_record(
    asked: Asked, graph: Graph, judged: Mapping[str, Judged], examiner: Examiner
) -> dict[str, object]:
    nodes = [
        {
            "node": node.name,
            "stage": node.planned.stage.name,
            "fingerprint": node.fingerprint,
            "inputs": dict(node.inputs),
            **({} if node.seed is None else {"seed": node.seed}),
            **_decision_record(judged[node.name].decision),
            **_last_record(examiner.last(node)),
        }
        for node in graph
    ]
    return {"recipe": asked.recipe.name, "store": asked.recipe.store.url, "nodes": nodes}


def _decision_record(decision: Decision) -> dict[str, object]:
    verb, reasons = in_words(decision)
    taken = {"uri": str(decision.committed.path)} if isinstance(decision, Reuse) else {}
    return {"decision": verb, **taken, "reasons": list(reasons)}


def _last_record(last: Manifest | None) -> dict[str, object]:
    """How long the node took last time, and what it left on the disk."""
    if last is None:
        return {}
    return {"last_seconds": last.provenance.get("seconds"), "last_bytes": last.num_bytes}


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)

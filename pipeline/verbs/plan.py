"""`ingot plan`: what a run would reuse or build, and why. Loads no stage's body."""

import argparse
import json
import sys
from collections.abc import Mapping

from pipeline.decide import Decision, Judged, Refuse, Reuse, decide, in_words
from pipeline.graph import Graph
from pipeline.states import Examiner
from pipeline.verbs.asked import Asked, load_asked, selection


def plan(args: argparse.Namespace) -> int:
    """Print what a run would reuse or build, and why. Exit 1 if something cannot be used."""
    asked = load_asked(args)
    store = asked.store(_to_stderr)
    graph = asked.graph(store.hashes)
    judged = decide(graph, selection(args), Examiner(store, asked.recipe.name))
    if args.json:
        print(json.dumps(_plan_record(asked, graph, judged), indent=1))
    else:
        print(f"{asked.title} in {store.root}")
        if not asked.recipe.base:
            model = asked.recipe.model
            print(
                f"  {model.family} of {model.parameters():,} parameters, "
                f"{model.parameters(active=True):,} of them a token"
            )
        width = max(map(len, graph.nodes))
        for name, one in judged.items():
            verb, reasons = in_words(one.decision)
            what = one.decision.committed.address if isinstance(one.decision, Reuse) else ""
            print(f"  {name:{width}}  {verb:8} {what or '; '.join(reasons)}")
    return 1 if any(isinstance(one.decision, Refuse) for one in judged.values()) else 0


def _plan_record(asked: Asked, graph: Graph, judged: Mapping[str, Judged]) -> dict[str, object]:
    nodes = [
        {
            "node": node.name,
            "stage": node.planned.stage.name,
            "fingerprint": node.fingerprint,
            "inputs": dict(node.inputs),
            **({} if node.seed is None else {"seed": node.seed}),
            **_decision_record(judged[node.name].decision),
        }
        for node in graph
    ]
    return {"recipe": asked.recipe.name, "store": asked.recipe.store.url, "nodes": nodes}


def _decision_record(decision: Decision) -> dict[str, object]:
    verb, reasons = in_words(decision)
    taken = {"uri": str(decision.committed.path)} if isinstance(decision, Reuse) else {}
    return {"decision": verb, **taken, "reasons": list(reasons)}


def _to_stderr(message: str) -> None:
    print(message, file=sys.stderr)

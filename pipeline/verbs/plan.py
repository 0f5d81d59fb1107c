"""`ingot plan`: what a run would reuse or build, and why. Loads no stage's body."""

import argparse
import json
import sys
from collections.abc import Mapping

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
    relied_on,
    survey,
)
from pipeline.graph import Graph
from pipeline.verbs.asked import Asked, load_asked, selection


def plan(args: argparse.Namespace) -> int:
    """Print what a run would reuse or build, and why. Exit 1 if something cannot be used."""
    asked = load_asked(args)
    store = asked.store(_to_stderr)
    graph = asked.graph(store.hashes)
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
